"""Lines as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..suite.busy import beside
from .lines import (
    IDLE,
    MACHINE,
    MEASURED,
    PUBLISHED,
    SERIES,
    SETTING,
    SPREAD_CALLS,
    Line,
    exponents_of,
    grouped,
    idle_times,
    in_order,
    out_of_memory,
    published_times,
    times_as_fast,
    times_idle,
    told_exponent,
    why_not_timed,
)
from .looks import OTHER_FUNCTION, computes_another_function, counted, digits, look_of, seconds, size, unit_of

BUSY_NOTE = """of idle: times its own time with nothing beside it, of the same commit
busy, busy_nice: processes that counted beside it, and their niceness"""
TABLE_NOTE = f"""x: times as fast as eager_stflow ({PUBLISHED["graph"]} of a graph), where both took turns in one run
prepared: once per slide, in no median
compile: how much longer the first call took than a second one, compilation included; in no median
{OTHER_FUNCTION}: computes another function, over all spots or by dot products, which nothing is checked against"""


def terminal_table(lines: Iterable[Line]) -> Table:
    """Per workload and size what each provider costs, and what became of those that did not run."""
    lines = in_order(lines)
    busy = any(line["busy"] for line in lines)
    fields = [name for name in (*SETTING, *MACHINE, "device") if busy or name not in IDLE]
    varying = [field for field in fields if len({line[field] for line in lines}) > 1]
    same = [f"{field} {lines[0][field]}" for field in fields if field not in varying]
    called = "; ".join(f"{name}: {look_of(name).name}" for name in dict.fromkeys(line["provider"] for line in lines))
    notes = [called, *_told_notes(lines), *_told_exponents(lines), TABLE_NOTE, *([BUSY_NOTE] if busy else [])]
    caption = Text("\n".join(["", *notes]), style="table.caption")
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "show_edge": False}  # fits 120 columns
    result = Table(title=", ".join(same), caption=caption, caption_justify="left", **narrow)
    for name in ("workload", "provider"):
        result.add_column(name, no_wrap=True)
    costs = ("spots", "median (20th-80th)", "spots/s", "prepared", "compile", "peak", "x")
    for name in (*costs, *(["of idle"] if busy else [])):
        result.add_column(name, justify="right", no_wrap=True)
    for name in (*([", ".join(varying)] if varying else []), "check"):
        result.add_column(name)
    baselines, idle = published_times(lines), idle_times(lines)
    for (workload, spots), members in grouped(lines, ("workload", "spots")).items():
        for line in members:
            setting = [", ".join(str(line[field]) for field in varying)] if varying else []
            check = "" if line["check"] == "not compared" else line["check"]
            of_idle = [times_idle(line, idle)] if busy else []
            cells = (workload, _name(line), f"{spots:,}", *_cost(line, baselines), *of_idle, *setting, check)
            result.add_row(*map(Text, cells))
        result.add_section()
    return result


def _name(line: Line) -> str:
    other = f" {OTHER_FUNCTION}" if computes_another_function(line["provider"]) else ""
    return str(line["provider"]) + other + ("" if line["arithmetic"] == line["dtype"] else f" in {line['arithmetic']}")


def _cost(line: Line, baselines: dict[tuple[Any, ...], float]) -> list[str]:
    """Time, spots per second, what comes before, memory, and how many times as fast as the published code."""
    prepared = "" if line["prepare_ms"] is None else seconds(line["prepare_ms"])
    compiled = seconds(1e3 * line["compile_s"]) if line["compile_s"] else ""
    peak = "" if line["peak_bytes"] is None else size(line["peak_bytes"])
    if line["median_ms"] is None:
        return [why_not_timed(line), "", prepared, compiled, peak, ""]
    return [
        _spread(line),
        "" if line["spots_per_s"] is None else f"{line['spots_per_s']:,.0f}",
        prepared,
        compiled,
        peak,
        times_as_fast(line, baselines),
    ]


def _spread(line: Line) -> str:
    if line["p20_ms"] is None or line["p80_ms"] is None:
        return seconds(line["median_ms"])
    if line["rounds"] < SPREAD_CALLS:
        calls = "one call" if line["rounds"] == 1 else f"{line['rounds']} calls"
        return f"{seconds(line['median_ms'])} ({calls})"
    unit, factor = unit_of(line["median_ms"])
    middle, low, high = (digits(line[name] / factor) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{middle} {unit} ({low}-{high})"


def _told_notes(lines: list[Line]) -> list[str]:
    """A row per series and kind of note, of the smallest size that has it."""
    first: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if line["note"]:
            kind = "memory" if out_of_memory(line) else line["note"]
            first.setdefault((*(line[field] for field in SERIES), kind), line)
    return [
        f"{line['workload']}, {line['provider']} ({_setting(line)}), {line['spots']:,} spots: {line['note']}"
        for line in first.values()
    ]


def _told_exponents(lines: list[Line]) -> list[str]:
    """A row per series that has them."""
    time, memory = (exponents_of(lines, quantity) for quantity in MEASURED)
    rows = []
    for series in time:
        which = dict(zip(SERIES, series, strict=True))
        more = f", memory N^{told_exponent(memory[series])}" if series in memory else ""
        what = f"{which['workload']}, {which['provider']} ({_setting(which)})"
        rows.append(f"{what}: time N^{told_exponent(time[series])}{more}")
    return rows


def _setting(line: Line) -> str:
    """With what tells it from another of the same provider."""
    setting = [*(str(line[field]) for field in SETTING), counted(line["threads"], "thread")]
    return ", ".join(setting + ([beside(line["busy"], line["busy_nice"])] if line["busy"] else []))

"""What a person sees of the suite's results: a table for the terminal, pictures, and the README's benchmark section.

python -m benchmarks.report [RESULTS] [--readme README.md]

reads a .jsonl file of the suite or a folder of them, prints the table and draws the pictures beside the results; with
``--readme`` the section between the two marks is written anew. No figure in it is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stflow_fast.errors import InputError, first_line
from stflow_fast.files import atomic_path

from .measure import file_name
from .providers import PROVIDERS, Ours
from .suite import LEFT_OUT
from .summarize import RESULTS, table

Line = dict[str, Any]
"""One line of the suite: the figures of one provider on one workload and size."""

SETTING = ("layout", "k", "genes", "dtype")
SERIES = ("workload", "provider", *SETTING, "device")
KEY = (*SERIES, "spots")
"""What makes two lines the same figure; of such the newest counts."""

NUMBERS = ("median_ms", "p20_ms", "p80_ms", "peak_bytes", "spots_per_s", "of_floor")
FIELDS = (*KEY, *NUMBERS, "threads", "check", "note", "load", "versions", "commit", "date")
RATES = ("peak_flops_per_s", "peak_copy_bytes_per_s")
"""What a share of the floor rests on."""

MEASURED = {"time": "median_ms", "memory": "peak_bytes"}

WORKLOADS = {
    "sample": "Sample of a slide (4 calls of the denoiser)",
    "denoise": "One call of the denoiser",
    "train_step": "Training step",
    "graph": "Graph of the spots",
}
STUDIED = {"genes": "Genes", "k": "Neighbours", "layout": "Layout"}
"""Settings that may be varied, each alone, and how a reader meets them."""

OURS = tuple(name for name, factory in PROVIDERS.items() if getattr(factory, "func", factory) is Ours)
DTYPES = ("float32", "tf32", "bf16")
BASELINES = {"graph": "dense_cdist"}
"""What the published code does in a workload; elsewhere it is eager_stflow."""

STEADY = 10_000
"""Spots from which on the fixed cost of a call no longer bends a slope."""

NEEDED = 3
"""Sizes without which there is no slope."""

SHOWN_SIZES = (10_000, 100_000, 1_000_000)
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
REPEAT = "make bench"
OTHER_FUNCTION = "†"
TABLE_NOTE = f"""ratio: time over that of eager_stflow ({BASELINES["graph"]} of a graph) in the same run
{OTHER_FUNCTION}: computes another function, over all spots or by dot products"""
DPI = 150
SOFT = "#555555"
CROSS = "out of memory"
"""What the crosses of a picture are found by."""


class Look(NamedTuple):
    name: str
    color: str
    marker: str
    stroke: str = "-"
    """Other than a full line for a variant of what stands above it: where both are equal, both are seen."""


LOOKS = {
    "eager_stflow": Look("published algorithm", "#b87400", "o"),
    "message_passing": Look("published network, edge list", "#5f6b6d", "P"),
    "dense_attention": Look("published network, all spots", "#d55e00", "s"),
    "dense_softmax": Look("dot products, dense softmax", "#cc79a7", "^"),
    "flash_attention": Look("dot products, flash attention", "#8b3fa0", "v"),
    "flex_attention": Look("dot products, FlexAttention", "#c9a400", "D"),
    "dense_cdist": Look("all distances", "#b87400", "h"),
    "scipy_kdtree": Look("stflow-fast, k-d tree", "#56b4e9", "p"),
    "reference": Look("stflow-fast, plain torch", "#0072b2", "o"),
    "reference_compiled": Look("stflow-fast, torch.compile", "#003b5c", "s", "--"),
    "triton": Look("stflow-fast, Triton", "#009e73", "D"),
    "triton_kept_edges": Look("stflow-fast, Triton, edges kept", "#c2185b", "^", "--"),
    "triton_graph": Look("stflow-fast, Triton, CUDA graph", "#004d3a", "v", ":"),
}
"""How a reader meets the providers: one name, colour and marker everywhere."""


def look_of(provider: str) -> Look:
    return LOOKS.get(provider, Look(provider, "black", "*"))


def computes_another_function(provider: str) -> bool:
    factory = PROVIDERS.get(provider)
    return factory is not None and not getattr(factory, "func", factory).same_function


def named(provider: str) -> str:
    return look_of(provider).name + (f" {OTHER_FUNCTION}" if computes_another_function(provider) else "")


def load(path: str | os.PathLike) -> list[Line]:
    """The suite's lines of a .jsonl file, or of those of a folder that are the suite's; the newest of each figure.

    One that was left out for the time that it would take says nothing new of a figure that was measured before. A last
    line that an interruption cut off is left out, which is said on standard error.

    Raises:
        InputError: a line is broken, or there is no result.
    """
    path, newest = Path(path), {}
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        for line in read(file):
            key = tuple(line[field] for field in KEY)
            if key not in newest or _standing(line) >= _standing(newest[key]):
                newest[key] = line
    if not newest:
        raise InputError(f"{path}: holds no results of the benchmark suite; make some with `{REPEAT}`")
    return list(newest.values())


def _standing(line: Line) -> tuple[bool, str]:
    """Dates are ISO and UTC: their order is that of their text."""
    return not line["note"].startswith(LEFT_OUT), line["date"]


def read(file: Path) -> list[Line]:
    """The lines of a file in their order; none where its first line is not the suite's. Raises InputError as load."""
    try:
        content = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or first_line(error)})") from error
    lines: list[Line] = []
    for number, text in enumerate(content, start=1):
        place = f"{file}, line {number}"
        if not text.strip():
            continue
        try:
            line = _parse(text, place)
        except InputError as error:
            if number < len(content):
                raise
            print(f"{error}; left out, as an interruption may have cut it off", file=sys.stderr)
            break
        if not lines and not line.keys() >= set(KEY):
            return []
        _check(line, place)
        lines.append(line)
    return lines


def _parse(content: str, place: str) -> Line:
    try:
        line = json.loads(content)
    except ValueError as error:
        raise InputError(f"{place}: is not valid JSON ({error}); remove the line") from error
    if not isinstance(line, dict):
        raise InputError(f"{place}: is no JSON object; remove the line")
    return line


def _check(line: Line, place: str) -> None:
    if line.get("workload") not in WORKLOADS:
        raise InputError(f"{place}: workload must be one of {', '.join(WORKLOADS)}; remove the line")
    absent = [field for field in FIELDS if field not in line]
    if absent:
        raise InputError(f"{place}: has no {', '.join(absent)}; remove the line")
    for field in ("spots", *NUMBERS):
        value = line[field]
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise InputError(f"{place}: {field} must be a number or null, not {value!r}; remove the line")
    if line["of_floor"] and not all(line.get(rate) for rate in RATES):
        raise InputError(f"{place}: of_floor needs {' and '.join(RATES)}; remove the line")


def slopes(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Exponents of time and memory in the spots, by least squares on logarithms, of series with three sizes or more.

    Returns: per series (:data:`SERIES`), quantity and start: ``quantity`` (``"time"`` or ``"memory"``), ``exponent``,
        ``points``, ``least`` and ``most`` spots, ``over`` (``"all sizes"`` or ``"from 10,000 spots on"``).
    """
    found = []
    for series, members in _grouped(lines, SERIES).items():
        for quantity, field in MEASURED.items():
            points = sorted((line["spots"], line[field]) for line in members if line[field])
            for start, over in ((0, "all sizes"), (STEADY, f"from {STEADY:,} spots on")):
                kept = [point for point in points if point[0] >= start]
                if len(kept) >= NEEDED:
                    found.append(
                        {**dict(zip(SERIES, series, strict=True)), "quantity": quantity, "over": over, **_fit(kept)}
                    )
    return found


def _fit(points: list[tuple[int, float]]) -> dict[str, Any]:
    spots, values = np.array(points, dtype=float).T
    exponent = float(np.polyfit(np.log(spots), np.log(values), 1)[0])
    return {"exponent": exponent, "points": len(points), "least": points[0][0], "most": points[-1][0]}


def _exponents(lines: Iterable[Line], quantity: str) -> dict[tuple, dict[str, Any]]:
    """Per series its slope; the one from 10,000 spots on where there is one, which comes second."""
    return {tuple(slope[field] for field in SERIES): slope for slope in slopes(lines) if slope["quantity"] == quantity}


def _exponent(slope: dict[str, Any]) -> str:
    """With the sizes that it was fitted to."""
    return f"{slope['exponent']:.2f} ({slope['least']:,} to {slope['most']:,})"


def _told_exponents(lines: list[Line]) -> list[str]:
    """A row per series that has them."""
    time, memory = (_exponents(lines, quantity) for quantity in MEASURED)
    rows = []
    for series in time:
        which = dict(zip(SERIES, series, strict=True))
        setting = ", ".join(str(which[field]) for field in SETTING)
        more = f", memory N^{_exponent(memory[series])}" if series in memory else ""
        rows.append(f"{which['workload']}, {which['provider']} ({setting}): time N^{_exponent(time[series])}{more}")
    return rows


def _grouped(lines: Iterable[Line], fields: tuple[str, ...]) -> dict[tuple, list[Line]]:
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[field] for field in fields), []).append(line)
    return groups


def _in_order(lines: Iterable[Line]) -> list[Line]:
    """By workload, size and provider, each in the order in which this file names them."""
    workloads, providers = list(WORKLOADS), list(LOOKS)

    def place(names: list[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    def key(line: Line) -> tuple:
        provider, dtype = place(providers, line["provider"]), place(list(DTYPES), line["dtype"])
        return place(workloads, line["workload"]), line["spots"], provider, dtype

    return sorted(lines, key=key)


def seconds(milliseconds: float) -> str:
    unit, factor = _unit(milliseconds)
    return f"{_digits(milliseconds / factor)} {unit}"


def _unit(milliseconds: float) -> tuple[str, float]:
    """Of a time, and that many milliseconds."""
    return ("s", 1e3) if milliseconds >= 1e3 else ("ms", 1.0) if milliseconds >= 1 else ("us", 1e-3)


def size(n_bytes: float) -> str:
    units = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
    unit, factor = next(((unit, factor) for unit, factor in units if n_bytes >= factor), units[-1])
    return f"{_digits(n_bytes / factor)} {unit}"


def _digits(value: float) -> str:
    """Three of them, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def out_of_memory(line: Line) -> str:
    """What a provider lacked, in few words; empty where it lacked no memory."""
    over = re.search(r"needs ([\d.]+) GiB, over the budget", line["note"])
    if over is None:
        return "out of memory" if "out of memory" in line["note"] else ""
    return f"needs {size(float(over[1]) * 2**30)}"


def terminal_table(lines: Iterable[Line]) -> Table:
    """Per workload and size what each provider costs, and what became of those that did not run."""
    lines = _in_order(lines)
    fields = (*SETTING, "threads", "device")
    varying = [field for field in fields if len({line[field] for line in lines}) > 1]
    same = [f"{field} {lines[0][field]}" for field in fields if field not in varying]
    caption = "\n".join([*_told_exponents(lines), TABLE_NOTE])
    result = Table(title=", ".join(same), caption=caption, caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("workload", "provider"):
        result.add_column(name, no_wrap=True)
    for name in ("spots", "median (20th-80th)", "spots/s", "peak", "ratio"):
        result.add_column(name, justify="right", no_wrap=True)
    for name in (*(["setting"] if varying else []), "check", "note"):
        result.add_column(name)
    baselines = _baselines(lines)
    for (workload, spots), members in _grouped(lines, ("workload", "spots")).items():
        for line in members:
            setting = [", ".join(str(line[field]) for field in varying)] if varying else []
            name = line["provider"] + (f" {OTHER_FUNCTION}" if computes_another_function(line["provider"]) else "")
            cells = (workload, name, f"{spots:,}", *_cost(line, baselines), *setting, line["check"], line["note"])
            result.add_row(*map(Text, cells))
        result.add_section()
    return result


def _cost(line: Line, baselines: dict[tuple, float]) -> list[str]:
    """Time, spots per second, memory, and the time over that of the published code."""
    peak = "" if line["peak_bytes"] is None else size(line["peak_bytes"])
    if line["median_ms"] is None:
        return [_why(line), "", peak, ""]
    published = baselines.get(_run(line))
    return [
        _spread(line),
        "" if line["spots_per_s"] is None else f"{line['spots_per_s']:,.0f}",
        peak,
        "" if published is None else f"{_digits(line['median_ms'] / published)}x",
    ]


def _why(line: Line) -> str:
    """Why there is no time, in few words."""
    return "red check" if line["check"] == "red" else out_of_memory(line) or "not run"


def _spread(line: Line) -> str:
    if line["p20_ms"] is None or line["p80_ms"] is None:
        return seconds(line["median_ms"])
    if line["rounds"] == 1:
        return f"{seconds(line['median_ms'])} (one call)"
    unit, factor = _unit(line["median_ms"])
    middle, low, high = (_digits(line[name] / factor) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{middle} {unit} ({low}-{high})"


def _run(line: Line) -> tuple:
    """What two lines must share to be compared: the work, the machine, the code, its threads, and the run, of which all
    lines have one date."""
    return tuple(line[field] for field in ("workload", *SETTING, "device", "spots", "threads", "commit", "date"))


def _baselines(lines: Iterable[Line]) -> dict[tuple, float]:
    return {
        _run(line): line["median_ms"]
        for line in lines
        if line["provider"] == BASELINES.get(line["workload"], "eager_stflow") and line["median_ms"]
    }


def write_pictures(lines: Iterable[Line], folder: str | os.PathLike) -> list[Path]:
    """Draw, per device, time and memory against spots, and the share of the floor where it is known.

    Raises:
        InputError: a picture cannot be written.
    """
    figures: dict[Path, Figure] = {}
    for (device,), members in _grouped(lines, ("device",)).items():
        for quantity, field in MEASURED.items():
            if any(line[field] for line in chosen(members)):
                figures[picture_path(folder, device, quantity)] = scaling_figure(members, quantity)
        floors = [line for line in chosen(members) if line["of_floor"]]
        if floors:
            figures[picture_path(folder, device, "floor")] = floor_figure(floors)
    for path, figure in figures.items():
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")
    return list(figures)


def picture_path(folder: str | os.PathLike, device: str, content: str) -> Path:
    return Path(folder) / f"{file_name(device)}-{content}.png"


def chosen(lines: Iterable[Line]) -> list[Line]:
    """Of one device, what tables and pictures for a reader show, in order.

    Per workload the layout, K and genes that were measured most, in all workloads where two are equal, since the others
    are studies beside it; per provider its fastest arithmetic.
    """
    lines, kept = _in_order(lines), []
    often = {setting: len(members) for setting, members in _grouped(lines, tuple(STUDIED)).items()}
    for members in _grouped(lines, ("workload",)).values():
        groups = _grouped(members, tuple(STUDIED))
        kept += groups[max(groups, key=lambda setting: (len(groups[setting]), often[setting]))]
    fastest = {provider: _fastest(members) for (provider,), members in _grouped(kept, ("provider",)).items()}
    return [line for line in kept if line["dtype"] == fastest[line["provider"]]]


def _fastest(lines: list[Line]) -> str:
    """The dtype with the least time at the first workload's largest size; the first where none ran."""
    done = [line for line in lines if line["median_ms"]]
    if not done:
        return lines[0]["dtype"]
    same = [line for line in done if line["workload"] == done[0]["workload"]]
    largest = max(line["spots"] for line in same)
    return min((line for line in same if line["spots"] == largest), key=lambda line: line["median_ms"])["dtype"]


def scaling_figure(lines: Iterable[Line], quantity: str) -> Figure:
    """Time or memory against spots on one device, one panel per workload.

    A cross at the end of a line, or at the bottom where there is none, says that memory did not hold the next size.
    """
    lines = chosen(lines)
    groups = {name: members for (name,), members in _grouped(lines, ("workload",)).items()}
    groups = {name: members for name, members in groups.items() if any(line[MEASURED[quantity]] for line in members)}
    # One size alone is no line; a table says it better.
    several = {name: members for name, members in groups.items() if len({line["spots"] for line in members}) > 1}
    groups = several or groups
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    entries = max(len(_grouped(members, ("provider",))) for members in groups.values())
    shape = (4.9 * columns if columns > 1 else 6.5, rows * (3.4 + 0.17 * entries) + 0.7)
    figure = Figure(figsize=shape, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (workload, members) in zip(panels, groups.items(), strict=False):
        _draw_panel(axes, members, quantity)
        setting = f"{members[0]['layout']}, K = {members[0]['k']}, {members[0]['genes']} genes"
        axes.set_title(f"{WORKLOADS[workload]}\n{setting}", fontsize=10, loc="left")
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    title = {"time": "Time", "memory": "Peak memory above the inputs"}[quantity]
    figure.suptitle(textwrap.fill(f"{title}, {lines[0]['device']}", int(9 * shape[0])), fontsize=12)
    figure.supxlabel(textwrap.fill(_footnote(lines, quantity), int(13 * shape[0])), fontsize=8.5, color=SOFT)
    return figure


def _footnote(lines: list[Line], quantity: str) -> str:
    parts = ["Band: 20th to 80th percentile."] if quantity == "time" else []
    parts.append(f"Exponents of N: from {STEADY:,} spots on where there are {NEEDED} sizes.")
    if any(computes_another_function(line["provider"]) for line in lines):
        parts.append(f"{OTHER_FUNCTION} another function.")
    return " ".join(parts)


def _draw_panel(axes: Axes, lines: list[Line], quantity: str) -> None:
    exponents = _exponents(lines, quantity)
    same_dtype = len({line["dtype"] for line in lines}) == 1
    axes.set(xscale="log", yscale="log")
    for (provider,), members in _grouped(lines, ("provider",)).items():
        slope = exponents.get(tuple(members[0][field] for field in SERIES))
        label = named(provider) + ("" if same_dtype else f", {members[0]['dtype']}")
        _draw_series(axes, members, quantity, label + ("" if slope is None else f", N^{slope['exponent']:.2f}"))
    unit = 1e-3 if quantity == "time" else 1e-9
    for axis, scale in ((axes.xaxis, 1.0), (axes.yaxis, unit)):
        axis.set_major_formatter(FuncFormatter(lambda value, _, scale=scale: f"{value * scale:,.10g}"))
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("spots", fontsize=9.5)
    axes.set_ylabel("seconds" if quantity == "time" else "GB", fontsize=9.5)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    place = {"loc": "upper left", "bbox_to_anchor": (-0.12, -0.17), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=8.5, labelspacing=0.25, handlelength=1.8, **place)


def _draw_series(axes: Axes, lines: list[Line], quantity: str, label: str) -> None:
    """One provider's line with its cross, both named in the legend; nothing of a provider that does not run here."""
    field, look = MEASURED[quantity], look_of(lines[0]["provider"])
    done = [line for line in lines if line[field]]
    failed = next((line for line in lines if line["median_ms"] is None and out_of_memory(line)), None)
    if not (done or failed):
        return
    if failed:
        label += f", X {failed['spots']:,}: {out_of_memory(failed)}"
    spots, values = [line["spots"] for line in done], [line[field] for line in done]
    face = look.color if look.stroke == "-" else "none"
    style = {"marker": look.marker, "markerfacecolor": face, "markersize": 5.5, "linewidth": 1.5}
    axes.plot(spots, values, color=look.color, linestyle=look.stroke, label=label, **style)
    if quantity == "time" and done:
        low, high = zip(*((line["p20_ms"], line["p80_ms"]) for line in done), strict=True)
        if None not in (*low, *high):
            axes.fill_between(spots, low, high, color=look.color, alpha=0.18, linewidth=0)
    if failed:
        _draw_cross(axes, look, (spots[-1], values[-1]) if done else (failed["spots"], None))


def _draw_cross(axes: Axes, look: Look, place: tuple[int, float | None]) -> None:
    spots, value = place
    where = {} if value is not None else {"transform": axes.get_xaxis_transform()}
    style = {"marker": "X", "markersize": 9, "markeredgecolor": "white", "markeredgewidth": 0.6}
    height = 0.03 if value is None else value
    axes.plot(
        [spots], [height], color=look.color, linestyle="none", zorder=4, clip_on=False, gid=CROSS, **style, **where
    )


def floor_figure(lines: list[Line]) -> Figure:
    """How much of the time the floor is; 100 % cannot be beaten. Of lines that know it: per workload the largest size
    that every series has, or the largest of each.
    """
    rows = []
    for members in _grouped(_in_order(lines), ("workload",)).values():
        every = list(_grouped(members, SERIES).values())
        common = set.intersection(*({line["spots"] for line in series} for series in every))
        for series in every:
            rows += [max((line for line in series if not common or line["spots"] in common), key=lambda x: x["spots"])]
    figure = Figure(figsize=(9.0, 0.3 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    shares = [100 * line["of_floor"] for line in rows]
    axes.barh(range(len(rows)), shares, height=0.7, color=[look_of(line["provider"]).color for line in rows])
    for row, share in enumerate(shares):
        axes.text(share + 1, row, f"{share:.0f} %", va="center", fontsize=9)
    names = [f"{line['workload']}, {named(line['provider'])}, {line['dtype']}, {line['spots']:,}" for line in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set(xlim=(0, max(110.0, 1.15 * max(shares))), ylim=(len(rows) - 0.4, -0.6))
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("floor in % of the time taken", fontsize=9.5)
    told = f"Share of the floor, {rows[0]['device']}\n{textwrap.fill(_rates(rows), 110)}"
    figure.suptitle(told, fontsize=10, x=0.01, horizontalalignment="left")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _rates(lines: list[Line]) -> str:
    """What the floors of the lines were set over."""

    def measured(field: str) -> str:
        lowest, highest = (_digits(bound(line[field] for line in lines) / 1e9) for bound in (min, max))
        return lowest if lowest == highest else f"{lowest} to {highest}"

    products, traffic = map(measured, RATES)
    return (
        f"Floor: counted matrix products of the factored algorithm at {products} GFLOP/s, or its traffic at {traffic} "
        "GB/s where that takes longer; rates measured in the same runs."
    )


def redraw(results_dir: str | os.PathLike, readme_path: str | os.PathLike) -> None:
    """Write the README's section between its two marks, and its pictures beside the results, from the results alone.

    Raises:
        InputError: there is no result, a line is broken, or the README has not both marks once and in order.
    """
    readme = Path(readme_path)
    try:
        text = readme.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{readme}: cannot be read ({first_line(error)})") from error
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END not in rest:
        raise InputError(f"{readme}: needs one line {BEGIN} and below it one line {END}")
    lines = load(results_dir)
    pictures = write_pictures(lines, results_dir)
    parts = [section(members, pictures, readme) for members in _grouped(lines, ("device",)).values()]
    with atomic_path(readme) as temporary:
        temporary.write_bytes("\n\n".join([before + BEGIN, *parts, END + after]).encode())


def section(lines: list[Line], pictures: list[Path], readme: Path) -> str:
    """Of one device: its table, the picture of time, links to the others, ours by size and setting, and what all was
    measured with."""
    device, shown, studies = lines[0]["device"], chosen(lines), studies_of(lines)

    def link(content: str) -> str:
        name = picture_path("", device, content).name
        found = [os.path.relpath(path, readme.parent) for path in pictures if path.name == name]
        return f"[{content}]({Path(found[0]).as_posix()})" if found else ""

    more = ", ".join(filter(None, map(link, ("memory", "floor"))))
    picture = link("time").replace("[time]", f"![Time against spots on {device}]")
    studied = [line for members in studies.values() for line in members]
    told = _told(shown, studied) + (f" More pictures: {more}." if more else "")
    bullets = "\n".join(_told_study(field, members) for field, members in studies.items())
    parts = (f"**{device}**", table(*_table_of(shown)), picture, _by_size(shown), bullets, told)
    return "\n\n".join(filter(None, parts))


def largest_of_ours(lines: list[Line]) -> Line | None:
    """Of :func:`chosen` lines, the largest slide of the first workload that ours did; of several, the fastest."""
    mine = [line for line in lines if line["provider"] in OURS and line["median_ms"]]
    main = [line for line in mine if line["workload"] == mine[0]["workload"]]
    return max(main, key=lambda line: (line["spots"], -line["median_ms"]), default=None)


def _by_size(lines: list[Line]) -> str:
    """A table of what ours costs at every size; empty where it was not measured at three."""
    best = largest_of_ours(lines)
    if best is None:
        return ""
    same = [line for line in lines if line["median_ms"] and all(line[field] == best[field] for field in SERIES)]
    if len(same) < NEEDED:
        return ""
    exponents = {quantity: _exponents(same, quantity).values() for quantity in MEASURED}
    time, memory = (", ".join(map(_exponent, exponents[quantity])) for quantity in ("time", "memory"))
    peaks = ["" if line["peak_bytes"] is None else size(line["peak_bytes"]) for line in same]
    rows = [
        ["time", *(seconds(line["median_ms"]) for line in same), time],
        ["per spot", *(seconds(line["median_ms"] / line["spots"]) for line in same), ""],
        ["peak memory", *peaks, memory],
    ]
    head = f"{named(best['provider'])}: {best['workload'].replace('_', ' ')}, spots"
    return table([head, *(f"{line['spots']:,}" for line in same), "exponent of N"], rows)


def studies_of(lines: list[Line]) -> dict[str, list[Line]]:
    """Of one device: per setting that was varied alone, by ours where it did the largest slide, the lines of the
    workload and size at which it had most values; and those of the published code where memory was out."""
    best, found = largest_of_ours(chosen(lines)), {}
    if best is None:
        return {}
    for field in STUDIED:
        fixed = [name for name in SETTING if name != field]
        alike = [line for line in _in_order(lines) if all(line[name] == best[name] for name in fixed)]
        places = _grouped(
            (line for line in alike if line["provider"] == best["provider"] and line["median_ms"]),
            ("workload", "spots"),
        )
        if not places:
            continue
        (workload, spots), members = max(places.items(), key=lambda place: (len(place[1]), -_far(place[0][1])))
        if len(members) > 1:
            published = [
                line
                for line in alike
                if (line["workload"], line["spots"], line["provider"]) == (workload, spots, "eager_stflow")
            ]
            found[field] = members + [line for line in published if out_of_memory(line)]
    return found


def _told_study(field: str, lines: list[Line]) -> str:
    """One bullet."""
    lines = lines if field == "layout" else sorted(lines, key=lambda line: line[field])
    first = next(line for line in lines if line["median_ms"])

    def told(line: Line) -> str:
        value = line[field] if field == "layout" else f"{line[field]:,}"
        return f"{value}: " + ("" if line["median_ms"] else f"{named(line['provider'])} ") + _cell(line)

    what = f"{first['workload'].replace('_', ' ')}, {first['spots']:,} spots, {named(first['provider'])}"
    return f"* {STUDIED[field]} ({what}): " + "; ".join(map(told, lines)) + "."


def _far(spots: int) -> float:
    """From the size at which settings are compared."""
    return abs(math.log(spots / STEADY))


def _table_of(lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a provider a row; time and memory at a few sizes, the exponent, a training step."""
    workload = next(name for name in WORKLOADS if any(line["workload"] == name for line in lines))
    main = [line for line in lines if line["workload"] == workload]
    columns = [(workload, spots) for spots in _sizes({line["spots"] for line in main})]
    if workload != "train_step":
        columns += _training_column(lines)
    exponents = {series[1]: slope for series, slope in _exponents(main, "time").items()}
    rows = []
    for (provider,), members in _grouped(lines, ("provider",)).items():
        found = {(line["workload"], line["spots"]): line for line in members}
        if any(column in found and _tells(found[column]) for column in columns):
            cells = [_cell(found[column]) if column in found else "" for column in columns]
            exponent = _exponent(exponents[provider]) if provider in exponents else ""
            rows.append([named(provider), members[0]["dtype"], *cells, exponent])
    names = [f"{name.replace('_', ' ')}, {spots:,} spots" for name, spots in columns]
    return ["", "arithmetic", *names, f"{workload.replace('_', ' ')}: exponent of N"], rows


def _training_column(lines: list[Line]) -> list[tuple[str, int]]:
    """The size nearest to 10,000 spots, if any was trained."""
    steps = {line["spots"] for line in lines if line["workload"] == "train_step" and line["median_ms"]}
    return [("train_step", _nearest(steps, SHOWN_SIZES[0]))] if steps else []


def _nearest(measured: set[int], wanted: int) -> int:
    return min(measured, key=lambda spots: (abs(math.log(spots / wanted)), spots))


def _tells(line: Line) -> bool:
    """Whether it is a figure, or a failure worth a row."""
    return line["median_ms"] is not None or line["check"] == "red" or bool(out_of_memory(line))


def _cell(line: Line) -> str:
    if line["median_ms"] is None:
        return _why(line)
    return seconds(line["median_ms"]) + ("" if line["peak_bytes"] is None else f", {size(line['peak_bytes'])}")


def _sizes(measured: set[int]) -> list[int]:
    """Those nearest to 10,000, 100,000 and a million spots, within a factor of two; else the three largest."""
    near = [_nearest(measured, wanted) for wanted in SHOWN_SIZES]
    near = [spots for spots, wanted in zip(near, SHOWN_SIZES, strict=True) if 0.5 <= spots / wanted <= 2]
    return sorted(set(near)) or sorted(measured)[-3:]


def _told(lines: list[Line], studied: list[Line]) -> str:
    """The setting of the lines; the load, the code and the date of both; what repeats them."""
    everything = [*lines, *studied]

    def values(field: str) -> str:
        return ", ".join(sorted({str(line[field]) for line in lines}))

    def versions(name: str) -> str:
        return ", ".join(sorted({str(line["versions"][name]) for line in everything if line["versions"].get(name)}))

    names = dict.fromkeys(name for line in everything for name in line["versions"])
    software = ", ".join(f"{name} {versions(name)}" for name in names if versions(name))
    loads = [line["load"] for line in everything if line["load"] is not None]
    load = f"; load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    dates = sorted({line["date"][:10] for line in everything})
    dates = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    other = any(computes_another_function(line["provider"]) for line in lines)
    commits = ", ".join(sorted({line["commit"] for line in everything}))
    rounds = ", ".join(map(str, sorted({line["rounds"] for line in everything if line["rounds"]})))
    return (
        f"Median time of {rounds} calls, without what is made once per slide (ours: neighbours, embedding of the "
        "patches, messages); peak memory above the inputs, with it; in the fastest arithmetic of each. "
        + (f"{OTHER_FUNCTION} computes another function, over all spots or by dot products. " if other else "")
        + f"Layout {values('layout')}; {values('k')} neighbours, {values('genes')} genes; {values('threads')} thread(s)"
        f"{load}. {software}; commit {commits}; {dates}. Again: `{REPEAT}`."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="a .jsonl file or a folder of them")
    parser.add_argument("--readme", type=Path, help="its section is written anew; RESULTS must be a folder")
    options = parser.parse_args(arguments)
    folder = options.results if options.results.is_dir() else options.results.parent
    try:
        lines = load(options.results)
        for members in _grouped(lines, ("device",)).values():
            Console().print(terminal_table(members))
        if options.readme is None:
            written = write_pictures(lines, folder)
            print("\n".join(map(str, written)))
        else:
            redraw(folder, options.readme)
    except InputError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

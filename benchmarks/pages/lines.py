"""Lines of the suite: read and checked, grouped and in order, those that a reader sees, and their exponents."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stflow_fast.errors import InputError, first_line

from ..suite.cases import PRECISION
from ..suite.operations import OPERATIONS
from ..suite.providers import OVER_BUDGET
from ..suite.run import LEFT_OUT
from .looks import LOOKS, digits, size

Line = dict[str, Any]
"""One line of the suite: the figures of one provider on one workload and size."""

SETTING = ("layout", "k", "genes", "dtype")
IDLE = {"busy": 0, "busy_nice": 0}
"""Of a line with nothing beside it, as were all that do not say so."""

NEWER = {"device_ms": None, "device_kernels": None, "floor_ms": None}
"""Of lines from before there were these."""

MACHINE = ("threads", *IDLE)
SERIES = ("workload", "provider", *SETTING, *MACHINE, "device")
KEY = (*SERIES, "spots")
"""What makes two lines the same figure; of such the newest counts."""

NUMBERS = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "device_ms",
    "floor_ms",
    "prepare_ms",
    "compile_s",
    "peak_bytes",
    "spots_per_s",
    "of_floor",
)
FIELDS = (*KEY, *NUMBERS, "arithmetic", "rounds", "alone", "check", "note", "load", "versions", "commit", "date")
RATES = ("peak_flops_per_s", "peak_copy_bytes_per_s")
"""What a share of the floor rests on."""

MEASURED = {"time": "median_ms", "memory": "peak_bytes"}

WORKLOADS = {
    "sample": "Sample of a slide (4 calls of the denoiser)",
    "denoise": "One call of the denoiser",
    "train_step": "Training step",
    "graph": "Graph of the spots",
    "edge_forward": "Edge attention of a layer",
    "edge_backward": "Backward of a layer's edge attention",
    "edge_messages": "Messages of a layer",
    "gated_mlp": "MLP of a layer",
    "gated_mlp_backward": "Backward of a layer's MLP",
    "dropout": "Dropout of tokens",
}
STUDIED = {"genes": "Genes", "k": "Neighbours", "layout": "Layout"}
"""Settings that may be varied, each alone, and how a reader meets them."""

STEADY = 10_000
"""Spots from which on the fixed cost of a call no longer bends a slope."""

PUBLISHED = {**dict.fromkeys(WORKLOADS, "eager_stflow"), "graph": "dense_cdist"}
"""What the published code does in a workload."""

NEEDED = 3
"""Sizes without which there is no slope."""

SPREAD_CALLS = 5
"""Without so many there are no percentiles to show."""

REPEAT, REPEAT_ON_GPU = "make bench", "make gpu"


def load(path: str | os.PathLike[str]) -> list[Line]:
    """The :func:`newest` of :func:`history`."""
    return newest(history(path))


def history(path: str | os.PathLike[str]) -> list[Line]:
    """The suite's lines of a .jsonl file, or of those of a folder that are the suite's.

    A last line that an interruption cut off is left out, which is said on standard error.

    Raises:
        InputError: a line is broken, or there is no result.
    """
    path = Path(path)
    found = [line for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path]) for line in read(file)]
    if not found:
        raise InputError(f"{path}: holds no results of the benchmark suite; make some with `{REPEAT}`")
    return found


def newest(lines: Iterable[Line]) -> list[Line]:
    """One line of each figure.

    One that was left out for the time or the memory that it would take says nothing new of a figure that was measured
    before.
    """
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        key = tuple(line[field] for field in KEY)
        if key not in found or _standing(line) >= _standing(found[key]):
            found[key] = line
    return list(found.values())


def _standing(line: Line) -> tuple[bool, str]:
    """Dates are ISO and UTC: their order is that of their text."""
    refused = line["note"].startswith(LEFT_OUT) or OVER_BUDGET in line["note"]
    return not refused, line["date"]


def read(file: Path) -> list[Line]:
    """The lines of a file in their order; none where its first line is not the suite's. Raises InputError as
    :func:`history`."""
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
    return {**IDLE, **NEWER, **line}


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
    for field in MACHINE:
        if type(line[field]) is not int:
            raise InputError(f"{place}: {field} must be a whole number, not {line[field]!r}; remove the line")
    if line["of_floor"] and not all(line.get(rate) for rate in RATES):
        raise InputError(f"{place}: of_floor needs {' and '.join(RATES)}; remove the line")


def grouped(lines: Iterable[Line], fields: tuple[str, ...]) -> dict[tuple[Any, ...], list[Line]]:
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[field] for field in fields), []).append(line)
    return groups


def in_order(lines: Iterable[Line]) -> list[Line]:
    """By workload, size and provider, each in the order of its list; idle before busy."""
    workloads, providers = list(WORKLOADS), list(LOOKS)

    def place(names: list[str], name: str) -> int:
        return names.index(name) if name in names else len(names)

    def key(line: Line) -> tuple[Any, ...]:
        provider, dtype = place(providers, line["provider"]), place(list(PRECISION), line["dtype"])
        machine = (line[field] for field in MACHINE)
        return place(workloads, line["workload"]), line["spots"], provider, dtype, *machine

    return sorted(lines, key=key)


def chosen(lines: Iterable[Line]) -> list[Line]:
    """Of one device, what tables and pictures for a reader show, in order. Single operations are for who works on them:
    the terminal's table has them, and the page of ``make gpu``.

    Per workload the layout, K and genes that were measured most, in all workloads where two are equal, since the others
    are studies beside it; per provider its fastest arithmetic. Of an idle machine, and the number of threads that was
    measured most.
    """
    whole = (line for line in lines if not line["busy"] and line["workload"] not in OPERATIONS)
    by_threads = grouped(whole, ("threads",)).values()
    most: list[Line] = max(by_threads, key=len, default=[])
    lines, kept = in_order(most), []
    often = {setting: len(members) for setting, members in grouped(lines, tuple(STUDIED)).items()}
    for members in grouped(lines, ("workload",)).values():
        groups = grouped(members, tuple(STUDIED))
        kept += groups[max(groups, key=lambda setting: (len(groups[setting]), often[setting]))]
    fastest = {provider: _fastest(members) for (provider,), members in grouped(kept, ("provider",)).items()}
    return [line for line in kept if line["dtype"] == fastest[line["provider"]]]


def _fastest(lines: list[Line]) -> str:
    """The dtype with the least time at the first workload's largest size; the first where none ran."""
    done = [line for line in lines if line["median_ms"]]
    if not done:
        return str(lines[0]["dtype"])
    same = [line for line in done if line["workload"] == done[0]["workload"]]
    largest = max(line["spots"] for line in same)
    fastest = min((line for line in same if line["spots"] == largest), key=lambda line: line["median_ms"])
    return str(fastest["dtype"])


def run_of(line: Line) -> tuple[Any, ...]:
    """What two lines must share to be compared: the work, the machine with what keeps it busy, the code, its threads,
    and the run, of which all lines have one date; and turns, which one that was measured alone shares with nobody."""
    same = (line[field] for field in ("workload", *SETTING, "device", "spots", *MACHINE, "commit", "date"))
    return (*same, line["alone"] and line["provider"])


def published_times(lines: Iterable[Line]) -> dict[tuple[Any, ...], float]:
    """By :func:`run_of`, milliseconds of the published code."""
    return {
        run_of(line): line["median_ms"]
        for line in lines
        if line["provider"] == PUBLISHED[line["workload"]] and line["median_ms"]
    }


def ratio_of(line: Line, published: dict[tuple[Any, ...], float], extra_ms: float = 0.0) -> float | None:
    """How many times as fast as the published code in the same run, of :func:`published_times`, where it is known.
    ``extra_ms`` are added to the line's time."""
    theirs = published.get(run_of(line))
    return theirs / (line["median_ms"] + extra_ms) if theirs and line["median_ms"] else None


def times_as_fast(line: Line, published: dict[tuple[Any, ...], float], extra_ms: float = 0.0) -> str:
    """:func:`ratio_of` as "4.79x"; empty where it is not known."""
    ratio = ratio_of(line, published, extra_ms)
    return f"{digits(ratio)}x" if ratio else ""


def idle_times(lines: Iterable[Line]) -> dict[tuple[Any, ...], float]:
    """Milliseconds on an idle machine, by figure and code."""
    return {_idle_of(line): line["median_ms"] for line in lines if not line["busy"] and line["median_ms"]}


def _idle_of(line: Line) -> tuple[Any, ...]:
    return (*((line | IDLE)[field] for field in KEY), line["commit"])


def times_idle(line: Line, idle: dict[tuple[Any, ...], float]) -> str:
    """How many times its own of :func:`idle_times` the time beside busy processes is: "2.31x"; empty where nothing was
    beside it, or the other is not known."""
    own = idle.get(_idle_of(line))
    return f"{digits(line['median_ms'] / own)}x" if line["busy"] and line["median_ms"] and own else ""


def out_of_memory(line: Line) -> str:
    """What a provider lacked, in few words; empty where it lacked no memory."""
    over = re.search(rf"needs ([\d,.]+) GiB{OVER_BUDGET}", line["note"])
    if over is None:
        return "out of memory" if "out of memory" in line["note"] else ""
    return f"needs {size(float(over[1].replace(',', '')) * 2**30)}"


def first_out_of_memory(lines: Iterable[Line]) -> Line | None:
    """The first that memory did not hold: of one provider's in the order of their sizes, the smallest."""
    return next((line for line in lines if line["median_ms"] is None and out_of_memory(line)), None)


def why_not_timed(line: Line) -> str:
    """Why there is no time, in few words."""
    return "red check" if line["check"] == "red" else out_of_memory(line) or "not run"


def slopes(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Exponents of time and memory in the spots, by least squares on logarithms, of series with three sizes or more.

    Returns: per series (:data:`SERIES`), quantity and start: ``quantity`` (``"time"`` or ``"memory"``), ``exponent``,
        ``points``, ``least`` and ``most`` spots, ``over`` (``"all sizes"`` or ``"from 10,000 spots on"``).
    """
    found = []
    for series, members in grouped(lines, SERIES).items():
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


def exponents_of(lines: Iterable[Line], quantity: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Per series its slope; the one from 10,000 spots on where there is one, which comes second."""
    return {tuple(slope[field] for field in SERIES): slope for slope in slopes(lines) if slope["quantity"] == quantity}


def told_exponent(slope: dict[str, Any]) -> str:
    """With the sizes that it was fitted to."""
    return f"{slope['exponent']:.2f} ({slope['least']:,} to {slope['most']:,})"

"""Pictures of lines: time and memory against spots, and shares of the floor."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import offset_copy

from stflow_fast.files import atomic_path

from ..suite.measure import file_name
from .lines import (
    MEASURED,
    RATES,
    SERIES,
    SPREAD_CALLS,
    WORKLOADS,
    Line,
    chosen,
    exponents_of,
    first_out_of_memory,
    grouped,
    in_order,
    out_of_memory,
    told_exponent,
)
from .looks import OTHER_FUNCTION, Look, computes_another_function, digits, look_of, named

DPI = 150
SOFT = "#555555"
CROSS = "out of memory"
"""What the crosses of a picture are found by."""


def write_pictures(lines: Iterable[Line], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw, per device, time and memory against spots, and the share of the floor where it is known.

    Raises:
        InputError: a picture cannot be written.
    """
    figures: dict[Path, Figure] = {}
    for (device,), members in grouped(lines, ("device",)).items():
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


def picture_path(folder: str | os.PathLike[str], device: str, content: str) -> Path:
    return Path(folder) / f"{file_name(device)}-{content}.png"


def scaling_figure(lines: Iterable[Line], quantity: str) -> Figure:
    """Time or memory against spots on one device, one panel per workload.

    A cross behind the end of a line, or at the bottom where there is none, says that memory did not hold the next size.
    """
    lines = chosen(lines)
    groups = {name: members for (name,), members in grouped(lines, ("workload",)).items()}
    groups = {name: members for name, members in groups.items() if any(line[MEASURED[quantity]] for line in members)}
    # One size alone is no line; a table says it better.
    several = {name: members for name, members in groups.items() if len({line["spots"] for line in members}) > 1}
    groups = several or groups
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    entries = max(map(_legend_rows, groups.values()))
    shape = (4.9 * columns if columns > 1 else 6.5, rows * (3.4 + 0.17 * entries) + 0.7)
    figure = Figure(figsize=shape, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.08, h_pad=0.08)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (workload, members) in zip(panels, groups.items(), strict=False):
        _draw_panel(axes, members, quantity)
        setting = f"{members[0]['layout']}, K = {members[0]['k']}"
        genes = "" if workload == "graph" else f", {members[0]['genes']} genes"
        axes.set_title(f"{WORKLOADS[workload]}\n{setting}{genes}", fontsize=10, loc="left")
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    title = {"time": "Time", "memory": "Peak memory above the inputs"}[quantity]
    figure.suptitle(textwrap.fill(f"{title}, {lines[0]['device']}", int(9 * shape[0])), fontsize=12)
    figure.supxlabel(textwrap.fill(_footnote(lines, quantity), int(13 * shape[0])), fontsize=8.5, color=SOFT)
    return figure


def _legend_rows(lines: list[Line]) -> int:
    """Two of a provider with a cross."""
    return sum(2 if first_out_of_memory(series) else 1 for series in grouped(lines, ("provider",)).values())


def _footnote(lines: list[Line], quantity: str) -> str:
    called = max((line["rounds"] or 0 for line in lines), default=0)
    parts = ["Band: 20th to 80th percentile."] if quantity == "time" and called >= SPREAD_CALLS else []
    parts.append("Exponents of N, in brackets the spots that they are fitted to.")
    if first_out_of_memory(lines):
        parts.append("X behind a line: memory does not hold the size in the legend.")
    if any(computes_another_function(line["provider"]) for line in lines):
        parts.append(f"{OTHER_FUNCTION} another function.")
    return " ".join(parts)


def _draw_panel(axes: Axes, lines: list[Line], quantity: str) -> None:
    exponents = exponents_of(lines, quantity)
    same = len({line["arithmetic"] for line in lines}) == 1
    axes.set(xscale="log", yscale="log")
    for (provider,), members in grouped(lines, ("provider",)).items():
        slope = exponents.get(tuple(members[0][field] for field in SERIES))
        label = named(provider) + ("" if same else f", {members[0]['arithmetic']}")
        _draw_series(axes, members, quantity, label + ("" if slope is None else f", N^{told_exponent(slope)}"))
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
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (-0.12, -0.17), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=8.5, labelspacing=0.25, handlelength=1.8, **place)


def _draw_series(axes: Axes, lines: list[Line], quantity: str, label: str) -> None:
    """One provider's line with its cross, both named in the legend; nothing of a provider that does not run here."""
    field, look = MEASURED[quantity], look_of(lines[0]["provider"])
    done = [line for line in lines if line[field]]
    failed = first_out_of_memory(lines)
    if not (done or failed):
        return
    if failed:
        label += f",\nX {failed['spots']:,}: {out_of_memory(failed)}"
    spots, values = [line["spots"] for line in done], [line[field] for line in done]
    face = look.color if look.stroke == "-" else "none"
    style: dict[str, Any] = {"marker": look.marker, "markerfacecolor": face, "markersize": 5.5, "linewidth": 1.5}
    axes.plot(spots, values, color=look.color, linestyle=look.stroke, label=label, **style)
    if quantity == "time" and done and min(line["rounds"] for line in done) >= SPREAD_CALLS:
        low, high = zip(*((line["p20_ms"], line["p80_ms"]) for line in done), strict=True)
        if None not in (*low, *high):
            axes.fill_between(spots, low, high, color=look.color, alpha=0.18, linewidth=0)
    if failed:
        _draw_cross(axes, look, (spots[-1], values[-1]) if done else (failed["spots"], None))


def _draw_cross(axes: Axes, look: Look, place: tuple[int, float | None]) -> None:
    spots, value = place
    # Behind the last point and not on it: that one was measured.
    behind = offset_copy(axes.transData, cast(Figure, axes.figure), x=10, units="points")
    where: dict[str, Any] = {"transform": axes.get_xaxis_transform() if value is None else behind}
    style: dict[str, Any] = {"marker": "X", "markersize": 9, "markeredgecolor": "white", "markeredgewidth": 0.6}
    height = 0.03 if value is None else value
    axes.plot(
        [spots], [height], color=look.color, linestyle="none", zorder=4, clip_on=False, gid=CROSS, **style, **where
    )


def floor_figure(lines: list[Line]) -> Figure:
    """How much of the time the floor is; 100 % cannot be beaten. Of lines that know it: per workload the largest size
    that every series has, or the largest of each.
    """
    rows = []
    for members in grouped(in_order(lines), ("workload",)).values():
        every = list(grouped(members, SERIES).values())
        common = set.intersection(*({line["spots"] for line in series} for series in every))
        for series in every:
            rows += [max((line for line in series if not common or line["spots"] in common), key=lambda x: x["spots"])]
    figure = Figure(figsize=(9.0, 0.3 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    shares = [100 * line["of_floor"] for line in rows]
    axes.barh(range(len(rows)), shares, height=0.7, color=[look_of(line["provider"]).color for line in rows])
    for row, share in enumerate(shares):
        axes.text(share + 1, row, f"{share:.0f} %", va="center", fontsize=9)
    names = [f"{line['workload']}, {named(line['provider'])}, {line['arithmetic']}, {line['spots']:,}" for line in rows]
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
        lowest, highest = (digits(bound(line[field] for line in lines) / 1e9) for bound in (min, max))
        return lowest if lowest == highest else f"{lowest} to {highest}"

    products, traffic = map(measured, RATES)
    return (
        f"Floor: counted matrix products of the factored algorithm at {products} GFLOP/s, or its traffic at {traffic} "
        "GB/s where that takes longer; rates measured in the same runs."
    )

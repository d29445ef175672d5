"""The README's picture: a gene of the demo's test slide, measured and predicted, and time against spots.

python -m benchmarks overview DEMO [--out benchmarks/results/overview.png]

DEMO is the folder of ``stflow-fast demo``. Times are the lines in benchmarks/results; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import anndata
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from stflow_fast.evaluation import score
from stflow_fast.report.looks import SOFT, save
from stflow_fast.report.maps import box_of, draw_spots, spot_diameter
from stflow_fast.synthetic import make_cohort

from ..pages import RESULTS
from ..pages.lines import Line, chosen, first_out_of_memory, load
from ..pages.looks import look_of

GENE = "KRT8"

SERIES = (
    ("amd-epyc-2-cores", "eager_stflow", "float32", "published, two CPU cores"),
    ("amd-epyc-2-cores", "reference", "float32", "stflow-fast, two CPU cores"),
    ("nvidia-h200", "eager_stflow", "tf32", "published, NVIDIA H200, tf32"),
    ("nvidia-h200", "triton_graph", "bf16", "stflow-fast, NVIDIA H200, bf16"),
)
"""Device, provider, arithmetic and how the picture calls them."""


def draw(demo: Path, out: Path) -> None:
    """Three panels in a row, as PNG."""
    figure = Figure(figsize=(13.0, 4.3))
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    measured, predicted, times = figure.subplots(1, 3, width_ratios=(1, 1, 1))
    _draw_gene(demo, measured, predicted)
    draw_times(times)
    note = "The slide is synthetic. Each map has its own colour scale, from its 1st to its 99th percentile."
    figure.text(0.01, 0.03, note, fontsize=9, color=SOFT)
    save(figure, out)


def _draw_gene(demo: Path, measured: Axes, predicted: Axes) -> None:
    slide = make_cohort(seed=json.loads((demo / "demo.json").read_text())["seed"]).test[0]
    table = anndata.read_h5ad(demo / "predictions" / f"{slide.id}.h5ad")
    truth = slide.expression((GENE,), table.uns["stflow_fast"]["normalize"])
    made = np.asarray(table[:, [GENE]].X)
    pearson = score(truth, made, (GENE,))["pearson_mean"]
    diameter = spot_diameter(slide.coords)
    box = box_of(slide.coords, 0.7 * diameter, with_strip=False)
    titles = (f"{GENE}, measured, {slide.n_spots:,} spots", f"{GENE}, predicted: Pearson {pearson:.2f}")
    for axes, values, title in zip((measured, predicted), (truth, made), titles, strict=True):
        draw_spots(axes, slide.coords, values[:, 0], diameter, box, "log1p counts")
        axes.set_title(title, fontsize=11)


def draw_times(axes: Axes) -> None:
    for device, provider, arithmetic, name in SERIES:
        lines = [line for line in chosen(load(RESULTS / f"{device}.jsonl")) if _is_shown(line, provider)]
        timed = [line for line in lines if line["arithmetic"] == arithmetic and line["median_ms"]]
        places = sorted((line["spots"], line["median_ms"] / 1e3) for line in timed)
        spots, seconds = zip(*places, strict=True)
        look, stroke = look_of(provider), "-" if "CPU" in name else "--"
        axes.plot(spots, seconds, color=look.color, linestyle=stroke, marker=look.marker, markersize=5, label=name)
        if lacking := first_out_of_memory(lines):
            told = f"{lacking['spots']:,} spots: out of memory"
            # Above the end of a line, which would run through it; beside a point.
            offset, side = ((5, 7), "right") if len(places) > 1 else ((8, -3), "left")
            axes.annotate(
                told, places[-1], xytext=offset, textcoords="offset points", ha=side, color=look.color, fontsize=8.5
            )
    axes.set(xscale="log", yscale="log", ylim=(None, 2e3), xlabel="spots of the slide", ylabel="seconds of a sample")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_title("Time against spots", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.42, -0.16))


def _is_shown(line: Line, provider: str) -> bool:
    setting = (line["workload"], line["layout"], line["k"], line["genes"])
    return line["provider"] == provider and setting == ("sample", "visium", 8, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "overview.png")
    arguments = parser.parse_args()
    draw(arguments.demo, arguments.out)

"""What a person sees of a result: tables for the terminal, pictures, and a web page that needs no network."""

from __future__ import annotations

import base64
import html
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .errors import InputError
from .evaluation import check_biomarkers, score
from .files import atomic_path
from .priors.observation import ObservationModel
from .slides import Slide
from .slides.places import spacing
from .windows import NOTHING, selection_words

MODEL_NAME = "stflow-fast"
DPI = 150
PANEL = (3.9, 5.5)  # inches: width of a map, and its largest height
SCALE_BAR_STRIP = 0.34  # inches
MODEL_COLOR, PLAIN_COLOR, ACCENT_COLOR, SOFT = "#0072b2", "#5f6b6d", "#b87400", "#555555"
LABELS = {
    "train_mean": "train mean",
    "hest_ridge": "HEST ridge",
    "ridge_alpha_1e4": "ridge alpha 1e4",
    "ridge": "ridge",
    "ridge_smoothed": "ridge, smoothed",
    "ridge_neighbors": "ridge, neighbours",
    "depth_oracle": "depth oracle",
    "shuffled_spots": "spots shuffled",
}
"""How a reader meets the baselines of :func:`stflow_fast.evaluation.baselines`, and the demo's control."""

CONSTANT_NOTE = "const: genes without Pearson, truth or prediction being the same everywhere."
CERTAINTY_KEYS = ("crps_mean", "coverage_50", "coverage_90", "spread_ratio")
CERTAINTY_NOTE = (
    "CRPS: the lower the better. in 50 %, 90 %: share of the truth within such intervals of the draws, "
    "where it ties with draws by its share. spread: of the draws, over the error of their mean. neighbourhoods: "
    "the same of the means over each spot and its nearest."
)
UNITS = {"log1p": "log1p counts", "cp10k_log1p": "log1p counts per 10,000"}
ORACLE_NOTE = "depth oracle: reads the true total count of each test spot, nothing else."
_COMPACT: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 0, 0, 1), "pad_edge": False}  # fits 80 columns


def results_table(result: Mapping[str, Any], model: str = MODEL_NAME) -> Table:
    """The model's scores, then those of the baselines.

    Args:
        result: from :func:`stflow_fast.evaluation.compare` (or ``score``: then the model alone).
        model: the name to give the first row.
    """
    baselines = result.get("baselines", {})
    notes = (CONSTANT_NOTE, ORACLE_NOTE if "depth_oracle" in baselines else "", _selection(result))
    table = Table(
        title=f"{result['n_genes']} genes, {result['n_spots']:,} spots",
        caption="\n".join(filter(None, notes)),
        caption_justify="left",
        **_COMPACT,
    )
    table.add_column("predictor", no_wrap=True)
    for column in ("Pearson", "std", "q1", "median", "q3", "MSE", "R2", "const"):
        table.add_column(column, justify="right")
    keys = [f"pearson_{part}" for part in ("mean", "std", "q1", "q2", "q3")] + ["mse_mean", "r2_mean"]
    for name, scores in {model: result, **baselines}.items():
        row = (*(_number(scores[key]) for key in keys), str(scores["n_constant_genes"]))
        table.add_row(Text(LABELS.get(name, name)), *row, style="bold" if scores is result else None)
    return table


def biomarker_table(result: Mapping[str, Any], names: Sequence[str], model: str = MODEL_NAME) -> Table:
    """Pearson of single genes, the model beside the baselines that have one, and the model's MSE and R2.

    Raises:
        InputError: as :func:`.evaluation.check_biomarkers`.
    """
    baselines = result.get("baselines", {})
    scored = {key: _by_gene(scores) for key, scores in baselines.items() if scores["pearson_mean"] is not None}
    own = _by_gene(result)
    check_biomarkers(names, tuple(own))
    table = Table(
        title="Pearson of chosen genes", caption=_selection(result) or None, caption_justify="left", **_COMPACT
    )
    table.add_column("gene")
    for column in (model, *(LABELS.get(key, key) for key in scored), "MSE", "R2"):
        table.add_column(Text(column), justify="right")
    for name in names:
        others = (_number(genes[name]["pearson"]) for genes in scored.values())
        gene = own[name]
        table.add_row(Text(name), _number(gene["pearson"]), *others, _number(gene["mse"]), _number(gene["r2"]))
    return table


def hotspot_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """What :func:`.cohort.evaluate.of_biomarkers` says of chosen genes."""
    chance = next(iter(found.values()))["top_chance"]
    caption = (
        "highest tenth: share of the tenth of a slide's spots where the gene is highest that is among the tenth where "
        f"it is predicted to be; by chance {chance:.3f}. interval: of 90 %, its mean width and how often it holds "
        "the truth; of a model that calibrate has treated."
    )
    look = {"caption": caption, "caption_justify": "left", "min_width": 76, **_COMPACT}
    table = Table(title="Where chosen genes are high", **look)
    table.add_column("gene")
    for column in ("highest tenth", "interval", "holds"):
        table.add_column(column, justify="right")
    for name, told in found.items():
        keys = ("top_overlap", "interval_width", "interval_coverage")
        table.add_row(Text(name), *(_number(told.get(key)) for key in keys))
    return table


def certainty_table(result: Mapping[str, Any], model: str = MODEL_NAME) -> Table:
    """How much the draws of the model, and of the baselines that have some, are worth.

    Args:
        result: with ``certainty``, as :func:`stflow_fast.evaluate` gives it of a model with an observation model.
    """
    table = Table(title="Certainty", caption=CERTAINTY_NOTE, caption_justify="left", min_width=76, **_COMPACT)
    table.add_column("predictor", no_wrap=True)
    for column in ("CRPS", "in 50 %", "in 90 %", "spread"):
        table.add_column(column, justify="right")
    for name, found in _certainties(result, model).items():
        row = (_number(found[key]) for key in CERTAINTY_KEYS)
        table.add_row(Text(name), *row, style="bold" if name.startswith(model) else None)
    return table


def protocol_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> Table:
    """One of :mod:`stflow_fast.protocol`, with what a reader must know below it."""
    look = {"caption": "\n".join(notes), "caption_justify": "left", "min_width": 76, **_COMPACT}
    table = Table(title=title, **look)
    table.add_column(head[0], no_wrap=True)
    for column in head[1:]:
        table.add_column(Text(column), justify="right")
    for name, *cells in lines:
        table.add_row(Text(LABELS.get(name, name)), *cells)
    return table


def observation_table(observation: ObservationModel) -> Table:
    """What the laws reached on groups of slides that they were not fitted on; the one that is kept first."""
    about, shared = observation.about, observation.shared
    title = f"Law of x_1 around the mean: {observation.law.name} ({about['spots']:,} spots, {about['groups']} groups)"
    slide, near, reach = shared.field
    common = (
        f"Errors of a spot's genes have one part in common, on average {np.square(shared.loading).mean():.0%} of their "
        f"variance; of that, {slide:.0%} is the same all over a slide, and {near:.0%} reaches {reach:.1f} spots far."
    )
    look = {"caption": f"{CERTAINTY_NOTE}\n{common}", "caption_justify": "left", "min_width": 76, **_COMPACT}
    table = Table(title=title, **look)
    table.add_column("law", no_wrap=True)
    for column in ("CRPS", "in 50 %", "in 90 %", "spread"):
        table.add_column(column, justify="right")
    for name, found in sorted(about["out_of_fold"].items(), key=lambda each: each[1]["crps_mean"]):
        table.add_row(name, *(_number(found[key]) for key in CERTAINTY_KEYS))
    return table


def _certainties(result: Mapping[str, Any], model: str) -> dict[str, Mapping[str, Any]]:
    """What :func:`.evaluation.certainty` says of the model and of the baselines that have draws, by what those are
    called."""
    labels = {**LABELS, "train_mean": "random training spots"}
    baselines = {labels.get(name, name): each.get("certainty") for name, each in result.get("baselines", {}).items()}
    neighborhoods, n_genes = result.get("certainty_of_neighborhoods", {}), len(result.get("genes", ()))
    looked_at = neighborhoods.get("n_genes", n_genes)
    called = f"{model}, neighbourhoods" + (f" ({looked_at} genes)" if looked_at < n_genes else "")
    of_model = {model: result.get("certainty"), called: neighborhoods}
    return {name: found for name, found in {**of_model, **baselines}.items() if found}


def reliability(path: str | os.PathLike, result: Mapping[str, Any], model: str = MODEL_NAME) -> None:
    """Draw how often the truth lies within central intervals, against how often it should, as PNG.

    Args:
        result: with ``certainty``.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle=":", label="as it should be")
    for name, found in _certainties(result, model).items():
        nominal, observed = zip(*found["reliability"], strict=True)
        color, line = (MODEL_COLOR, "-" if name == model else "--") if name.startswith(model) else (PLAIN_COLOR, "-")
        style = {"color": color, "linestyle": line, "marker": "o", "markersize": 4}
        axes.plot(np.multiply(nominal, 100), np.multiply(observed, 100), label=name, **style)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes.set_xlabel("central interval of the draws, %")
    axes.set_ylabel("spots and genes whose truth is within, %\n(a truth that ties with draws by its share)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    _save(figure, path)


def _selection(result: Mapping[str, Any]) -> str:
    """What the model's epoch was chosen on: every table and picture of a result says it. Empty where it is unknown."""
    chosen = result.get("selected_on", "unknown")
    return "" if chosen == "unknown" else f"{MODEL_NAME}: {selection_words(chosen)}."


def _by_gene(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {gene["name"]: gene for gene in scores["genes"]}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def pick_genes(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """The genes with the best, the median (of an even number, the better middle one) and the worst Pearson.

    Raises:
        InputError: no gene has a Pearson correlation, since truth or prediction is constant for all.
    """
    defined = [gene for gene in result["genes"] if gene["pearson"] is not None]
    if not defined:
        n = len(result["genes"])
        raise InputError(f"genes: all {n} are constant in truth or prediction; there is no best one")
    ordered = sorted(defined, key=lambda gene: -gene["pearson"])
    return ordered[0]["name"], ordered[(len(ordered) - 1) // 2]["name"], ordered[-1]["name"]


def evaluation_pictures(
    folder: str | os.PathLike,
    result: Mapping[str, Any],
    slides: Sequence[Slide],
    truth: Sequence[np.ndarray],
    predicted: Sequence[np.ndarray],
    biomarkers: Sequence[str] = (),
) -> list[Path]:
    """Draw ``scores.png`` and, per slide, ``maps_ID.png`` of the best, median and worst gene of all slides and
    ``biomarkers_ID.png``, if any are named; ``reliability.png`` where the result has ``certainty``.

    Args:
        folder: where they go.
        result: from :func:`stflow_fast.evaluation.compare`; its ``normalize``, where present, names the unit.
        slides: the test slides; truth, predicted: [N_i, G] of each, genes as in the result.

    Returns: the pictures; without maps where no gene has a Pearson.
    """
    written = [Path(folder) / "scores.png"]
    score_bars(written[0], result)
    if "certainty" in result:
        written.append(Path(folder) / "reliability.png")
        reliability(written[-1], result)
    order = [gene["name"] for gene in result["genes"]]
    unit = UNITS.get(result.get("normalize", "log1p"), result.get("normalize", "log1p"))
    panels = {}
    if result["pearson_mean"] is not None:
        panels["maps"] = (
            pick_genes(result),
            ("best", "median", "worst"),
            f"best, median and worst of {len(order)} genes",
        )
    if biomarkers:
        panels["biomarkers"] = (tuple(biomarkers), (), f"{len(biomarkers)} chosen of {len(order)} genes")
    for kind, (names, labels, what) in panels.items():
        columns = [order.index(name) for name in names]
        for slide, measured, made in zip(slides, truth, predicted, strict=True):
            measured, made = measured[:, columns], made[:, columns]
            pearsons = [gene["pearson"] for gene in score(measured, made, names)["genes"]]  # of this slide alone
            title = "\n".join(filter(None, (f"{slide.id}: {slide.n_spots:,} spots, {what}", _selection(result))))
            written.append(Path(folder) / f"{kind}_{slide.id}.png")
            size = slide.micron_per_pixel
            gene_maps(written[-1], slide.coords, measured, made, names, pearsons, title, size, labels, unit)
    return written


def gene_maps(
    path: str | os.PathLike,
    slide_coords: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    names: Sequence[str],
    pearsons: Sequence[float | None],
    title: str,
    micron_per_pixel: float | None = None,
    labels: Sequence[str] = ("best", "median", "worst"),
    unit: str = "log1p counts",
) -> None:
    """Draw truth beside prediction on the tissue, one row per gene, as PNG.

    Each panel has its own colour scale, from its 1st to its 99th percentile: a prediction varies less than
    noisy counts do, and on a shared scale its pattern would vanish. The colour bars say how much less.

    Args:
        slide_coords: [N, 2] spot centres (x, y) in pixels; y points down as in an image.
        truth, prediction: [N, G'] expression.
        names, pearsons: the G' genes to draw and their correlations, None where there is none.
        micron_per_pixel: when known, a scale bar is drawn.
        labels: what the first rows are, such as best, median and worst; () for none.
        unit: of truth and prediction.

    Raises:
        InputError: shapes disagree, or the file cannot be written.
    """
    coords, truth, prediction = np.asarray(slide_coords), np.asarray(truth), np.asarray(prediction)
    expected = (len(coords), len(names))
    shapes_agree = truth.shape == prediction.shape == expected and len(pearsons) == len(names)
    if not (shapes_agree and truth.size):
        raise InputError(
            f"gene_maps: {len(coords)} spots and {len(names)} genes need as many correlations, truth and "
            f"prediction of shape {list(expected)}, not {list(truth.shape)} and {list(prediction.shape)}"
        )
    diameter = _spot_diameter(coords)
    box = _box(coords, 0.7 * diameter, with_strip=micron_per_pixel is not None)
    panel_height = float(np.clip(PANEL[0] * (box[3] - box[2]) / (box[1] - box[0]), 1.6, PANEL[1]))
    size = (2 * PANEL[0] + 1.8, len(names) * (panel_height + 0.35) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(len(names), 2, squeeze=False)
    for row, (name, pearson) in enumerate(zip(names, pearsons, strict=True)):
        label = f"{labels[row]}: " if row < len(labels) else ""
        correlation = "Pearson undefined" if pearson is None else f"Pearson {pearson:.2f}"
        captions = (f"{label}{name}, measured", f"{name}, predicted: {correlation}")
        for axes, values, caption in zip(panels[row], (truth[:, row], prediction[:, row]), captions, strict=True):
            _draw_spots(axes, coords, values, diameter, box, unit)
            axes.set_title(caption, fontsize=11)
    if micron_per_pixel is not None:
        _draw_scale_bar(panels[-1, 0], box, micron_per_pixel)
    note = "Each panel has its own colour scale, from its 1st to its 99th percentile."
    figure.supxlabel(note, fontsize=9, color=SOFT)
    _save(figure, path)


def _spot_diameter(coords: np.ndarray) -> float:
    """In pixels: neighbours of a hexagonal lattice just overlap, and spots stay visible."""
    extent = float(np.ptp(coords, axis=0).max())
    return max(1.16 * (spacing(coords) or max(extent, 1.0)), extent / 500)


def _box(coords: np.ndarray, margin: float, with_strip: bool) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a panel in pixels, with a strip under the tissue for the scale bar."""
    (left, top), (right, bottom) = coords.min(axis=0) - margin, coords.max(axis=0) + margin
    strip = SCALE_BAR_STRIP * max((right - left) / PANEL[0], (bottom - top) / PANEL[1])
    return left, right, top, bottom + strip * with_strip


def _draw_spots(
    axes: Axes, coords: np.ndarray, values: np.ndarray, diameter: float, box: tuple[float, ...], unit: str
) -> None:
    low, high = np.percentile(values, (1, 99))
    if high <= low:
        low, high = float(values.min()), float(values.max())
    place = {"units": "xy", "offsets": coords, "offset_transform": axes.transData}
    look = {"array": values, "cmap": "magma", "linewidths": 0}
    spots = EllipseCollection([diameter], [diameter], [0.0], **place, **look)
    spots.set_clim(*((low, high) if high > low else (low - 0.5, low + 0.5)))
    axes.add_collection(spots)
    axes.set(xlim=box[:2], ylim=(box[3], box[2]), xticks=[], yticks=[], aspect="equal")
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#eef0f2")
    bar = axes.figure.colorbar(spots, ax=axes, shrink=0.8, aspect=22, pad=0.02)
    bar.set_label(unit, fontsize=10)
    bar.locator = MaxNLocator(5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=9)


def _draw_scale_bar(axes: Axes, box: tuple[float, ...], micron_per_pixel: float) -> None:
    width = (box[1] - box[0]) * micron_per_pixel / 1000  # of the panel, in mm
    length = _round_length(width / 4)
    pixels = length * 1000 / micron_per_pixel
    gap = 0.03 * (box[1] - box[0])
    y = box[3] - gap
    axes.plot([box[0] + gap, box[0] + gap + pixels], [y, y], color="black", linewidth=3, solid_capstyle="butt")
    axes.text(box[0] + 2 * gap + pixels, y, f"{length:g} mm", ha="left", va="center_baseline", fontsize=10)


def _round_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, ... (times a power of ten) that is no longer than ``most``."""
    power = 10.0 ** np.floor(np.log10(most))
    return float(f"{max(step for step in (1, 2, 5) if step * power <= most * (1 + 1e-9)) * power:g}")


def training_curves(
    path: str | os.PathLike, records: Sequence[Mapping[str, Any]], selected_on: str = "validation"
) -> None:
    """Draw loss and Pearson over epochs, with the chosen epoch marked, as PNG.

    Args:
        records: one dict per epoch: ``epoch, train_loss, selection_mse, selection_pearson, best``. A value may be None
            or absent where it was not measured. The last record whose ``best`` is true is the chosen epoch.
        selected_on: the spots on which ``selection_*`` were measured and the epoch chosen; "nothing" draws the loss
            alone.

    Raises:
        InputError: there is no record, or the file cannot be written.
    """
    if not records:
        raise InputError("training_curves: no epochs recorded")
    scored = selected_on != NOTHING
    figure = Figure(figsize=(7.5, 5.8 if scored else 3.4), layout="constrained")
    panels = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    label = textwrap.fill(selected_on, 32)
    _draw_curve(panels[0], records, "train_loss", "training", PLAIN_COLOR)
    _draw_curve(panels[0], records, "selection_mse", label, MODEL_COLOR)
    panels[0].set_ylabel("loss (mean squared error)")
    if scored:
        _draw_curve(panels[1], records, "selection_pearson", label, MODEL_COLOR)
        panels[1].set_ylabel("Pearson, mean over genes")
        panels[1].set_ylim(bottom=min(0.0, panels[1].get_ylim()[0]))
    panels[-1].set_xlabel("epoch")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    chosen = next((record for record in reversed(records) if record.get("best")), None)
    title = "No epoch was chosen" if scored else f"{len(records)} epochs: {selection_words(selected_on)}"
    if scored and chosen is not None:
        line = {
            "color": ACCENT_COLOR,
            "linestyle": "--",
            "linewidth": 1.5,
            "label": "chosen epoch",
            "zorder": 1,
        }
        for axes in panels:
            axes.axvline(chosen["epoch"], **line)
        pearson = chosen.get("selection_pearson")
        reached = "" if pearson is None else f": Pearson {pearson:.3f}"
        title = f"Epoch {chosen['epoch']} chosen on {selected_on}{reached}"
    figure.suptitle(textwrap.fill(title, 80), fontsize=12)
    panels[0].legend(frameon=False, fontsize=10)
    _save(figure, path)


def _draw_curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    known = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if known:
        epochs, values = zip(*known, strict=True)
        axes.plot(epochs, values, color=color, label=label, marker="o", markersize=3.5, linewidth=1.5)


def score_bars(path: str | os.PathLike, result: Mapping[str, Any], model: str = MODEL_NAME) -> None:
    """Draw the mean Pearson of model and baselines as bars, with a point for every gene, as PNG.

    Raises:
        InputError: the file cannot be written.
    """
    rows = {model: result, **result.get("baselines", {})}
    figure = Figure(figsize=(7.5, 0.75 * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    for row, (name, scores) in enumerate(rows.items()):
        color = MODEL_COLOR if row == 0 else ACCENT_COLOR if name == "depth_oracle" else PLAIN_COLOR
        _draw_bar(axes, row, scores, color)
    labels = {**LABELS, "depth_oracle": "depth oracle (reads\nthe true total count)"}
    axes.set_yticks(range(len(rows)), [labels.get(name, name) for name in rows], fontsize=11)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("Pearson (bar and number: mean over genes; points: single genes)", fontsize=10)
    axes.set_title(_selection(result), fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _save(figure, path)


def _draw_bar(axes: Axes, row: int, scores: Mapping[str, Any], color: str) -> None:
    genes = [gene["pearson"] for gene in scores["genes"] if gene["pearson"] is not None]
    if not genes:
        axes.text(0.01, row, "undefined: constant for every gene", color=SOFT, va="center")
        return
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}  # x in widths of the axes, y in rows
    mean = scores["pearson_mean"]
    axes.barh(row, mean, height=0.62, color=color, alpha=0.35)
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(genes))
    axes.scatter(genes, row + spread, s=11, color=color, edgecolor="white", linewidth=0.3)
    axes.text(1.02, row, f"{mean:.3f}", fontsize=12, fontweight="bold", **beside)
    if scores["n_constant_genes"]:
        axes.text(1.02, row + 0.32, f"{scores['n_constant_genes']} undefined", fontsize=8, color=SOFT, **beside)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")


_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2430; --paper: #ffffff; --line: #d5dae0; --soft: #5b6572; --first: #eef5fb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --paper: #14181e; --line: #38404b; --soft: #9aa5b3; --first: #1d2a38; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; } p { white-space: pre-line; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption, figcaption { color: var(--soft); padding-top: .5rem; }
caption { caption-side: bottom; text-align: left; white-space: pre-line; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
tr.bold td { font-weight: 650; background: var(--first); }
figure { margin: 2rem 0; }
img { display: block; max-width: 100%; height: auto; margin: auto; background: #fff; border-radius: 6px; }
"""


def write_html(
    path: str | os.PathLike,
    title: str,
    sections: Sequence[tuple[str, str | Table]],
    figures: Sequence[tuple[str, str | os.PathLike]] = (),
) -> None:
    """Write one self-contained page: text and tables first, then pictures, embedded. All text is escaped.

    Args:
        sections: (heading, body) in order; a body is plain text (line breaks are kept) or a rich table. An
            empty heading continues the section before.
        figures: (caption, PNG file) in order.

    Raises:
        InputError: a picture cannot be read or the page not be written.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for heading, body in sections:
        if heading:
            parts.append(f"<h2>{html.escape(heading)}</h2>")
        parts.append(_html_table(body) if isinstance(body, Table) else f"<p>{html.escape(body)}</p>")
    for caption, picture in figures:
        text = html.escape(caption)
        source = f"data:image/png;base64,{_base64(Path(picture))}"
        parts.append(f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _html_table(table: Table) -> str:
    def cells(tag: str, values: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(_plain(value))}</{tag}>" for value in values)

    rows = [f"<tr>{cells('th', [column.header for column in table.columns])}</tr>"]
    contents = zip(*(column.cells for column in table.columns), strict=True)
    for row, values in zip(table.rows, contents, strict=True):
        kind = ' class="bold"' if row.style == "bold" else ""
        rows.append(f"<tr{kind}>{cells('td', values)}</tr>")
    notes = "\n".join(_plain(note) for note in (table.title, table.caption) if note)
    caption = f"<caption>{html.escape(notes)}</caption>" if notes else ""
    return f'<div class="scroll"><table>{caption}{"".join(rows)}</table></div>'


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _base64(picture: Path) -> str:
    try:
        return base64.b64encode(picture.read_bytes()).decode("ascii")
    except OSError as error:
        raise InputError(f"{picture}: cannot be read ({error.strerror or error})") from error

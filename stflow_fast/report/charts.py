"""Curves and bars: training over epochs, scores beside the baselines, how often intervals hold the truth."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import InputError
from ..windows import NOTHING, selection_words
from .looks import ACCENT_COLOR, MODEL_COLOR, PLAIN_COLOR, SOFT, save
from .names import LABELS, MODEL_NAME, certainties, selection_note


def training_curves(
    path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]], selected_on: str = "validation"
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
    save(figure, path)


def _draw_curve(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, label: str, color: str) -> None:
    known = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if known:
        epochs, values = zip(*known, strict=True)
        axes.plot(epochs, values, color=color, label=label, marker="o", markersize=3.5, linewidth=1.5)


def score_bars(path: str | os.PathLike[str], result: Mapping[str, Any], model: str = MODEL_NAME) -> None:
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
    axes.set_title(selection_note(result), fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    save(figure, path)


def _draw_bar(axes: Axes, row: int, scores: Mapping[str, Any], color: str) -> None:
    genes = [gene["pearson"] for gene in scores["genes"] if gene["pearson"] is not None]
    if not genes:
        axes.text(0.01, row, "undefined: constant for every gene", color=SOFT, va="center")
        return
    # x in widths of the axes, y in rows
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    mean = scores["pearson_mean"]
    axes.barh(row, mean, height=0.62, color=color, alpha=0.35)
    spread = np.random.default_rng(0).uniform(-0.2, 0.2, len(genes))
    axes.scatter(genes, row + spread, s=11, color=color, edgecolor="white", linewidth=0.3)
    axes.text(1.02, row, f"{mean:.3f}", fontsize=12, fontweight="bold", **beside)
    if scores["n_constant_genes"]:
        axes.text(1.02, row + 0.32, f"{scores['n_constant_genes']} undefined", fontsize=8, color=SOFT, **beside)


def reliability(path: str | os.PathLike[str], result: Mapping[str, Any], model: str = MODEL_NAME) -> None:
    """Draw how often the truth lies within central intervals, against how often it should, as PNG.

    Args:
        result: with ``certainty``.

    Raises:
        InputError: the file cannot be written.
    """
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=SOFT, linewidth=1, linestyle=":", label="as it should be")
    for name, found in certainties(result, model).items():
        nominal, observed = zip(*found["reliability"], strict=True)
        color, line = (MODEL_COLOR, "-" if name == model else "--") if name.startswith(model) else (PLAIN_COLOR, "-")
        style: dict[str, Any] = {"color": color, "linestyle": line, "marker": "o", "markersize": 4}
        axes.plot(np.multiply(nominal, 100), np.multiply(observed, 100), label=name, **style)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal")
    axes.set_xlabel("central interval of the draws, %")
    axes.set_ylabel("spots and genes whose truth is within, %\n(a truth that ties with draws by its share)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10, loc="upper left")
    save(figure, path)

"""Results as tables for the terminal, which :mod:`.page` takes too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..evaluation import check_biomarkers
from ..priors.observation import ObservationModel
from .names import LABELS, MODEL_NAME, certainties, selection_note

CONSTANT_NOTE = "const: genes without Pearson, truth or prediction being the same everywhere."
ORACLE_NOTE = "depth oracle: reads the true total count of each test spot, nothing else."
CERTAINTY_KEYS = ("crps_mean", "coverage_50", "coverage_90", "spread_ratio")
CERTAINTY_NOTE = (
    "CRPS: the lower the better. in 50 %, 90 %: share of the truth within such intervals of the draws, "
    "where it ties with draws by its share. spread: of the draws, over the error of their mean. neighbourhoods: "
    "the same of the means over each spot and its nearest."
)
_COMPACT: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 0, 0, 1), "pad_edge": False}  # fits 80 columns


def results_table(result: Mapping[str, Any], model: str = MODEL_NAME) -> Table:
    """The model's scores, then those of the baselines.

    Args:
        result: from :func:`stflow_fast.evaluation.compare` (or ``score``: then the model alone).
        model: the name to give the first row.
    """
    baselines = result.get("baselines", {})
    notes = (CONSTANT_NOTE, ORACLE_NOTE if "depth_oracle" in baselines else "", selection_note(result))
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
        title="Pearson of chosen genes", caption=selection_note(result) or None, caption_justify="left", **_COMPACT
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
    for name, found in certainties(result, model).items():
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


def _by_gene(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {gene["name"]: gene for gene in scores["genes"]}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

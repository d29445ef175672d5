"""The pictures of an evaluation: which there are, and of which genes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..evaluation import score
from ..slides import Slide
from .charts import reliability, score_bars
from .maps import gene_maps
from .names import selection_note

UNITS = {"log1p": "log1p counts", "cp10k_log1p": "log1p counts per 10,000"}


def evaluation_pictures(
    folder: str | os.PathLike[str],
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
    panels: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {}
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
            title = "\n".join(filter(None, (f"{slide.id}: {slide.n_spots:,} spots, {what}", selection_note(result))))
            written.append(Path(folder) / f"{kind}_{slide.id}.png")
            size = slide.micron_per_pixel
            gene_maps(written[-1], slide.coords, measured, made, names, pearsons, title, size, labels, unit)
    return written


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

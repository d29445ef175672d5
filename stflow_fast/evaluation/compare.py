"""A model's prediction beside the baselines, by every score that needs no draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..slides import Slide
from .baselines import baselines
from .scores import score
from .structure import Structure

OF_A_SLIDE = ("pearson_mean", "spearman_mean", "mse_mean", "n_constant_genes", "n_spots")
OF_DEPTH_NORMALISED = ("pearson_mean", "spearman_mean")


def compare(
    train: Sequence[Slide],
    test: Sequence[Slide],
    prediction: np.ndarray,
    genes: Sequence[str],
    normalize: str = "log1p",
) -> dict[str, Any]:
    """Score a model's prediction on the test slides beside the baselines.

    Args:
        train: the slides the model was trained on, for the baselines to fit on.
        test: the slides that were predicted.
        prediction: [N_test, G], spots of all test slides one after another, in the unit of ``normalize``.
        genes: G names.
        normalize: as in :meth:`Slide.expression`.

    Returns:
        :func:`score` of the model over all test spots, with ``baselines`` = {name: the same for that baseline, and
        its settings (``alpha`` of a ridge)}, ``structure_of_truth`` = :class:`Structure` of the truth beside itself,
        and in the model's and in each baseline's dict:

        * ``per_slide`` = {slide id: {``pearson_mean``, ``spearman_mean``, ``mse_mean``, ``n_constant_genes``,
          ``n_spots``}};
        * ``structure`` = :class:`Structure` of the truth, the prediction beside it;
        * ``depth_normalised`` = {``pearson_mean``, ``spearman_mean``} of the same prediction with the truth in unit
          ``cp10k_log1p``, where ``normalize`` is ``log1p``. The total count of a spot is divided out of that truth: of
          the correlation with log1p counts, what is not left here was sequencing depth, which no tissue shows.

        All of it can be written as JSON.

    Raises:
        InputError: two test slides of one id, or what :func:`score` and :func:`baselines` refuse.
    """
    ids = [slide.id for slide in test]
    if len(set(ids)) < len(ids):
        raise InputError(f"test: slide ids repeat ({', '.join(sorted(ids))}); give each slide once")
    others = baselines(train, test, genes, normalize)
    truth = _truth(test, genes, normalize)
    return {
        **_scores(truth, prediction),
        "structure_of_truth": truth.structure.beside(truth.parts),
        "baselines": {name: {**_scores(truth, made.prediction), **made.settings} for name, made in others.items()},
    }


@dataclass(frozen=True)
class _Truth:
    """What was measured on the test slides."""

    genes: Sequence[str]
    ids: list[str]
    parts: list[np.ndarray]  # [N_i, G] of each slide
    structure: Structure
    depth_normalised: np.ndarray | None  # [N, G] of all; None where the unit is not log1p


def _truth(test: Sequence[Slide], genes: Sequence[str], normalize: str) -> _Truth:
    parts = [slide.expression(genes, normalize) for slide in test]
    return _Truth(
        genes,
        [slide.id for slide in test],
        parts,
        Structure([slide.coords for slide in test], parts),
        np.concatenate([slide.expression(genes, "cp10k_log1p") for slide in test]) if normalize == "log1p" else None,
    )


def _scores(truth: _Truth, prediction: np.ndarray) -> dict[str, Any]:
    """Everything about one predictor."""
    result = score(np.concatenate(truth.parts), prediction, truth.genes)
    parts = np.split(np.asarray(prediction), np.cumsum([len(part) for part in truth.parts])[:-1])
    result["per_slide"] = {
        name: _kept(score(expected, made, truth.genes), OF_A_SLIDE)
        for name, expected, made in zip(truth.ids, truth.parts, parts, strict=True)
    }
    result["structure"] = truth.structure.beside(parts)
    if truth.depth_normalised is not None:
        result["depth_normalised"] = _kept(score(truth.depth_normalised, prediction, truth.genes), OF_DEPTH_NORMALISED)
    return result


def _kept(scores: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: scores[name] for name in names}

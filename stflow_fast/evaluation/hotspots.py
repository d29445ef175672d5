"""Whether the spots where a gene is high are found: what a pathologist looks for in a map of a biomarker."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError

TOP_SHARE = 0.1
"""Of the spots, that count as high."""


def check_biomarkers(names: Sequence[str], predicted: Sequence[str]) -> None:
    """Raise InputError where a gene to show is not among the predicted ones."""
    absent = [name for name in names if name not in predicted]
    if absent:
        raise InputError(
            f"biomarkers: {', '.join(absent)} not among the {len(predicted)} predicted genes; "
            "leave out, or train with a gene list that has them"
        )


def top_overlap(truth: np.ndarray, prediction: np.ndarray, share: float = TOP_SHARE) -> tuple[np.ndarray, float]:
    """How many of the spots where each gene is highest are among those where it is predicted to be.

    Of spots that are equal at the border, each counts by the part that is still wanted: on shallow counts most are.

    Args:
        truth: [N, G] of one slide.
        prediction: [N, G].
        share: of the N spots, that are the highest; at least one spot.

    Returns:
        [G] shares from 0 to 1 of the truth's highest, and what chance alone would give.
    """
    wanted = max(1, round(share * len(truth)))
    both = (_membership(truth, wanted) * _membership(prediction, wanted)).sum(axis=0)
    return both / wanted, wanted / len(truth)


def _membership(values: np.ndarray, wanted: int) -> np.ndarray:
    """[N, G] how much of each spot is among the ``wanted`` highest; sums to ``wanted`` for each gene."""
    border = np.partition(values, len(values) - wanted, axis=0)[len(values) - wanted]
    above, tied = values > border, values == border
    share: np.ndarray = above + tied * ((wanted - above.sum(axis=0)) / tied.sum(axis=0))
    return share

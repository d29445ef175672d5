"""Whether a model knows how sure it is: the draws of x_1 beside what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from ..threads import blocks_of
from .scores import check_pair

Draws = Callable[[slice], np.ndarray]
"""Draws [R, n, G] of x_1 of n spots, asked for one slice behind the other from the first spot on."""

NUMBERS_AT_ONCE = 2**22
"""Drawn numbers of a block of spots: 16 MB as they are drawn, and 32 MB for each of the float64 temporaries."""

LEVELS = tuple(tenth / 10 for tenth in range(1, 10))
"""Central intervals whose coverage is counted."""

INCLUSIVE = (0.5, 0.9)
"""Central intervals whose coverage is counted with their bounds too."""


def certainty(truth: np.ndarray, mean: np.ndarray, draws: Draws) -> dict[str, Any]:
    """How much draws are worth, over all spots and genes.

    A truth is within the central part of size p by the share of the ranks that it may have among the draws which lie
    there: where it ties with draws, each rank counts alike (the nonrandomised probability integral transform; Czado et
    al. 2009). Of an exact law that is p, also of shallow counts, most of which are zero. Bounds of an interval that
    are counted as within it, as is usual, hold every zero where they begin at zero, however much of the law lies there:
    of a Poisson law of mean 0.5 the 50 % interval has 91 %. That is told beside. Its quantiles are those at rank
    (R + 1) q, linear between ranks (type 6 of Hyndman & Fan 1996, "weibull" in numpy).

    Args:
        truth: [N, G] expression, finite.
        mean: [N, G] the predicted mean of x_1.
        draws: called with slices of spots one behind the other, the first of one spot; gives [R, n, G], R at least 2
            and always the same.

    Returns:
        ``crps_mean`` (of the ensemble, fair: its expectation does not depend on R; Ferro 2014), ``coverage_50`` and
        ``coverage_90``, ``inclusive_50`` and ``inclusive_90`` with bounds as part of their interval, ``spread_ratio`` =
        sqrt(mean variance of the draws, ddof 1) / sqrt(mean squared error of ``mean``) (1 where they agree, None where
        the error is 0), ``n_draws`` = R, and ``reliability`` = [[level, coverage], ...] of 0.1 to 0.9. Plain numbers.

    Raises:
        InputError: shapes disagree, values are NaN or infinite, or fewer than two draws.
    """
    truth, mean = np.asarray(truth), np.asarray(mean)
    check_pair(truth, mean, truth.shape[-1], "mean")
    first = _checked(draws(slice(0, 1)), truth[:1], None)
    n_draws, n = len(first), len(truth)
    sums = _sums(truth[:1], first)
    for part in blocks_of(n - 1, max(1, NUMBERS_AT_ONCE // first.size)):
        rows = slice(part.start + 1, part.stop + 1)
        sums = _Sums(*map(np.add, sums, _sums(truth[rows], _checked(draws(rows), truth[rows], n_draws))))
    crps, variance, covered, inclusive = (total / truth.size for total in sums)
    squared_error = float(np.square(np.subtract(mean, truth, dtype=np.float64)).mean())
    return {
        "crps_mean": float(crps),
        "coverage_50": float(covered[LEVELS.index(0.5)]),
        "coverage_90": float(covered[LEVELS.index(0.9)]),
        **{f"inclusive_{100 * level:.0f}": float(share) for level, share in zip(INCLUSIVE, inclusive, strict=True)},
        "spread_ratio": float(np.sqrt(variance / squared_error)) if squared_error > 0 else None,
        "n_draws": n_draws,
        "reliability": [[level, float(share)] for level, share in zip(LEVELS, covered, strict=True)],
    }


class _Sums(NamedTuple):
    """Over spots and genes."""

    crps: np.ndarray  # []
    variance: np.ndarray  # []
    covered: np.ndarray  # [LEVELS]
    inclusive: np.ndarray  # [INCLUSIVE]


def _sums(truth: np.ndarray, draws: np.ndarray) -> _Sums:
    from scoringrules import crps_ensemble

    # What is drawn in float32 and measured in float64 would not be equal where both are log1p of one count.
    truth = truth.astype(np.result_type(draws, np.float16)).astype(np.float64)
    ordered = np.sort(draws, axis=0).astype(np.float64)
    # "pwm" is the number that "fair" is, from sorted draws: without R x R differences for each spot and gene.
    crps = crps_ensemble(truth, ordered, m_axis=0, estimator="pwm", sorted_ensemble=True, backend="numpy")
    inclusive = [_inclusive(truth, ordered, level) for level in INCLUSIVE]
    return _Sums(crps.sum(), ordered.var(axis=0, ddof=1).sum(), _covered(truth, ordered), np.array(inclusive))


def _covered(truth: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """[LEVELS] sums of the shares of each truth's ranks that lie in the central part."""
    ranks = len(draws) + 1
    low, high = (draws < truth).sum(axis=0) / ranks, ((draws <= truth).sum(axis=0) + 1) / ranks
    inside = [np.minimum(high, (1 + level) / 2) - np.maximum(low, (1 - level) / 2) for level in LEVELS]
    return np.array([(np.maximum(part, 0.0) / (high - low)).sum() for part in inside])


def _inclusive(truth: np.ndarray, ordered: np.ndarray, level: float) -> int:
    """Spots and genes whose truth lies within the central interval of their draws, sorted along the first axis."""
    low, high = (_quantile(ordered, q) for q in ((1 - level) / 2, (1 + level) / 2))
    return int(((low <= truth) & (truth <= high)).sum())


def _quantile(ordered: np.ndarray, q: float) -> np.ndarray:
    """numpy's "weibull" of draws that are sorted already: it sorts them again for each, ten times as slow."""
    rank = np.clip((len(ordered) + 1) * q - 1, 0, len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    quantile: np.ndarray = ordered[below] + (rank - below) * (ordered[above] - ordered[below])
    return quantile


def _checked(drawn: np.ndarray, truth: np.ndarray, n_draws: int | None) -> np.ndarray:
    drawn = np.asarray(drawn)
    shape, wanted = list(drawn.shape), ", ".join(["R" if n_draws is None else str(n_draws), *map(str, truth.shape)])
    if drawn.ndim != 3 or drawn.shape[1:] != truth.shape or n_draws not in (None, len(drawn)):
        raise InputError(f"draws: must have shape [{wanted}], not {shape}")
    if len(drawn) < 2:
        raise InputError(f"draws: {len(drawn)} of each spot; two or more are needed")
    if not np.isfinite(drawn).all():
        raise InputError("draws: some are NaN or infinite; remove them")
    return drawn


def random_training_spots(expression: np.ndarray, n_draws: int, seed: int) -> Draws:
    """The draws that know nothing of the image: for each test spot, whole training spots at random, with replacement.

    Args:
        expression: [M, G] of the training spots.
        n_draws: R.
        seed: with the number of a test spot it decides that spot's draws, whatever slices are asked for.

    Returns:
        From a slice of test spots to [R, n, G], in the dtype of ``expression``.
    """

    def draw(rows: slice) -> np.ndarray:
        spots = range(rows.start, rows.stop)
        chosen = [np.random.default_rng([seed, spot]).integers(len(expression), size=n_draws) for spot in spots]
        return expression[np.stack(chosen, axis=1)]

    return draw

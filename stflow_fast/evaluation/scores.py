"""Scores of a prediction as HEST-bench defines them, and Spearman's correlation beside Pearson's.

HEST-bench pools the spots of all test slides and computes, gene by gene, Pearson's correlation, the mean
squared error and R2 = 1 - SSE / SST; then means and quartiles over genes. Where a gene is constant its
correlation does not exist: HEST-bench's mean turns NaN, here such genes are left out of the mean and counted.

Source: ``train_test_reg`` of mahmoodlab/HEST ``src/hest/bench/trainer.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..threads import blocks_of

NUMBERS_AT_ONCE = 2**20
"""Numbers of a block of genes: 8 MB in each of the ten or so float64 temporaries."""


def score(truth: np.ndarray, prediction: np.ndarray, genes: Sequence[str]) -> dict[str, Any]:
    """Score a prediction gene by gene and summarise over genes, as HEST-bench does.

    Args:
        truth: [N, G] expression, finite, in any unit.
        prediction: [N, G] in the same unit.
        genes: G names, the order of the columns.

    Returns:
        A dict that JSON can hold (plain numbers and None, never NaN): ``pearson_mean, pearson_std`` (of the
        population, over genes), ``pearson_q1, pearson_q2, pearson_q3`` (25th, 50th, 75th percentile over
        genes), ``spearman_mean, spearman_q1..q3`` (Pearson's correlation of the ranks, ties at their mean rank),
        ``mse_mean, mse_q1..q3, r2_mean, r2_q1..q3, n_genes, n_constant_genes, n_spots`` and ``genes = [{"name",
        "pearson", "spearman", "mse", "r2", "detected"}]``, the last the share of spots whose truth is above zero.
        ``pearson`` and ``spearman`` are None where truth or prediction is constant over the spots (counted in
        ``n_constant_genes``), ``r2`` where the truth is; the summaries are over the other genes, None when there is
        none.

    Raises:
        InputError: shapes disagree, no spots, no genes, or values that are NaN or infinite.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    check_pair(truth, prediction, len(genes))
    blocks = [
        _score_genes(truth[:, part].T, prediction[:, part].T) for part in blocks_of(len(genes), _at_once(len(truth)))
    ]
    by_gene = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    pearson = by_gene["pearson"]
    defined = ~np.isnan(pearson)
    return {
        **_summary("pearson", pearson),
        "pearson_std": float(np.std(pearson[defined])) if defined.any() else None,
        **{key: value for name in ("spearman", "mse", "r2") for key, value in _summary(name, by_gene[name]).items()},
        "n_genes": len(genes),
        "n_constant_genes": int((~defined).sum()),
        "n_spots": len(truth),
        "genes": _rows(genes, by_gene),
    }


def mean_pearson(truth: np.ndarray, prediction: np.ndarray) -> float:
    """``pearson_mean`` of :func:`score` alone; NaN where there is none.

    Args:
        truth: [N, G] finite.
        prediction: [N, G].
    """
    parts = blocks_of(truth.shape[1], _at_once(len(truth)))
    found = np.concatenate([_pearson(truth[:, part].T, prediction[:, part].T) for part in parts])
    return float(np.nanmean(found)) if (~np.isnan(found)).any() else np.nan


def check_pair(truth: np.ndarray, prediction: np.ndarray, n_genes: int, name: str = "prediction") -> None:
    """Raise InputError unless both are [N, n_genes], finite and not empty; ``name`` is what the second is called."""
    shape = list(truth.shape)
    if truth.ndim != 2 or truth.shape[1] != n_genes:
        raise InputError(f"truth: must have shape [N, {n_genes}] for {n_genes} genes, not {shape}")
    if prediction.shape != truth.shape:
        raise InputError(f"{name}: must have the shape of the truth {shape}, not {list(prediction.shape)}")
    if not truth.size:
        raise InputError(f"truth: {shape[0]} spots of {n_genes} genes; at least one of each is needed")
    for called, values in (("truth", truth), (name, prediction)):
        broken = int((~np.isfinite(values)).any(axis=1).sum())
        if broken:
            raise InputError(f"{called}: {broken} of {len(values)} spots are NaN or infinite; remove them")


def is_constant(rows: np.ndarray) -> np.ndarray:
    """[G] of rows [G, N]: whether the values of each differ by no more than rounding. The correlation of rounding noise
    means nothing."""
    precision = np.finfo(rows.dtype).eps if np.issubdtype(rows.dtype, np.floating) else 0.0
    low, high = rows.min(axis=1).astype(np.float64), rows.max(axis=1).astype(np.float64)
    constant: np.ndarray = high - low <= 4 * precision * np.maximum(np.abs(low), np.abs(high))
    return constant


def _at_once(n_spots: int) -> int:
    return max(1, NUMBERS_AT_ONCE // max(1, n_spots))


def _score_genes(truth: np.ndarray, prediction: np.ndarray) -> dict[str, np.ndarray]:
    """[G] of every score of rows [G, N]; NaN where it does not exist."""
    from scipy.stats import rankdata  # half a second of every start

    pearson = _pearson(truth, prediction)
    spearman = _pearson(rankdata(truth, axis=1), rankdata(prediction, axis=1))
    flat = is_constant(truth)
    truth, prediction = _contiguous(truth), _contiguous(prediction)
    squared_error = np.square(prediction - truth).mean(axis=1)
    spread = np.square(truth - truth.mean(axis=1, keepdims=True)).mean(axis=1)
    r2 = 1.0 - squared_error / np.where(flat, np.nan, spread)
    return {
        "pearson": pearson,
        "spearman": np.where(np.isnan(pearson), np.nan, spearman),
        "mse": squared_error,
        "r2": r2,
        "detected": (truth > 0).mean(axis=1),
    }


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[G] of rows [G, N]; NaN where one of the two is constant."""
    flat = is_constant(first) | is_constant(second)
    cosine = (_directions(first) * _directions(second)).sum(axis=1)
    return np.where(flat, np.nan, np.clip(cosine, -1.0, 1.0))


def _directions(rows: np.ndarray) -> np.ndarray:
    """Centred and of length one: a product of two variances underflows where neither of them does."""
    centred = _contiguous(rows)
    centred = centred - centred.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    directions: np.ndarray = centred / np.where(length > 0, length, 1.0)
    return directions


def _contiguous(rows: np.ndarray) -> np.ndarray:
    """In float64, the values of a row side by side: numpy then sums by pairs, whose rounding does not grow with N."""
    return np.ascontiguousarray(rows, dtype=np.float64)


def _summary(name: str, values: np.ndarray) -> dict[str, float | None]:
    keys = (f"{name}_mean", f"{name}_q1", f"{name}_q2", f"{name}_q3")
    values = values[~np.isnan(values)]
    if not len(values):
        return dict.fromkeys(keys)
    numbers = (np.mean(values), *np.percentile(values, (25, 50, 75)))
    return {key: float(number) for key, number in zip(keys, numbers, strict=True)}


def _rows(genes: Sequence[str], by_gene: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    columns = [[None if np.isnan(value) else value for value in by_gene[name].tolist()] for name in by_gene]
    return [
        {"name": str(name), **dict(zip(by_gene, values, strict=True))}
        for name, *values in zip(genes, *columns, strict=True)
    ]

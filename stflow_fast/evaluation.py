"""Scores of a prediction as HEST-bench defines them, and the baselines that must stand beside it.

HEST-bench pools the spots of all test slides and computes, gene by gene, Pearson's correlation, the mean
squared error and R2 = 1 - SSE / SST; then means and quartiles over genes. Where a gene is constant its
correlation does not exist: HEST-bench's mean turns NaN, here such genes are left out of the mean and counted.

Source: ``train_test_reg`` of mahmoodlab/HEST ``src/hest/bench/trainer.py``; the baselines of this page are
checked against independent numbers on real slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .errors import InputError
from .slides import Slide

PCA_COMPONENTS = 256
PCA_SEED = 1
"""HEST-bench's own seed of its randomised PCA. Another seed moves its ridge by about 0.01 in mean Pearson."""

STRONG_ALPHA = 1e4


def score(truth: np.ndarray, prediction: np.ndarray, genes: Sequence[str]) -> dict[str, Any]:
    """Score a prediction gene by gene and summarise over genes, as HEST-bench does.

    Args:
        truth: [N, G] expression, finite, in any unit.
        prediction: [N, G] in the same unit.
        genes: G names, the order of the columns.

    Returns:
        A dict that JSON can hold (plain numbers and None, never NaN): ``pearson_mean, pearson_std`` (of the
        population, over genes), ``pearson_q1, pearson_q2, pearson_q3`` (25th, 50th, 75th percentile over
        genes), ``mse_mean, mse_q1..q3, r2_mean, r2_q1..q3, n_genes, n_constant_genes, n_spots`` and ``genes =
        [{"name", "pearson", "mse", "r2"}]``. ``pearson`` is None where truth or prediction is constant over
        the spots (counted in ``n_constant_genes``), ``r2`` where the truth is; the summaries are over the
        other genes, None when there is none.

    Raises:
        InputError: shapes disagree, no spots, no genes, or values that are NaN or infinite.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    _check_pair(truth, prediction, genes)
    rows = [_score_gene(name, truth[:, g], prediction[:, g]) for g, name in enumerate(genes)]
    pearsons = [row["pearson"] for row in rows if row["pearson"] is not None]
    return {
        **_summary("pearson", pearsons),
        "pearson_std": float(np.std(pearsons)) if pearsons else None,
        **_summary("mse", [row["mse"] for row in rows]),
        **_summary("r2", [row["r2"] for row in rows if row["r2"] is not None]),
        "n_genes": len(rows),
        "n_constant_genes": len(rows) - len(pearsons),
        "n_spots": len(truth),
        "genes": rows,
    }


def _check_pair(truth: np.ndarray, prediction: np.ndarray, genes: Sequence[str]) -> None:
    shape, n_genes = list(truth.shape), len(genes)
    if truth.ndim != 2 or truth.shape[1] != n_genes:
        raise InputError(f"truth: must have shape [N, {n_genes}] for {n_genes} genes, not {shape}")
    if prediction.shape != truth.shape:
        raise InputError(f"prediction: must have the shape of the truth {shape}, not {list(prediction.shape)}")
    if not truth.size:
        raise InputError(f"truth: {shape[0]} spots of {n_genes} genes; at least one of each is needed")
    for name, values in (("truth", truth), ("prediction", prediction)):
        broken = int((~np.isfinite(values)).any(axis=1).sum())
        if broken:
            raise InputError(f"{name}: {broken} of {len(values)} spots are NaN or infinite; remove them")


def _score_gene(name: str, truth: np.ndarray, prediction: np.ndarray) -> dict[str, Any]:
    constant_truth, constant_prediction = _is_constant(truth), _is_constant(prediction)
    truth, prediction = truth.astype(np.float64), prediction.astype(np.float64)
    squared_error = float(np.square(prediction - truth).mean())
    spread = truth - truth.mean()
    pearson = None
    if not (constant_truth or constant_prediction):
        # Scaled to length one first: a product of two variances underflows where neither of them does.
        other = prediction - prediction.mean()
        cosine = (spread / np.linalg.norm(spread)) @ (other / np.linalg.norm(other))
        pearson = float(np.clip(cosine, -1.0, 1.0))
    r2 = None if constant_truth else float(1.0 - squared_error / np.square(spread).mean())
    return {"name": str(name), "pearson": pearson, "mse": squared_error, "r2": r2}


def _is_constant(values: np.ndarray) -> bool:
    """Whether the values differ by no more than rounding: the correlation of rounding noise means nothing."""
    precision = np.finfo(values.dtype).eps if np.issubdtype(values.dtype, np.floating) else 0.0
    low, high = float(values.min()), float(values.max())
    return high - low <= 4 * precision * max(abs(low), abs(high))


def _summary(name: str, values: list[float]) -> dict[str, float | None]:
    keys = (f"{name}_mean", f"{name}_q1", f"{name}_q2", f"{name}_q3")
    if not values:
        return dict.fromkeys(keys)
    numbers = (np.mean(values), *np.percentile(values, (25, 50, 75)))
    return {key: float(number) for key, number in zip(keys, numbers, strict=True)}


def baselines(
    train: Sequence[Slide], test: Sequence[Slide], genes: Sequence[str], normalize: str = "log1p"
) -> dict[str, np.ndarray]:
    """Predictions for the spots of the test slides by four predictors that know nothing of neighbours.

    * ``train_mean``: each gene's mean over the training spots. Its Pearson does not exist; its MSE is the one
      to beat.
    * ``hest_ridge``: HEST-bench's StandardScaler, PCA(256) and ridge with alpha = 100 / (components * genes),
      no intercept.
    * ``ridge_alpha_1e4``: the same components, alpha = 1e4, with intercept: strong regularisation.
    * ``depth_oracle``: an oracle, not a model: it reads the true total count of each *test* spot and nothing
      else. Per gene, expression is fitted on log1p(total count) by a straight line on the training slides. A
      line changes neither the size of a Pearson correlation nor, where expression rises with depth, its sign,
      so this Pearson is that of log1p(total count) itself; and because the line was learned, MSE and R2 mean
      something too. What it scores is what sequencing depth alone explains.

    PCA keeps min(256, training spots, features) components and is seeded, so the same slides give the same
    numbers.

    Args:
        train: slides with counts to fit on, two spots or more in all.
        test: slides with counts to predict.
        genes: G names.
        normalize: as in :meth:`Slide.expression`.

    Returns:
        name -> [N_test, G] float32, spots of all test slides one after another.

    Raises:
        InputError: no slides, fewer than two training spots, slides whose features differ in size, or what
            :meth:`Slide.expression` refuses.
    """
    _check_slides(train, test)
    features, depth = _features_and_depth(train)
    unseen, unseen_depth = _features_and_depth(test)
    expression = np.concatenate([slide.expression(genes, normalize) for slide in train])
    mean = expression.mean(axis=0, dtype=np.float64)
    n_components = min(PCA_COMPONENTS, *features.shape)
    pipeline = make_pipeline(StandardScaler(), PCA(n_components, random_state=PCA_SEED))
    components = pipeline.fit_transform(features)
    unseen = pipeline.transform(unseen)
    weak = Ridge(alpha=100 / (n_components * len(genes)), fit_intercept=False, max_iter=1000, solver="lsqr")
    predictions = {
        "train_mean": np.broadcast_to(mean, (len(unseen), len(genes))),
        "hest_ridge": weak.fit(components, expression).predict(unseen),
        "ridge_alpha_1e4": Ridge(alpha=STRONG_ALPHA).fit(components, expression).predict(unseen),
        "depth_oracle": mean + np.outer(unseen_depth - depth.mean(), _slopes(depth, expression - mean)),
    }
    shape = (len(unseen), len(genes))  # scikit-learn drops the axis of a single gene
    return {name: np.reshape(made, shape).astype(np.float32) for name, made in predictions.items()}


def _features_and_depth(slides: Sequence[Slide]) -> tuple[np.ndarray, np.ndarray]:
    """[N, F] features and [N] log1p of the total counts, slides one after another."""
    features = np.concatenate([slide.features for slide in slides])
    return features, np.log1p(np.concatenate([slide.total_counts for slide in slides]))


def _slopes(depth: np.ndarray, centred_expression: np.ndarray) -> np.ndarray:
    """[G] least-squares slope of each gene on depth; zero where all spots are equally deep."""
    centred = depth - depth.mean()
    variance = centred @ centred
    return centred @ centred_expression / variance if variance > 0 else np.zeros(centred_expression.shape[1])


def _check_slides(train: Sequence[Slide], test: Sequence[Slide]) -> None:
    for name, slides in (("train", train), ("test", test)):
        if not slides:
            raise InputError(f"{name}: no slides; give at least one")
    if sum(slide.n_spots for slide in train) < 2:
        raise InputError("train: one spot in all; the ridge baselines need two or more")
    first = train[0]
    for slide in (*train, *test):
        if slide.feature_dim != first.feature_dim:
            raise InputError(
                f"{slide.id}: features have size {slide.feature_dim}, those of {first.id} "
                f"{first.feature_dim}; use one encoder for all slides"
            )


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
        :func:`score` of the model over all test spots, with ``baselines`` = {name: the same for that
        baseline} and, in the model's and in each baseline's dict, ``per_slide`` = {slide id:
        {``pearson_mean``, ``mse_mean``, ``n_constant_genes``, ``n_spots``}}. All of it can be written as
        JSON.

    Raises:
        InputError: two test slides of one id, or what :func:`score` and :func:`baselines` refuse.
    """
    ids = [slide.id for slide in test]
    if len(set(ids)) < len(ids):
        raise InputError(f"test: slide ids repeat ({', '.join(sorted(ids))}); give each slide once")
    others = baselines(train, test, genes, normalize)
    truth = [slide.expression(genes, normalize) for slide in test]
    result = _pooled_and_per_slide(ids, truth, prediction, genes)
    result["baselines"] = {name: _pooled_and_per_slide(ids, truth, made, genes) for name, made in others.items()}
    return result


def _pooled_and_per_slide(
    ids: Sequence[str], truth: Sequence[np.ndarray], prediction: np.ndarray, genes: Sequence[str]
) -> dict[str, Any]:
    pooled = score(np.concatenate(truth), prediction, genes)
    parts = np.split(np.asarray(prediction), np.cumsum([len(part) for part in truth])[:-1])
    kept = ("pearson_mean", "mse_mean", "n_constant_genes", "n_spots")
    pooled["per_slide"] = {}
    for name, expected, made in zip(ids, truth, parts, strict=True):
        own = score(expected, made, genes)
        pooled["per_slide"][name] = {key: own[key] for key in kept}
    return pooled

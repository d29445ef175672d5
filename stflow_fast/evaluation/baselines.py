"""Predictors that must stand beside a model: of the training mean, of patches, of neighbours, of sequencing depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from ..slides import Slide
from .groups import left_out_groups
from .neighbors import neighbor_mean
from .ridge import RidgePath
from .scores import is_constant, mean_pearson

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

# scikit-learn is imported where it is used: every command would wait for it, and few fit a baseline.

PCA_COMPONENTS = 256
PCA_SEED = 1
"""HEST-bench's own seed of its randomised PCA. Another seed moves its ridge by about 0.01 in mean Pearson."""

STRONG_ALPHA = 1e4
"""Also what stands where training slides cannot choose: too few spots to leave any out."""

ALPHAS = tuple(10 ** (half / 2) for half in range(2, 15))
"""Half decades of 1e1 to 1e7, of which training slides choose."""

SMOOTHED_SHARE = 0.25
"""Of the neighbours' mean in a smoothed prediction."""

Expression = Callable[[Slide], np.ndarray]
"""[N, G] of a slide."""

Design = Callable[[Slide], np.ndarray]
"""[N, D] columns that a ridge sees of a slide."""

Designs = Callable[[Sequence[Slide]], tuple[Design, Design]]
"""From the slides that a ridge is fitted on: what it sees of those, and what of others."""


@dataclass(frozen=True)
class Baseline:
    """A prediction, and what was set or chosen for it.

    Attributes:
        prediction: [N_test, G] float32, spots of all test slides one after another.
        settings: ``alpha`` of a ridge; empty for the others.
    """

    prediction: np.ndarray
    settings: Mapping[str, Any] = field(default_factory=dict)


def baselines(
    train: Sequence[Slide], test: Sequence[Slide], genes: Sequence[str], normalize: str = "log1p"
) -> dict[str, Baseline]:
    """Predictions for the spots of the test slides by seven predictors.

    * ``train_mean``: each gene's mean over the training spots. Its Pearson does not exist; its MSE is the one
      to beat.
    * ``hest_ridge``: HEST-bench's StandardScaler, PCA(256) and ridge with alpha = 100 / (components * genes),
      no intercept.
    * ``ridge_alpha_1e4``: the same components, alpha = 1e4, with intercept: strong regularisation.
    * ``ridge``: the same components, with intercept, alpha chosen on the training slides.
    * ``ridge_smoothed``: a ``ridge`` whose prediction of a spot is 0.75 of its own and 0.25 of the mean of those of its
      8 nearest neighbours; alpha chosen for that.
    * ``ridge_neighbors``: ridge on features standardised by their own slide, those of the spot beside their mean over
      its 8 nearest neighbours (2 F columns); alpha chosen on the training slides.
    * ``depth_oracle``: an oracle, not a model: it reads the true total count of each *test* spot and nothing
      else. Per gene, expression is fitted on log1p(total count) by a straight line on the training slides. A
      line changes neither the size of a Pearson correlation nor, where expression rises with depth, its sign,
      so this Pearson is that of log1p(total count) itself; and because the line was learned, MSE and R2 mean
      something too. What it scores is what sequencing depth alone explains.

    Alpha is chosen of :data:`ALPHAS`: the one with the highest mean Pearson over genes, averaged over the training
    slides (regions, where there is one slide alone) as each is left out by :func:`left_out_groups`. The test slides
    have no part in it. It is :data:`STRONG_ALPHA` where nothing could be left out or correlated.

    PCA keeps min(256, training spots, features) components and is seeded, so the same slides give the same
    numbers.

    Args:
        train: slides with counts to fit on, two spots or more in all.
        test: slides with counts to predict.
        genes: G names.
        normalize: as in :meth:`Slide.expression`.

    Returns:
        name -> :class:`Baseline`.

    Raises:
        InputError: no slides, fewer than two training spots, slides whose features differ in size, or what
            :meth:`Slide.expression` refuses.
    """
    _check_slides(train, test)

    def expression(slide: Slide) -> np.ndarray:
        return slide.expression(genes, normalize)

    fixed = _hest_ridges(train, test, expression)
    chosen = {name: _ridge(designs, train, test, expression) for name, designs in RIDGES.items()}
    mean, oracle = _mean_and_oracle(train, test, expression)
    return {"train_mean": mean, **fixed, **chosen, "depth_oracle": oracle}


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


def _mean_and_oracle(
    train: Sequence[Slide], test: Sequence[Slide], expression: Expression
) -> tuple[Baseline, Baseline]:
    known, depth, unseen_depth = np.concatenate(list(map(expression, train))), _depth(train), _depth(test)
    mean = known.mean(axis=0, dtype=np.float64)
    by_depth = mean + np.outer(unseen_depth - depth.mean(), _slopes(depth, known - mean))
    everywhere = np.broadcast_to(mean, by_depth.shape)
    return Baseline(everywhere.astype(np.float32)), Baseline(by_depth.astype(np.float32))


def _depth(slides: Sequence[Slide]) -> np.ndarray:
    """[N] log1p of the total counts, slides one after another."""
    depth: np.ndarray = np.log1p(np.concatenate([slide.total_counts for slide in slides]))
    return depth


def _slopes(depth: np.ndarray, centred_expression: np.ndarray) -> np.ndarray:
    """[G] least-squares slope of each gene on depth; zero where all spots are equally deep."""
    centred = depth - depth.mean()
    variance = centred @ centred
    if variance <= 0:
        return np.zeros(centred_expression.shape[1])
    slopes: np.ndarray = centred @ centred_expression / variance
    return slopes


def _hest_ridges(train: Sequence[Slide], test: Sequence[Slide], expression: Expression) -> dict[str, Baseline]:
    """Of HEST-bench's components, with its own alpha and with the strong one."""
    from sklearn.linear_model import Ridge

    known = np.concatenate(list(map(expression, train)))
    features, unseen = _features(train), _features(test)
    pipeline = _scaled_pca(features)
    components = pipeline.fit_transform(features)
    unseen, n_genes = pipeline.transform(unseen), known.shape[1]
    weak = 100 / (components.shape[1] * n_genes)
    ridges = {
        "hest_ridge": Ridge(alpha=weak, fit_intercept=False, max_iter=1000, solver="lsqr"),
        "ridge_alpha_1e4": Ridge(alpha=STRONG_ALPHA),
    }
    found = {}
    for name, ridge in ridges.items():
        made = ridge.fit(components, known).predict(unseen)
        # scikit-learn drops the axis of a single gene
        found[name] = Baseline(made.reshape(-1, n_genes).astype(np.float32), {"alpha": ridge.alpha})
    return found


def _features(slides: Sequence[Slide]) -> np.ndarray:
    """[N, F] float32, slides one after another."""
    return np.concatenate(list(map(_features_of, slides)))


def _features_of(slide: Slide) -> np.ndarray:
    """[N, F] float32."""
    assert slide.features is not None  # whoever is compared with baselines has them
    return slide.features[:]


def _scaled_pca(features: np.ndarray) -> Pipeline:
    """HEST-bench's StandardScaler and PCA for these features [N, F], not fitted yet."""
    from sklearn.decomposition import PCA
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), PCA(min(PCA_COMPONENTS, *features.shape), random_state=PCA_SEED))


def _ridge(designs: Designs, train: Sequence[Slide], test: Sequence[Slide], expression: Expression) -> Baseline:
    alpha = _choose_alpha(designs, train, expression)
    path, seen = _fit(designs, train, expression)
    projected = path.project(np.concatenate(list(map(seen, test))))
    return Baseline(path.predict(projected, alpha).astype(np.float32), {"alpha": alpha})


def _choose_alpha(designs: Designs, train: Sequence[Slide], expression: Expression) -> float:
    reached = []
    for kept, left in left_out_groups(train):
        if sum(slide.n_spots for slide in kept) < 2:
            continue
        path, seen = _fit(designs, kept, expression)
        for slide in left:
            truth, projected = expression(slide), path.project(seen(slide))
            reached.append([mean_pearson(truth, path.predict(projected, alpha)) for alpha in ALPHAS])
    scores = np.ma.masked_invalid(np.reshape(reached, (-1, len(ALPHAS)))).mean(axis=0)
    return STRONG_ALPHA if np.ma.getmaskarray(scores).all() else ALPHAS[int(scores.argmax())]


def _fit(designs: Designs, slides: Sequence[Slide], expression: Expression) -> tuple[RidgePath, Design]:
    """The ridge of these slides for every alpha, and what it sees of others."""
    own, seen = designs(slides)
    design, target = (np.concatenate(list(map(of, slides))) for of in (own, expression))
    return RidgePath.fit(design, target), seen


def _components(slides: Sequence[Slide]) -> tuple[Design, Design]:
    features = _features(slides)
    pipeline = _scaled_pca(features).fit(features)

    def own(slide: Slide) -> np.ndarray:
        components: np.ndarray = pipeline.transform(_features_of(slide))
        return components

    return own, own


def _smoothed_components(slides: Sequence[Slide]) -> tuple[Design, Design]:
    """The mean over neighbours of a prediction that is linear in the design is the prediction from the design's."""
    own, _ = _components(slides)

    def smoothed(slide: Slide) -> np.ndarray:
        components = own(slide)
        return (1 - SMOOTHED_SHARE) * components + SMOOTHED_SHARE * neighbor_mean(slide.coords, components)

    return own, smoothed


def _own_and_neighbors(slides: Sequence[Slide]) -> tuple[Design, Design]:
    return _with_neighbors, _with_neighbors


def _with_neighbors(slide: Slide) -> np.ndarray:
    features = _features_of(slide)
    flat = is_constant(features.T)
    deviation = features - features.mean(axis=0, dtype=np.float64)
    standardised = np.where(flat, 0.0, deviation / np.where(flat, 1.0, deviation.std(axis=0)))
    return np.hstack([standardised, neighbor_mean(slide.coords, standardised)])


RIDGES: Mapping[str, Designs] = {
    "ridge": _components,
    "ridge_smoothed": _smoothed_components,
    "ridge_neighbors": _own_and_neighbors,
}
"""Those whose alpha training slides choose."""

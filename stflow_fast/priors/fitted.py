"""Sources of the flow that are fitted on training slides, in the unit of their x_1."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse

from ..errors import InputError
from ..slides import Slide
from ..threads import blocks_of
from . import zinb
from .image_mean import ROWS, ImageMean, blocks_of_features, fit_image_mean, rows_of_features
from .prior import Draw, Prior, Source, in_unit
from .streams import PIECE, fingerprint, streams


@dataclass(frozen=True, eq=False)
class FittedSource(Source):
    """A source that was fitted on training slides, in the unit of their x_1.

    Attributes:
        genes: it was fitted for, in the order of the columns of x_0.
        normalize: the unit, see ``stflow_fast.slides.NORMALIZATIONS``.
        fitted_on: what it was fitted on and what is to be said of the fit (plain JSON types).
    """

    genes: tuple[str, ...]
    normalize: str
    fitted_on: dict[str, Any]

    of_counts: ClassVar[bool] = True  # whether it draws counts, and not expression of whatever unit

    @classmethod
    @abc.abstractmethod
    def fitted(cls, slides: Sequence[Slide], genes: tuple[str, ...], normalize: str) -> FittedSource:
        """Of training slides."""

    def named(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": fingerprint(self.tensors())}

    def to_dict(self) -> dict[str, Any]:
        """All but :meth:`tensors`, of plain JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: value for name, value in fields.items() if not isinstance(value, np.ndarray)}
        return {"name": self.name, **plain, "genes": list(self.genes)}

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays, by the names of their fields."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}

    def _check_genes(self, n_genes: int) -> None:
        if n_genes != len(self.genes):
            raise InputError(f"source: {self.name} was fitted for {len(self.genes)} genes, not {n_genes}; fit it again")


GRID_LOGITS, GRID_TOTAL_COUNTS = (0.1, 0.2, 0.4), (1.0, 2.0, 4.0)
"""The paper's grid of mu and phi, with pi 0.5. They are taken for ``logits`` and ``total_count`` of the published code,
whose default is then the grid's first point."""


@dataclass(frozen=True, eq=False)
class GridPrior(Prior, FittedSource):
    """``zinb-grid``: of the paper's grid of ZINBs, the same for every spot and gene, the one under which the training
    counts are likeliest.

    The paper chooses by the score of a trained model. This costs nothing and looks at no test slide.
    """

    name: str = "zinb-grid"

    _law = "zinb"

    @classmethod
    def fitted(cls, slides: Sequence[Slide], genes: tuple[str, ...], normalize: str) -> GridPrior:
        values, times = _histogram(slides, genes)
        best, reached = (GRID_TOTAL_COUNTS[0], GRID_LOGITS[0]), -np.inf
        for total_count in GRID_TOTAL_COUNTS:
            for logits in GRID_LOGITS:
                mean = total_count * np.exp(logits)
                log_likelihood = float(times @ zinb.log_likelihood(values, mean, total_count, 0.5))
                if log_likelihood > reached:
                    best, reached = (total_count, logits), log_likelihood
        fitted_on = {**_described(slides), "log_likelihood_per_count": reached / float(times.sum())}
        return cls(genes, normalize, fitted_on, total_count=best[0], logits=best[1])


@dataclass(frozen=True, eq=False)
class GeneZinb(FittedSource):
    """``zinb-genes``: a ZINB of each gene, by maximum likelihood.

    Attributes:
        mean, theta, pi: [G] float64, see :mod:`.zinb`.
    """

    mean: np.ndarray
    theta: np.ndarray
    pi: np.ndarray

    name = "zinb-genes"

    @classmethod
    def fitted(cls, slides: Sequence[Slide], genes: tuple[str, ...], normalize: str) -> GeneZinb:
        found = zinb.fit(_counts(slides, genes))
        fitted_on = {**_described(slides), "fell_back": int(found.fell_back.sum())}
        return cls(genes, normalize, fitted_on, found.scale, found.theta, found.pi)

    def spots(self, n_genes: int, seed: np.random.SeedSequence, features: Any = None) -> Draw:
        self._check_genes(n_genes)
        generators = streams(seed, 3)

        def of_next(n_spots: int) -> np.ndarray:
            x_0 = np.empty((n_spots, n_genes), dtype=np.float32)
            for rows in blocks_of(n_spots, max(1, PIECE // n_genes)):
                mean = np.broadcast_to(self.mean, x_0[rows].shape)
                x_0[rows] = in_unit(zinb.draw(mean, self.theta, self.pi, generators), self.normalize)
            return x_0

        return of_next


STORED_BYTES = 2**26
"""Of the training spots that ``empirical`` keeps."""


@dataclass(frozen=True, eq=False)
class Empirical(FittedSource):
    """``empirical``: each spot's x_0 is the expression of a training spot drawn at random, so that genes go together as
    they do in tissue.

    Attributes:
        expression: [M, G] float32 of training spots, drawn without replacement by a fixed seed where there are more
            than :data:`STORED_BYTES` hold.
    """

    expression: np.ndarray

    name = "empirical"
    of_counts = False

    @classmethod
    def fitted(cls, slides: Sequence[Slide], genes: tuple[str, ...], normalize: str) -> Empirical:
        n_spots = sum(slide.n_spots for slide in slides)
        most = max(1, STORED_BYTES // (4 * len(genes)))
        chosen = np.sort(np.random.default_rng(0).permutation(n_spots)[:most])
        first, kept = 0, []
        for slide in slides:
            here = chosen[(chosen >= first) & (chosen < first + slide.n_spots)] - first
            kept.append(slide.expression(genes, normalize)[here])
            first += slide.n_spots
        return cls(genes, normalize, {**_described(slides), "kept": len(chosen)}, np.concatenate(kept))

    def spots(self, n_genes: int, seed: np.random.SeedSequence, features: Any = None) -> Draw:
        self._check_genes(n_genes)
        (generator,) = streams(seed, 1)
        return lambda n_spots: self.expression[generator.integers(len(self.expression), size=n_spots)]


SMALLEST_MEAN = 1e-3
"""Count that ``conditional`` expects of a spot at the least, before it is scaled: no law of counts has a mean of 0."""


@dataclass(frozen=True, eq=False)
class Conditional(FittedSource):
    """``conditional``: a ZINB around the mean that a spot's image predicts.

    The mean is ``scale * max(expm1(log1p counts by the ridge), SMALLEST_MEAN)``; scale, theta and pi of each gene are
    those of maximum likelihood around it.

    Attributes:
        center, projection, weights, ceiling: of the ridge, see :class:`.image_mean.ImageMean`.
        scale, theta, pi: [G] float64, see :mod:`.zinb`.
    """

    center: np.ndarray
    projection: np.ndarray
    weights: np.ndarray
    ceiling: np.ndarray
    scale: np.ndarray
    theta: np.ndarray
    pi: np.ndarray

    name = "conditional"
    reads_features = True

    @classmethod
    def fitted(cls, slides: Sequence[Slide], genes: tuple[str, ...], normalize: str) -> Conditional:
        image_mean, alpha = fit_image_mean(slides, genes)
        design = np.concatenate([image_mean.design(part) for slide in slides for part in blocks_of_features(slide)])
        counts = _counts(slides, genes).tocsc()
        width = max(1, STORED_BYTES // (8 * len(design)))
        found = [
            zinb.fit(counts[:, block], _expected(image_mean.log1p_counts(design, block)))
            for block in blocks_of(len(genes), width)
        ]
        scale, theta, pi, fell_back = (np.concatenate(part) for part in zip(*found, strict=True))
        fitted_on = {**_described(slides), "alpha": alpha, "fell_back": int(fell_back.sum())}
        return cls(genes, normalize, fitted_on, *image_mean, scale, theta, pi)

    def spots(self, n_genes: int, seed: np.random.SeedSequence, features: Any = None) -> Draw:
        self._check_genes(n_genes)
        if features is None:
            raise InputError(
                "features: the source 'conditional' draws around what they predict; give those of the spots"
            )
        if features.shape[1] != len(self.center):
            found = f"the source 'conditional' was fitted on {len(self.center)} features, not {features.shape[1]}"
            raise InputError(f"features: {found}; embed by the encoder of the training")
        generators, first = streams(seed, 3), 0

        def of_next(n_spots: int) -> np.ndarray:
            nonlocal first
            x_0 = np.empty((n_spots, n_genes), dtype=np.float32)
            for rows, mean in self._means(features, slice(first, first + n_spots)):
                drawn = zinb.draw(mean, self.theta, self.pi, generators)
                x_0[rows.start - first : rows.stop - first] = in_unit(drawn, self.normalize)
            first += n_spots
            return x_0

        return of_next

    def _means(self, features: Any, wanted: slice) -> Iterator[tuple[slice, np.ndarray]]:
        """Spots of those wanted, and the means of their counts [n, G]. Products are of so many spots from a multiple of
        that number on, so that a spot's bits are the same, whichever are wanted with it."""
        size = min(ROWS, max(1, PIECE // len(self.genes)))
        image_mean = ImageMean(self.center, self.projection, self.weights, self.ceiling)
        if wanted.stop > features.shape[0]:
            raise InputError(
                f"features: must have {wanted.stop} rows or more, not {features.shape[0]}; one for each spot"
            )
        for begin in range(wanted.start // size * size, wanted.stop, size):
            held = slice(begin, min(begin + size, features.shape[0]))
            padded = np.zeros((size, len(self.center)), np.float32)
            padded[: held.stop - begin] = rows_of_features(features, held, len(self.center))
            rows = slice(max(begin, wanted.start), min(begin + size, wanted.stop))
            mean = self.scale * _expected(image_mean.log1p_counts(image_mean.design(padded)))
            yield rows, mean[rows.start - begin : rows.stop - begin]


def _expected(log1p_counts: np.ndarray) -> np.ndarray:
    """Mean counts, float64, before they are scaled."""
    counts: np.ndarray = np.maximum(np.expm1(log1p_counts, dtype=np.float64), SMALLEST_MEAN)
    return counts


def _counts(slides: Sequence[Slide], genes: tuple[str, ...]) -> scipy.sparse.csr_matrix:
    """[N, G] counts of all slides."""
    parts = [scipy.sparse.csr_matrix(slide.expression(genes, "counts")) for slide in slides]
    return scipy.sparse.vstack(parts, format="csr")


def _histogram(slides: Sequence[Slide], genes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The different counts of all spots and genes, and how often each is there."""
    counts = _counts(slides, genes)
    values, times = np.unique(counts.data, return_counts=True)
    n_zeros = counts.shape[0] * counts.shape[1] - counts.nnz
    return np.append(0.0, values), np.append(n_zeros, times)


def _described(slides: Sequence[Slide]) -> dict[str, Any]:
    """What a source was fitted on."""
    return {"slides": [slide.id for slide in slides], "spots": sum(slide.n_spots for slide in slides)}

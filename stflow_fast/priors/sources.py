"""Source distributions of the flow: what ``x_0`` is drawn from.

A draw belongs to a slide: a spot's is a function of (seed, slide id, spot index), and of the spots' features
where the source reads them, and of nothing else, so neither packing, chunking, the number of workers nor the spots
behind it change it.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse

from ..errors import InputError
from ..slides import Slide
from ..threads import blocks_of
from . import zinb
from .image_mean import ROWS, ImageMean, blocks_of_features, fit_image_mean, rows_of_features
from .streams import PIECE, fingerprint, streams

Draw = Callable[[int], np.ndarray]
"""n to the x_0 [n, G] float32 of the next n spots, from the first on."""

Numbers = Callable[[int], np.ndarray]
"""n to the n numbers [n] float32 of a stream that follow those of the last call."""


class Source(abc.ABC):
    """What x_0 is drawn from."""

    name: str
    reads_features: ClassVar[bool] = False

    @abc.abstractmethod
    def spots(self, n_genes: int, seed: np.random.SeedSequence, features: Any = None) -> Draw:
        """What draws :meth:`draw`'s x_0 by blocks: n to that of the next n spots [n, n_genes], from the first on.

        Args:
            n_genes: as many as a fitted source was fitted for.
            seed: of the slide, see :func:`.streams.slide_seed`.
            features: [N, F] of the spots in the same order, an array, a tensor, or StoredRows; read by ``conditional``
                alone.

        Raises:
            InputError: another number of genes, or features that are missing or of another size.
        """

    @abc.abstractmethod
    def named(self) -> dict[str, Any]:
        """What tells it from others, for outputs (plain JSON types)."""

    def draw(self, n_spots: int, n_genes: int, seed: np.random.SeedSequence, features: Any = None) -> np.ndarray:
        """x_0 [n_spots, n_genes] float32, rows in the slide's own order of spots."""
        return self.spots(n_genes, seed, features)(n_spots)


def _gaussian(prior: Prior, seed: np.random.SeedSequence) -> Numbers:
    generator = np.random.Generator(np.random.Philox(seed))
    return lambda n: generator.standard_normal(n, dtype=np.float32)


def _zero(prior: Prior, seed: np.random.SeedSequence) -> Numbers:
    return lambda n: np.zeros(n, dtype=np.float32)


def _zinb(prior: Prior, seed: np.random.SeedSequence) -> Numbers:
    generators = streams(seed, 3)
    odds, zeros = np.exp(prior.logits), 1.0 / (1.0 + np.exp(-prior.zi_logits))

    def draw(n: int) -> np.ndarray:
        return _in_unit(zinb.draw_by_odds(n, prior.total_count, odds, zeros, generators), prior.normalize)

    return draw


_DRAWS: dict[str, Callable[[Prior, np.random.SeedSequence], Numbers]] = {
    "zinb": _zinb,
    "gaussian": _gaussian,
    "zero": _zero,
}

PRIORS = tuple(_DRAWS)


@dataclass(frozen=True)
class Prior(Source):
    """A source distribution, the same for every spot and gene.

    Attributes:
        name: ``zinb`` (published default), ``gaussian`` (standard normal) or ``zero``.
        total_count: inverse dispersion theta of the negative binomial.
        logits: its log odds; the mean count is ``total_count * exp(logits)``.
        zi_logits: log odds of an excess zero.

    ``zinb`` draws counts as the published code does (its defaults are these: theta 1, logits 0.1, half the draws
    zero) and returns log1p of them; the last three settings are for it alone.

    Raises:
        InputError: an unknown name, or a setting out of its range.
    """

    name: str = "zinb"
    total_count: float = 1.0
    logits: float = 0.1
    zi_logits: float = 0.0

    # No fields: what a prior is fitted for has its own.
    _law = ""  # what it draws as, where that is not its name
    normalize = "log1p"

    def __post_init__(self) -> None:
        if (self._law or self.name) not in PRIORS:
            raise InputError(f"prior: must be one of {', '.join(PRIORS)}, not {self.name!r}")
        if not (np.isfinite(self.total_count) and self.total_count > 0):
            raise InputError(f"total_count: must be above 0, not {self.total_count!r}")
        for field in ("logits", "zi_logits"):
            if not np.isfinite(getattr(self, field)):
                raise InputError(f"{field}: must be finite, not {getattr(self, field)!r}")

    def spots(self, n_genes: int, seed: np.random.SeedSequence, features: Any = None) -> Draw:
        numbers = _DRAWS[self._law or self.name](self, seed)

        def of_next(n_spots: int) -> np.ndarray:
            x_0 = np.empty((n_spots, n_genes), dtype=np.float32)
            flat = x_0.reshape(-1)
            for piece in blocks_of(flat.size, PIECE):
                flat[piece] = numbers(piece.stop - piece.start)
            return x_0

        return of_next

    @classmethod
    def of_training(cls, settings: Mapping[str, Any]) -> Prior:
        """The prior of a training, by the fields ``prior`` and ``prior_*`` of its TrainingConfig; else the default."""
        names = {"prior": "name", **{f"prior_{name}": name for name in ("total_count", "logits", "zi_logits")}}
        return cls(**{name: settings[field] for field, name in names.items() if field in settings})

    def named(self) -> dict[str, Any]:
        fields = ("name", "total_count", "logits", "zi_logits")
        return {field: getattr(self, field) for field in fields}

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


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

    name: ClassVar[str]
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
        best, reached = None, -np.inf
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
                x_0[rows] = _in_unit(zinb.draw(mean, self.theta, self.pi, generators), self.normalize)
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
                x_0[rows.start - first : rows.stop - first] = _in_unit(drawn, self.normalize)
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
    return np.maximum(np.expm1(log1p_counts, dtype=np.float64), SMALLEST_MEAN)


_FITTED: dict[str, type[FittedSource]] = {kind.name: kind for kind in (GridPrior, GeneZinb, Empirical, Conditional)}

SOURCES = (*PRIORS, *_FITTED)


def fit_source(name: str, slides: Sequence[Slide], genes: Sequence[str], normalize: str) -> FittedSource:
    """A source in the unit that a network predicts, fitted on its training slides.

    Args:
        name: one of :data:`SOURCES` that is fitted: not one of :data:`PRIORS`.
        slides: with counts, and for ``conditional`` with features.
        genes: the panel.
        normalize: the unit, see ``stflow_fast.slides.NORMALIZATIONS``.

    Raises:
        InputError: an unknown name, a unit that is not of counts where the source is, no slides, or slides that lack
            what is read.
    """
    if name not in _FITTED:
        raise InputError(f"source: must be one of {', '.join(_FITTED)} to be fitted, not {name!r}")
    if normalize == "cp10k_log1p" and _FITTED[name].of_counts:
        mend = "normalize by log1p or counts, or take empirical"
        raise InputError(f"source: {name} draws counts, which {normalize} is no unit of; {mend}")
    if not slides or not genes:
        raise InputError("source: is fitted on training slides and their genes; give some of both")
    return _FITTED[name].fitted(slides, tuple(genes), normalize)


def load_source(
    described: Mapping[str, Any], tensors: Mapping[str, np.ndarray], genes: tuple[str, ...]
) -> FittedSource:
    """The source that gave ``to_dict()`` and ``tensors()``.

    Raises:
        InputError: a source of other genes than ``genes``, of no known name, or with other parts than it has.
    """
    name = described.get("name") if isinstance(described, Mapping) else None
    if name not in _FITTED:
        raise InputError(f"source: must be one of {', '.join(_FITTED)}, not {name!r}")
    kind = _FITTED[name]
    parts = {**described, **tensors}
    wanted = {"name", *(field.name for field in dataclasses.fields(kind))}
    if set(parts) != wanted:
        other = ", ".join(sorted(set(parts) ^ wanted))
        raise InputError(f"source: {name} lacks parts, or has others ({other}); fit it again")
    parts["genes"] = tuple(parts["genes"])
    check_same_genes("source", parts["genes"], genes)
    del parts["name"]
    return kind(**parts)


def check_same_genes(name: str, fitted: Sequence[str], genes: Sequence[str]) -> None:
    """Raise InputError unless what is called ``name`` was fitted for these genes, in their order."""
    pairs = enumerate(itertools.zip_longest(fitted, genes, fillvalue="none"))
    differ = [(index, *pair) for index, pair in pairs if pair[0] != pair[1]]
    if differ:
        index, there, here = differ[0]
        found = f"{len(differ)} genes differ, the first is gene {index + 1}: {there} there, {here} here"
        raise InputError(f"{name}: was fitted for {len(fitted)} other genes ({found}); fit it again")


def _in_unit(counts: np.ndarray, normalize: str) -> np.ndarray:
    """Counts in the unit of x_1, in their own memory."""
    return counts if normalize == "counts" else np.log1p(counts, out=counts)


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

"""Observation models: what x_1 may be around the network's mean, gene by gene.

Samples of the network hardly differ, so their spread says nothing about how sure a prediction is. A law of x_1 around
its mean, fitted on spots that the network did not train on, does. Two are known:

* ``gaussian``: x_1 = max(0, m + sigma e) with e standard normal and one sigma for each gene, by maximum likelihood. m
  is such that x_1 has the network's mean: with m the mean itself (censored regression, Tobin 1958) the many zeros of
  shallow counts raise sigma, and draws are too high by .29 on fold 2 of her2st;
* ``zinb``: counts of a zero-inflated negative binomial with mean ``scale`` * the mean's counts, where x_1 are log1p of
  counts or counts (:mod:`.zinb`).

What the errors of a spot's genes have in common, and those of neighbours, is :mod:`.shared_error`'s.

A draw is a function of (seed, slide id, number of the draw, spot), of the mean, and of the places of the slide's spots,
whatever is drawn beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from scipy.special import gammaincinv, log_ndtr, ndtr, ndtri

from ..errors import InputError
from ..threads import blocks_of
from . import zinb
from .shared_error import SharedError, in_pitches
from .sources import check_same_genes
from .streams import fingerprint, slide_seed, streams

LEAST_SIGMA, SECTIONS = 1e-2, 40
"""In the unit of x_1, and how often the range from there to the largest x_1 is divided: to 1e-8 of it. A gene that is
never seen, whose zeros are the likelier the larger sigma is, ends there."""

SMALLEST, LARGEST = 1e-12, 1e12
"""Of what is above zero."""

STREAM = 7
"""Of a slide's randomness, beside that of its source."""

GENES_AT_ONCE = 512
"""Genes whose laws are fitted together."""

LEAST = 0.02
"""What a mean of none, or below, is taken for: x_1 may be above zero there too."""

TABLE = np.geomspace(1e-3, 1e7, 180)
TABLE_STEP = np.log(TABLE[1] / TABLE[0])
"""Mean counts whose moments are tabulated; at and between them a standard deviation is within 1 %."""

FEW = 200.0
"""Mean counts up to which moments are sums over the counts there may be."""

NEGLIGIBLE, MOST_COUNTED = 1e-6, 20_000
"""Probability of the counts that are left out of a sum, and how many are in it at most."""

LEVELS = (np.arange(256) + 0.5) / 256
"""Of the gamma law of a rate, over which moments of more counts are averaged."""


Values = Callable[[np.ndarray], np.ndarray]
"""Standard normal scores [n, G] float32, which may be written over, to x_1 [n, G] float32; it rises with them."""


class Law(Protocol):
    """One law for each of G genes."""

    name: ClassVar[str]
    ranges: ClassVar[dict[str, tuple[float, float]]]
    """Of the numbers of each parameter."""

    def parameters(self) -> dict[str, np.ndarray]:
        """The constructor's arguments, [G] float32 each."""

    def std(self, mean: np.ndarray) -> np.ndarray:
        """[n, G] standard deviation of x_1 around the mean [n, G]."""

    def values(self, mean: np.ndarray) -> Values:
        """What turns standard normal scores into x_1 around the mean [n, G]."""

    def scores(self, mean: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, G] each: bounds of the scores that x_1 = ``truth`` [n, G] may have, equal where only one may be."""


@dataclass(frozen=True)
class CensoredGaussian:
    """x_1 = max(0, m + sigma e), where the mean of x_1 is the network's; sigma [G] in the unit of x_1."""

    name: ClassVar[str] = "gaussian"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {"sigma": (SMALLEST, LARGEST)}
    sigma: np.ndarray

    @classmethod
    def fit(cls, mean: np.ndarray, truth: np.ndarray, normalize: str) -> CensoredGaussian:
        """Of the means [N, G] and what was measured [N, G]."""
        blocks, largest = blocks_of(mean.shape[1], GENES_AT_ONCE), float(truth.max(initial=0.0))
        return cls(np.concatenate([_likeliest_sigma(mean[:, genes], truth[:, genes], largest) for genes in blocks]))

    def parameters(self) -> dict[str, np.ndarray]:
        return {"sigma": self.sigma}

    def std(self, mean: np.ndarray) -> np.ndarray:
        ratio = _centre(mean, self.sigma)
        above = ndtr(ratio)
        first = ratio * above + _density(ratio)
        second = (np.square(ratio) + 1) * above + ratio * _density(ratio)
        std: np.ndarray = self.sigma * np.sqrt(np.maximum(second - np.square(first), 0.0))
        return std.astype(np.float32)

    def values(self, mean: np.ndarray) -> Values:
        centre = _centre(mean, self.sigma).astype(np.float32)

        def values(scores: np.ndarray) -> np.ndarray:
            scores += centre
            scores *= self.sigma
            np.maximum(scores, 0.0, out=scores)
            return scores

        return values

    def scores(self, mean: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high = truth / self.sigma - _centre(mean, self.sigma)
        return np.where(truth > 0, high, -np.inf), high


def _density(ratio: np.ndarray) -> np.ndarray:
    density: np.ndarray = np.exp(-0.5 * np.square(ratio)) / np.sqrt(2 * np.pi)
    return density


CENTRES = np.linspace(-6.0, 6.0, 4097)
LOG_MEANS = np.log(CENTRES * ndtr(CENTRES) + _density(CENTRES))
"""Of max(0, m + e): the logarithm of its mean, by m. Behind the last m the mean is m to 1e-10."""


def _centre(mean: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """m, in units of sigma, by the mean of x_1. It is sought in a table, linearly, to 1e-5."""
    ratio = np.maximum(mean, LEAST) / sigma
    centre: np.ndarray = np.where(ratio > CENTRES[-1], ratio, np.interp(np.log(ratio), LOG_MEANS, CENTRES))
    return centre


def _likeliest_sigma(mean: np.ndarray, truth: np.ndarray, largest: float) -> np.ndarray:
    """[G] of the largest likelihood, by golden section on its logarithm; at most ``largest``."""
    mean, truth = mean.astype(np.float64), truth.astype(np.float64)
    measured = truth > 0

    def loss(log_sigma: np.ndarray) -> np.ndarray:
        sigma = np.exp(log_sigma)
        centre = _centre(mean, sigma)
        of_measured = log_sigma + 0.5 * np.square(truth / sigma - centre)
        losses: np.ndarray = np.where(measured, of_measured, -log_ndtr(-centre)).sum(axis=0)
        return losses

    golden = (np.sqrt(5) - 1) / 2
    low, high = (np.full(mean.shape[1], np.log(bound)) for bound in (LEAST_SIGMA, max(largest, 2 * LEAST_SIGMA)))
    for _ in range(SECTIONS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        is_left = loss(left) < loss(right)
        low, high = np.where(is_left, low, left), np.where(is_left, right, high)
    sigma: np.ndarray = np.exp((low + high) / 2)
    return sigma.astype(np.float32)


@dataclass(frozen=True)
class ZinbCounts:
    """Counts of a zero-inflated negative binomial: its mean is scale [G] times the mean's counts, theta [G] its inverse
    dispersion, pi [G] the share of excess zeros. x_1 are log1p of counts where ``log`` is 1, else counts."""

    name: ClassVar[str] = "zinb"
    ranges: ClassVar[dict[str, tuple[float, float]]] = {
        **{"scale": (SMALLEST, LARGEST), "theta": (SMALLEST, LARGEST)},
        **{"pi": (0.0, np.nextafter(np.float32(1), np.float32(0))), "log": (0.0, 1.0)},
    }
    scale: np.ndarray
    theta: np.ndarray
    pi: np.ndarray
    log: np.ndarray

    @classmethod
    def fit(cls, mean: np.ndarray, truth: np.ndarray, normalize: str) -> ZinbCounts:
        """As of :class:`CensoredGaussian`."""
        log = np.float32(normalize == "log1p")
        found = zinb.fit(_measured(truth, log), _counts(mean, log))
        return cls(*(np.asarray(part, dtype=np.float32) for part in (found.scale, found.theta, found.pi, log)))

    def parameters(self) -> dict[str, np.ndarray]:
        return {"scale": self.scale, "theta": self.theta, "pi": self.pi, "log": self.log}

    def std(self, mean: np.ndarray) -> np.ndarray:
        counts = self.scale * _counts(mean, self.log)
        if not self.log:
            variance = (1 - self.pi) * counts * (1 + counts / self.theta + self.pi * counts)
        else:
            mean, variance = self._moments_of_log(counts)
            variance = (1 - self.pi) * (variance + self.pi * np.square(mean))
        std: np.ndarray = np.sqrt(variance)
        return std.astype(np.float32)

    def _moments_of_log(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, G] mean and variance of log1p of the negative binomial with means [n, G], between those of a table."""
        place = np.clip(np.log(counts / TABLE[0]) / TABLE_STEP, 0, len(TABLE) - 1)
        below = np.minimum(place.astype(np.int64), len(TABLE) - 2)
        share, gene = place - below, np.arange(counts.shape[1])
        mean, variance = ((1 - share) * table[below, gene] + share * table[below + 1, gene] for table in self._table)
        return mean, variance

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """[T, G] mean and variance of log1p of counts whose means are :data:`TABLE`."""
        theta, few = self.theta.astype(np.float64), TABLE <= FEW
        pairs = zip(_moments_of_few(TABLE[few], theta), _moments_of_many(TABLE[~few], theta), strict=True)
        first, second = (np.concatenate(pair) for pair in pairs)
        return first, np.maximum(second - np.square(first), 0.0)

    def values(self, mean: np.ndarray) -> Values:
        expected = self.scale * _counts(mean, self.log)

        def values(scores: np.ndarray) -> np.ndarray:
            counts = zinb.quantile(ndtr(scores.astype(np.float64)), expected, self.theta, self.pi)
            return (np.log1p(counts) if self.log else counts).astype(np.float32)

        return values

    def scores(self, mean: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts, expected = _measured(truth, self.log), self.scale * _counts(mean, self.log)
        low, high = (ndtri(zinb.cdf(upto, expected, self.theta, self.pi)) for upto in (counts - 1, counts))
        return low, high


def _moments_of_few(means: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, G] mean and mean square of log1p of negative binomial counts: sums over the counts, one after another."""
    share = means[:, None] / (means[:, None] + theta)
    probability = (1 - share) ** theta
    first, second, total, count = np.zeros_like(share), np.zeros_like(share), probability.copy(), 0
    while (total < 1 - NEGLIGIBLE).any() and count < MOST_COUNTED:
        probability = probability * (count + theta) / (count + 1) * share
        count += 1
        first += np.log1p(count) * probability
        second += np.log1p(count) ** 2 * probability
        total += probability
    return first, second


def _moments_of_many(means: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by the rates that counts are Poisson's around: the mean of log1p at a rate to second order, its variance
    to first."""
    rates = gammaincinv(theta, LEVELS[:, None]) / theta  # [levels, G], of mean one
    first, second = np.empty((2, len(means), len(theta)))
    for number, mean in enumerate(means):
        rate = mean * rates
        variance = rate / np.square(1 + rate)
        at_rate = np.log1p(rate) - variance / 2
        first[number], second[number] = at_rate.mean(axis=0), (np.square(at_rate) + variance).mean(axis=0)
    return first, second


def _measured(truth: np.ndarray, log: np.ndarray | np.float32) -> np.ndarray:
    """The counts that x_1 are of."""
    return np.round(np.expm1(truth)) if log else truth


def _counts(mean: np.ndarray, log: np.ndarray | np.float32) -> np.ndarray:
    """Counts that a mean of x_1 stands for: never none, or none could be drawn."""
    counts: np.ndarray = np.maximum(np.expm1(mean) if log else mean, LEAST)
    return counts


LAWS: dict[str, type[CensoredGaussian] | type[ZinbCounts]] = {law.name: law for law in (CensoredGaussian, ZinbCounts)}


def laws_of(normalize: str) -> tuple[str, ...]:
    """Those that x_1 in this unit may follow: counts per 10,000 are no counts."""
    return ("gaussian",) if normalize == "cp10k_log1p" else tuple(LAWS)


@dataclass(frozen=True)
class ObservationModel:
    """The law of x_1 around a network's mean, kept with the network.

    Attributes:
        genes: what it was fitted for, G names.
        law: of each.
        shared: what the errors of a spot's genes have in common.
        about: what it was fitted on, and what it reached there (plain JSON types).
    """

    genes: tuple[str, ...]
    law: Law
    shared: SharedError
    about: Mapping[str, Any]

    def std(self, mean: np.ndarray) -> np.ndarray:
        """[n, G] float32 standard deviation of x_1 around the mean [n, G]."""
        return self.law.std(mean)

    def quantile(self, mean: np.ndarray, percent: float) -> np.ndarray:
        """[n, G] float32 percentile of x_1 around the mean [n, G]."""
        return self.law.values(mean)(np.full(mean.shape, ndtri(percent / 100), dtype=np.float32))

    def drawer(self, seed: int, slide_id: str, n_draws: int, coords: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """What draws x_1 of a slide by blocks: the mean [n, G] of the next n spots, from the first on, to draws
        [n_draws, n, G] float32. ``coords`` [N, 2] are of all its spots."""
        root, first = slide_seed(seed, slide_id), 0
        of_draws = [_streams(root, number) for number in range(n_draws)]
        places = in_pitches(coords) if n_draws else coords  # of which nothing is drawn
        fields = [self.shared.drawn(places, for_field) for _, for_field in of_draws]

        def draw(mean: np.ndarray) -> np.ndarray:
            nonlocal first
            rows, values = slice(first, first + len(mean)), self.law.values(mean)
            drawn = np.empty((n_draws, *mean.shape), dtype=np.float32)
            for one, (generator, _), field in zip(drawn, of_draws, fields, strict=True):
                generator.standard_normal(out=one, dtype=np.float32)
                self.shared.mix_in(field[rows], one)
                one[:] = values(one)
            first = rows.stop
            return drawn

        return draw

    def named(self) -> dict[str, str]:
        """What tells it from others, for outputs."""
        return {"observation": self.law.name, "observation_sha256": fingerprint(self.tensors())}

    def to_dict(self) -> dict[str, Any]:
        return {"law": self.law.name, "genes": list(self.genes), **self.about}

    def tensors(self) -> dict[str, np.ndarray]:
        return {**self.law.parameters(), **self.shared.tensors()}


def load_observation(described: Any, tensors: Mapping[str, np.ndarray], genes: Sequence[str]) -> ObservationModel:
    """The inverse of :meth:`ObservationModel.to_dict` and :meth:`ObservationModel.tensors`, for a model of ``genes``.

    Raises:
        InputError: an unknown law, one fitted for other genes, or numbers that are missing or out of range.
    """
    if not isinstance(described, Mapping) or described.get("law") not in LAWS:
        raise InputError(f"observation: must describe one of {', '.join(LAWS)}, not {described!r}")
    about = dict(described)
    law, fitted_for = LAWS[about.pop("law")], tuple(about.pop("genes", ()))
    check_same_genes("observation", fitted_for, genes)
    for name, (low, high) in law.ranges.items():
        shape = () if name == "log" else (len(genes),)
        values = tensors.get(name)
        if values is None or values.shape != shape or not ((low <= values) & (values <= high)).all():
            raise InputError(
                f"observation: {name} must be {list(shape)} numbers from {low:g} to {high:.9g}; fit it again"
            )
    loading, field = (tensors.get(name, np.empty(0)) for name in ("loading", "field"))
    if loading.shape != (len(genes),) or field.shape != (3,) or not SharedError(loading, field).is_possible():
        raise InputError(
            "observation: has no numbers, or impossible ones, of what errors have in common; fit it again (calibrate)"
        )
    return ObservationModel(
        fitted_for, law(**{name: tensors[name] for name in law.ranges}), SharedError(loading, field), about
    )


def _streams(root: np.random.SeedSequence, number: int) -> list[np.random.Generator]:
    return streams(np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, STREAM, number)), 2)

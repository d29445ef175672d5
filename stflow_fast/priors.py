"""Source distributions of the flow: what ``x_0`` is drawn from.

A draw belongs to a slide: it is a function of (seed, slide id, spot index) and of nothing else, so neither packing,
spot order, chunking nor the number of workers changes a result.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import InputError


def slide_seed(seed: int, slide_id: str) -> np.random.SeedSequence:
    """The seed of everything random about one slide."""
    return np.random.SeedSequence([seed, zlib.crc32(slide_id.encode())])


def _gaussian(prior: Prior, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _zero(prior: Prior, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return np.zeros(shape, dtype=np.float32)


def _zinb(prior: Prior, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    rate = rng.standard_gamma(prior.total_count, shape, dtype=np.float32)
    rate *= np.float32(np.exp(prior.logits))
    counts = rng.poisson(rate).astype(np.float32)
    counts[rng.random(shape, dtype=np.float32) < 1.0 / (1.0 + np.exp(-prior.zi_logits))] = 0.0
    return np.log1p(counts, out=counts)


_DRAWS: dict[str, Callable[[Prior, np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "zinb": _zinb,
    "gaussian": _gaussian,
    "zero": _zero,
}

PRIORS = tuple(_DRAWS)


@dataclass(frozen=True)
class Prior:
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

    def __post_init__(self) -> None:
        if self.name not in PRIORS:
            raise InputError(f"prior: must be one of {', '.join(PRIORS)}, not {self.name!r}")
        if not (np.isfinite(self.total_count) and self.total_count > 0):
            raise InputError(f"total_count: must be above 0, not {self.total_count!r}")
        for field in ("logits", "zi_logits"):
            if not np.isfinite(getattr(self, field)):
                raise InputError(f"{field}: must be finite, not {getattr(self, field)!r}")

    def draw(self, n_spots: int, n_genes: int, seed: np.random.SeedSequence) -> np.ndarray:
        """x_0 [n_spots, n_genes] float32, rows in the slide's own order of spots."""
        return _DRAWS[self.name](self, np.random.Generator(np.random.Philox(seed)), (n_spots, n_genes))

    def to_dict(self) -> dict[str, str | float]:
        return dataclasses.asdict(self)

"""Source distributions of the flow: what ``x_0`` is drawn from.

A draw belongs to a slide: a spot's is a function of (seed, slide id, spot index) and of nothing else, so neither
packing, spot order, chunking, the number of workers nor the spots behind it change it.
"""

from __future__ import annotations

import dataclasses
import numbers
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InputError
from .threads import blocks_of

PIECE = 2**18
"""Numbers that are drawn together: what they are made of, wider than they are, stays in a cache, and is nothing beside
a slide's."""

Numbers = Callable[[int], np.ndarray]
"""n to the n numbers [n] float32 of a stream that follow those of the last call."""


def check_seed(seed: int) -> None:
    """Raise InputError unless ``seed`` is a whole number that every generator takes."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**63:
        raise InputError(f"seed: must be a whole number from 0 to 2^63 - 1, not {seed}")


def slide_seed(seed: int, slide_id: str) -> np.random.SeedSequence:
    """The seed of everything random about one slide."""
    return np.random.SeedSequence([seed, zlib.crc32(slide_id.encode())])


def _gaussian(prior: Prior, seed: np.random.SeedSequence) -> Numbers:
    generator = np.random.Generator(np.random.Philox(seed))
    return lambda n: generator.standard_normal(n, dtype=np.float32)


def _zero(prior: Prior, seed: np.random.SeedSequence) -> Numbers:
    return lambda n: np.zeros(n, dtype=np.float32)


def _zinb(prior: Prior, seed: np.random.SeedSequence) -> Numbers:
    # A stream for each of the three draws: each fills spot after spot, so that no spot depends on how many follow.
    for_rate, for_counts, for_zeros = (np.random.Generator(np.random.Philox(child)) for child in _spawn(seed, 3))
    scale, zeros = np.float32(np.exp(prior.logits)), 1.0 / (1.0 + np.exp(-prior.zi_logits))

    def draw(n: int) -> np.ndarray:
        rate = for_rate.standard_gamma(prior.total_count, n, dtype=np.float32)
        rate *= scale
        counts = for_counts.poisson(rate).astype(np.float32)
        counts[for_zeros.random(n, dtype=np.float32) < zeros] = 0.0
        return np.log1p(counts, out=counts)

    return draw


def _spawn(seed: np.random.SeedSequence, n: int) -> list[np.random.SeedSequence]:
    """``seed.spawn(n)``, but the same ones at every call."""
    return [np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, child)) for child in range(n)]


_DRAWS: dict[str, Callable[[Prior, np.random.SeedSequence], Numbers]] = {
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
        return self.spots(n_genes, seed)(n_spots)

    def spots(self, n_genes: int, seed: np.random.SeedSequence) -> Callable[[int], np.ndarray]:
        """What draws :meth:`draw`'s x_0 by blocks: n to that of the next n spots [n, n_genes], from the first on."""
        numbers = _DRAWS[self.name](self, seed)

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

    def to_dict(self) -> dict[str, str | float]:
        return dataclasses.asdict(self)

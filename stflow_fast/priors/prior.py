"""Source distributions of the flow, what ``x_0`` is drawn from, and those that need no fit.

A draw belongs to a slide: a spot's is a function of (seed, slide id, spot index), and of the spots' features
where the source reads them, and of nothing else, so neither packing, chunking, the number of workers nor the spots
behind it change it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import InputError
from ..threads import blocks_of
from . import zinb
from .streams import PIECE, streams

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
        return in_unit(zinb.draw_by_odds(n, prior.total_count, odds, zeros, generators), prior.normalize)

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
        """The fields (plain JSON types)."""
        return dataclasses.asdict(self)


def in_unit(counts: np.ndarray, normalize: str) -> np.ndarray:
    """Counts in the unit of x_1, in their own memory."""
    return counts if normalize == "counts" else np.log1p(counts, out=counts)

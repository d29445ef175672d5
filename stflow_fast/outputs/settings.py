"""What is written of predictions, and how."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import as_names
from ..errors import InputError
from ..slides.genes import other_spelling, some_of
from .layout import DTYPES, LAYOUT, SUFFIXES
from .spatialdata_store import check_spatialdata


@dataclass(frozen=True)
class OutputConfig:
    """How predictions are written.

    Attributes:
        to: "h5ad", or "spatialdata" for a zarr folder.
        dtype: of X, "float32" or "float16", which keeps three digits of a number in half of the space.
        genes: the genes to write, in this order; all that the model predicts when None. Sampling needs all of them.
        quantiles: percentiles of x_1 to write of a prediction with draws, 0 to 100; layers "q5", "q50", ...
        keep_draws: write the draws themselves too; layers "draw_0", "draw_1", ...

    Raises:
        InputError: a value out of its range, with the field's name, or a spatialdata that cannot be imported.
    """

    to: str = "h5ad"
    dtype: str = "float32"
    genes: Sequence[str] | None = None
    quantiles: tuple[float, ...] = ()
    keep_draws: bool = False

    def __post_init__(self) -> None:
        for field, known in (("to", SUFFIXES), ("dtype", DTYPES)):
            value = getattr(self, field)
            if value not in known:
                raise InputError(f"{field}: must be {' or '.join(known)}, not {value!r}")
        if self.to == "spatialdata":
            check_spatialdata()
        if self.genes is not None:
            object.__setattr__(self, "genes", _checked_genes(self.genes))
        beyond = [each for each in self.quantiles if not 0 < each < 100]
        if beyond:
            raise InputError(f"quantiles: must be percentiles between 0 and 100, such as 5,50,95, not {beyond[0]:g}")

    def layers(self, draws: int | None) -> tuple[str, ...]:
        """Names of what is written beside X of a prediction with so many draws.

        Raises:
            InputError: layers are wanted that only draws have.
        """
        if draws is None:
            if self.quantiles or self.keep_draws:
                name = "quantiles" if self.quantiles else "keep_draws"
                raise InputError(f"{name}: are of predictions with --draws; give it too")
            return ()
        kept = draws if self.keep_draws else 0
        return ("std", *(f"q{each:g}" for each in self.quantiles), *(f"draw_{number}" for number in range(kept)))

    def select(self, panel: Sequence[str]) -> np.ndarray | slice:
        """The columns to write of a prediction of the genes ``panel``: [g] of their numbers, or a slice of all.

        Raises:
            InputError: a gene that is not predicted.
        """
        if self.genes is None:
            return slice(None)
        column = {name: index for index, name in enumerate(panel)}
        missing = [name for name in self.genes if name not in column]
        if missing:
            raise InputError(
                f"genes: {len(missing)} of {len(self.genes)} are not among the {len(panel)} that the model predicts: "
                f"{some_of(missing)}{other_spelling(missing, panel, None)}"
            )
        return np.array([column[name] for name in self.genes])

    def describe(self, panel: Sequence[str]) -> dict[str, Any]:
        """What decides what is written of a prediction of the genes ``panel`` (plain JSON types)."""
        names = np.array(panel)[self.select(panel)].tolist()
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        layers: dict[str, Any] = {"quantiles": list(self.quantiles)} if self.quantiles else {}
        layers |= {"keep_draws": True} if self.keep_draws else {}
        return {"layout": LAYOUT, "to": self.to, "dtype": self.dtype, "genes_sha256": digest, **layers}

    def path(self, folder: Path, slide: str) -> Path:
        """Where the prediction of a slide goes."""
        return folder / f"{slide}{SUFFIXES[self.to]}"


def _checked_genes(genes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(as_names("genes", genes).tolist())
    if not names:
        raise InputError("genes: names no gene; leave it out to write all")
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InputError(f"genes: {twice[0]} is named twice; remove one")
    return names

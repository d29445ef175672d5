"""Sources by their names: fitted on training slides, and loaded with a model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..slides import Slide
from .fitted import Conditional, Empirical, FittedSource, GeneZinb, GridPrior
from .prior import PRIORS

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

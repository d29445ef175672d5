"""The numbers of a prediction, which are written block by block as they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError

CHUNK = (1024, 256)
"""Spots and genes of X that are stored together: a gene, and a neighbourhood, can be read without all the others."""


class Expression(NamedTuple):
    """The X and the layers of a prediction, which are written as they are made.

    Attributes:
        shape: (N, G) of each.
        dtype: "float32" or "float16".
        blocks: slices of the spots, one behind the other, and their X and layers [n, G]; gone through once.
        layers: their names.
    """

    shape: tuple[int, int]
    dtype: str
    blocks: Iterable[tuple[slice, Sequence[np.ndarray]]]
    layers: tuple[str, ...] = ()

    @property
    def places(self) -> list[str]:
        """Of X and the layers in a file."""
        return ["X", *(f"layers/{name}" for name in self.layers)]


def as_dtype(slide_id: str, expression: np.ndarray, dtype: str) -> np.ndarray:
    """[N, G] in the dtype that is written.

    Raises:
        InputError: numbers that are too large for it.
    """
    with np.errstate(over="ignore"):
        converted = expression.astype(dtype, copy=False)
    beyond = int(np.isinf(converted).sum())
    if beyond:
        largest = np.finfo(dtype).max
        raise InputError(
            f"slide {slide_id}: {beyond} of {converted.size} predicted numbers are beyond {largest}, the largest of "
            f"{dtype}; write --dtype float32"
        )
    return converted


def stored(expression: Expression) -> list[dict[str, Any]]:
    """How HDF5 and zarr are to store X and layers."""
    shape = expression.shape
    chunk = tuple(max(1, min(each)) for each in zip(shape, CHUNK, strict=True))
    return [{"name": name, "shape": shape, "dtype": expression.dtype, "chunks": chunk} for name in expression.places]


def fill(arrays: Sequence[Any], expression: Expression, reserve: Callable[[int], None]) -> None:
    """Write X and layers into arrays of HDF5 or zarr; ``reserve`` is called with the bytes that come next."""
    for array in arrays:
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    for rows, parts in expression.blocks:
        for array, part in zip(arrays, parts, strict=True):
            reserve(part.nbytes)
            array[rows] = part

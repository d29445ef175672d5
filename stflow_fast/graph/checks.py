"""What a graph is built of, checked."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ..arrays import as_tensor
from ..errors import InputError


def check_k(k: object) -> None:
    if not isinstance(k, numbers.Integral) or k < 1:
        raise InputError(f"k: must be a whole number of at least 1, not {k!r}")


def checked_coords(coords: Any) -> tuple[Tensor, Tensor]:
    """Coordinates [N, 2] as float64, in the caller's memory if they are that already, and [N] the rounding step of each
    spot's in the precision that they came in; both on the device of the coordinates."""
    given = as_tensor("coords", coords, ("N", 2))
    precision = torch.finfo(given.dtype).eps if given.dtype.is_floating_point else 0.0
    points = given.double()
    broken = int((~points.isfinite()).any(dim=1).sum())
    if broken:
        raise InputError(f"coords: {broken} of {len(points)} spots are NaN or infinite; remove them")
    return points, precision * points.abs().amax(dim=1)


def checked_ptr(slide_ptr: Any, n: int) -> Tensor:
    """[S + 1] int64 on the CPU."""
    given = as_tensor("slide_ptr", [0, n] if slide_ptr is None else slide_ptr, ("slides + 1",)).cpu()
    pointers = given.to(torch.int64, copy=True)
    if (
        len(pointers) < 2
        or pointers[0] != 0
        or pointers[-1] != n
        or (pointers.diff() < 0).any()
        or (pointers != given).any()
    ):
        raise InputError(f"slide_ptr: must rise from 0 to the number of spots ({n}), in whole numbers")
    return pointers

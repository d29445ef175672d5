"""Spots along a space-filling curve: each slide's grid, Morton codes, and the order by them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import checked_coords, checked_ptr

GRID_BITS = 16
"""The space order sees every slide as a square grid of 2^16 x 2^16 cells; a Morton code has twice as many bits."""


def space_order(coords: Tensor | np.ndarray, slide_ptr: Tensor | np.ndarray | None = None) -> Tensor:
    """Permutation [N] int64 that walks each slide along a Z-order curve, slide after slide: neighbours in space become
    neighbours in memory. On the device of the coordinates. Raises InputError like :func:`knn_graph`."""
    points, _ = checked_coords(coords)
    order, _ = order_and_code(points, checked_ptr(slide_ptr, len(points)))
    return order


def order_and_code(points: Tensor, slide_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation [N], stable, and the Morton codes [N] int64 in its order."""
    code = morton_code(spot_grid(points, slide_ptr).position.long())
    key = slide_keys(code, slide_of_rows(slide_ptr, points.device))
    order = key.argsort(stable=True)
    return order, code[order]


class SpotGrid(NamedTuple):
    """Each slide's square grid of 2^16 x 2^16 cells, from the slide's lowest coordinates to its largest extent."""

    position: Tensor  # [N, 2] float64, in cells: its whole part is the spot's column and row
    width: Tensor  # [N] float64 of a cell of the spot's slide, in the unit of the coordinates
    last: Tensor  # [N, 2] int64 highest column and row that a spot of its slide is in


def spot_grid(points: Tensor, slide_ptr: Tensor) -> SpotGrid:
    """The grid of each slide. ``points`` [N, 2] float64, ``slide_ptr`` [S + 1] int64; both as :func:`knn_graph` wants
    them, unchecked."""
    slides = [part if len(part) else part.new_zeros(1, 2) for part in points.split(slide_ptr.diff().tolist())]
    low, high = (torch.stack([getattr(slide, bound)(dim=0) for slide in slides]) for bound in ("amin", "amax"))
    extent = (high - low).amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    last = (high - low) / extent * (2**GRID_BITS - 1)
    slide = slide_of_rows(slide_ptr, points.device)
    position = (points - low[slide]) / extent[slide] * (2**GRID_BITS - 1)
    return SpotGrid(position, (extent / (2**GRID_BITS - 1))[slide, 0], last.long()[slide])


def morton_code(cells: Tensor) -> Tensor:
    """Bits of column and row interleaved: [..., 2] int64 below 2^16 -> [...] int64 below 2^32. The cells of a coarser
    grid, 2^b x 2^b, are ranges of codes: those with the same leading 2 b bits."""
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        cells = (cells | (cells << shift)) & mask
    return cells[..., 0] | (cells[..., 1] << 1)


def slide_of_rows(slide_ptr: Tensor, device: torch.device) -> Tensor:
    """[N] int64 slide of each row, on ``device``, from ``slide_ptr`` [S + 1]."""
    sizes = slide_ptr.diff()
    return torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes.to(device))


def slide_keys(code: Tensor, slide: Tensor) -> Tensor:
    """int64 that sort by (slide, Morton code); the code behind a slide's last is the next slide's first."""
    return (slide << 2 * GRID_BITS) + code

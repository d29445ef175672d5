"""The nearest spots of each spot: exact, but for ties on lattices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .checks import check_k, checked_coords, checked_ptr
from .lattices import WITNESSES, lattice_tolerance, rounding_steps
from .order import order_and_code
from .table import MISSING, NeighborSearch
from .trees import Forest


def knn_graph(coords: Tensor | np.ndarray, k: int, slide_ptr: Tensor | np.ndarray | None = None) -> Tensor:
    """The ``k`` nearest other spots of each spot, never across slides.

    Order within a row: float64 distance of the coordinates as they are given (on a lattice, ties within
    :func:`lattice_tolerance`), then spot index. Duplicated coordinates are neighbours at distance zero. Published:
    ``_build_graph`` of SpatialTransformer, a dense N x N top-k in the precision of the coordinates.

    Args:
        coords: [N, 2] positions, any unit, finite.
        k: neighbours wanted, at least 1.
        slide_ptr: [S + 1] first spot of each slide and N at the end; one slide when None.

    Returns:
        [N, k] int64 on the CPU; :data:`MISSING` where a slide has k spots or fewer.

    Raises:
        InputError: k below 1, coordinates of the wrong shape or not finite, slide_ptr that does not cover 0..N.
    """
    check_k(k)
    points, resolution = checked_coords(coords)
    rows = find_neighbors(points.cpu(), resolution.cpu(), checked_ptr(slide_ptr, len(points)), k, None)
    spots = torch.where(rows.neighbors == MISSING, MISSING, rows.order[rows.neighbors])
    return torch.empty_like(spots).index_copy_(0, rows.order, spots)


class Rows(NamedTuple):
    """Spots in space order, and their neighbours."""

    order: Tensor  # [N] int64 the caller's spot of each row
    points: Tensor  # [N, 2] float64
    neighbors: Tensor  # [N, K] int64 rows
    tied: Tensor  # [N] float64 of :func:`lattice_tolerance`


def find_neighbors(
    points: Tensor, resolution: Tensor, slide_ptr: Tensor, k: int, search: NeighborSearch | None
) -> Rows:
    """Searched exactly at first; again if there are lattices, with their tolerance."""
    order, code = order_and_code(points, slide_ptr)
    points, resolution = points[order], rounding_steps(points, resolution, slide_ptr)[order]
    if search is None:
        find = Forest(points, code, slide_ptr, order, max(k, WITNESSES)).nearest
    else:

        def find(tied: Tensor, k: int) -> Tensor:
            return search(points, code, slide_ptr, tied, order, k)

    exact = find(torch.zeros_like(resolution), max(k, WITNESSES))
    tied = lattice_tolerance(points, exact[:, :WITNESSES], resolution)
    neighbors = find(tied, k) if tied.any() else exact[:, :k].contiguous()
    return Rows(order, points, neighbors, tied)

"""SpotGraph: spots of one or many slides in space order, their neighbours and the geometry of their edges.

Everything here depends on coordinates alone, so it is made once per slide and reused by every layer and flow step.
It is computed in float64, exact enough for the tie rules below that a rotated, mirrored or shifted slide yields the
same table and, to rounding, the same geometry. Neighbours are found on the CPU by scipy's k-d tree, which defines
them, or on a device by a :class:`NeighborSearch` that is handed in (``stflow_fast.kernels.neighbors.nearest``).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .errors import InputError

MISSING = -1
"""Entry of a neighbour table where a spot has fewer than K neighbours."""

TIE_TOLERANCE = 1e-6
"""Distances closer than this, relative to themselves, are tied: the smaller spot index comes first."""

ISOTROPY_TOLERANCE = 1e-6
"""A neighbourhood whose two eigenvalues differ by less than this, relative to their sum, has no principal axis."""

RESOLUTION_STEPS = 4
"""Both tolerances grow to this many rounding steps of the coordinates as they came in: float32 pixels of a slide of
20,000 pixels are rounded to 0.001, 1e-5 of a spot's distance to its neighbour. Pixels rounded to whole numbers are not
a lattice any more, and nothing is made of their ties."""

GRID_BITS = 16
"""The space order sees every slide as a square grid of 2^16 x 2^16 cells; a Morton code has twice as many bits."""

EDGES_AT_ONCE = 2**19
"""Edges whose geometry is computed together: 80 MB of float64 temporaries. On a CPU a half faster than all at once
(0.16 s for 2.4M edges, and 0.27 s), as are 2^14 and 2^20."""


def knn_graph(coords: Tensor | np.ndarray, k: int, slide_ptr: Tensor | np.ndarray | None = None) -> Tensor:
    """The ``k`` nearest other spots of each spot, never across slides.

    Order within a row: distance (ties within :data:`TIE_TOLERANCE`), then spot index. Duplicated coordinates are
    neighbours at distance zero. Published: ``_build_graph`` of SpatialTransformer, a dense N x N top-k.

    Args:
        coords: [N, 2] positions, any unit, finite; float32 ones are tied within their rounding
            (:data:`RESOLUTION_STEPS`).
        k: neighbours wanted, at least 1.
        slide_ptr: [S + 1] first spot of each slide and N at the end; one slide when None.

    Returns:
        [N, k] int64 on the CPU; :data:`MISSING` where a slide has k spots or fewer.

    Raises:
        InputError: k below 1, coordinates of the wrong shape or not finite, slide_ptr that does not cover 0..N.
    """
    _check_k(k)
    points, resolution = _checked_coords(coords)
    return _neighbor_table(points, resolution, k, _checked_ptr(slide_ptr, len(points)))


def _neighbor_table(points: Tensor, resolution: Tensor, k: int, slide_ptr: Tensor) -> Tensor:
    places, tied = points.cpu().numpy(), RESOLUTION_STEPS * resolution.cpu().numpy()
    table = np.full((len(points), k), MISSING, dtype=np.int64)
    for start, stop in itertools.pairwise(slide_ptr.tolist()):
        found = _slide_neighbors(places[start:stop], k, tied[start:stop])
        table[start:stop, : found.shape[1]] = found + start
    return torch.from_numpy(table)


def _check_k(k: int) -> None:
    if k < 1:
        raise InputError(f"k: must be at least 1, not {k}")


def _checked_coords(coords: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Coordinates [N, 2] as float64, and [N] the rounding step of each spot's in the precision that they came in; both
    on the device of the coordinates."""
    if isinstance(coords, Tensor):
        precision = torch.finfo(coords.dtype).eps if coords.dtype.is_floating_point else 0.0
    else:
        coords = np.asarray(coords)
        precision = float(np.finfo(coords.dtype).eps) if coords.dtype.kind == "f" else 0.0
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise InputError(f"coords: must have shape [N, 2], not {list(coords.shape)}")
    if isinstance(coords, Tensor):
        points = coords.detach().double()
    else:
        points = torch.from_numpy(coords.astype(np.float64))
    broken = int((~points.isfinite()).any(dim=1).sum())
    if broken:
        raise InputError(f"coords: {broken} of {len(points)} spots are NaN or infinite; remove them")
    return points, precision * points.abs().amax(dim=1)


def _checked_ptr(slide_ptr: Tensor | np.ndarray | None, n: int) -> Tensor:
    """[S + 1] int64 on the CPU."""
    if isinstance(slide_ptr, Tensor):
        slide_ptr = slide_ptr.cpu()
    pointers = np.asarray([0, n] if slide_ptr is None else slide_ptr, dtype=np.int64)
    if (
        pointers.ndim != 1
        or len(pointers) < 2
        or pointers[0] != 0
        or pointers[-1] != n
        or (np.diff(pointers) < 0).any()
    ):
        raise InputError(f"slide_ptr: must rise from 0 to the number of spots ({n})")
    return torch.tensor(pointers)


def _slide_neighbors(points: np.ndarray, k: int, tied: np.ndarray) -> np.ndarray:
    """[n, min(k, n - 1)] neighbours within one slide; distances of a spot that differ by less than its ``tied`` [n] are
    equal."""
    n = len(points)
    wanted = min(k, n - 1)
    table = np.empty((n, max(wanted, 0)), dtype=np.int64)
    if wanted < 1:
        return table
    eligible = _first_in_place(points, k + 1)
    tree = cKDTree(points[eligible])
    rows = np.arange(n)
    candidates = min(len(eligible), wanted + 1 + 8)
    while len(rows):
        # A shell of ties may reach past the candidates (lattices, duplicates): ask again, for those rows alone.
        unsettled = []
        chunk = max(1, 2**23 // candidates)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            distance, index = tree.query(points[part], k=candidates, workers=-1)
            found = _order_ties(part, distance, eligible[index], wanted, tied[part])
            settled = found.settled | (candidates == len(eligible))
            table[part[settled]] = found.neighbors[settled]
            unsettled.append(part[~settled])
        rows = np.concatenate(unsettled)
        candidates = min(len(eligible), candidates * 4)
    return table


def _first_in_place(points: np.ndarray, most: int) -> np.ndarray:
    """Ascending indices of the first ``most`` points of every place: the others of a place are nobody's neighbours."""
    order = np.lexsort(points.T)
    moved = (np.diff(points[order], axis=0) != 0).any(axis=1)
    first = np.concatenate([[0], np.flatnonzero(moved) + 1])
    rank = np.arange(len(points)) - np.repeat(first, np.diff(first, append=len(points)))
    return np.sort(order[rank < most])


class _Nearest(NamedTuple):
    neighbors: np.ndarray  # [n, wanted]
    settled: np.ndarray  # [n] whether no tie reaches past the candidates


def _order_ties(spots: np.ndarray, distance: np.ndarray, index: np.ndarray, wanted: int, tied: np.ndarray) -> _Nearest:
    """Sort each row's candidates by (tie group, index), without the spot itself."""
    step = np.diff(distance, axis=1, prepend=distance[:, :1])
    group = (step > np.maximum(TIE_TOLERANCE * distance, tied[:, None])).cumsum(axis=1)
    last = group[:, -1]
    # Among many duplicates a spot may not be its own candidate.
    group = np.where(index == spots[:, None], len(group[0]), group)
    order = np.lexsort((index, group), axis=1)[:, :wanted]
    farthest = np.take_along_axis(group, order[:, -1:], axis=1)[:, 0]
    return _Nearest(np.take_along_axis(index, order, axis=1), farthest < last)


def space_order(coords: Tensor | np.ndarray, slide_ptr: Tensor | np.ndarray | None = None) -> Tensor:
    """Permutation [N] int64 that walks each slide along a Z-order curve, slide after slide: neighbours in space become
    neighbours in memory. On the device of the coordinates. Raises InputError like :func:`knn_graph`."""
    points, _ = _checked_coords(coords)
    order, _ = _space_order(points, _checked_ptr(slide_ptr, len(points)))
    return order


def _space_order(points: Tensor, slide_ptr: Tensor) -> tuple[Tensor, Tensor]:
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


def edge_geometry(
    coords: Tensor, neighbors: Tensor, resolution: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Frame-projected offsets and distances of all edges.

    For spot i with neighbours j: the offsets c_j - c_i, centred on their mean, are projected on the eigenvectors of
    their 2 x 2 covariance (ascending eigenvalues, as ``torch.linalg.eigh`` orders them; closed form here). The four
    sign choices of the two axes are the frames of frame averaging (Puny et al. 2022; STFlow section 4.2).

    An isotropic neighbourhood (every regular lattice has them) has no principal axes; its second axis then points to
    its first neighbour at a distance above zero, which moves with the tissue as a frame must.

    Args:
        coords: [N, 2] float64.
        neighbors: [N, K] int64, :data:`MISSING` where there is none.
        resolution: [N] float64 steps to which the coordinates are rounded; as good as exact when None.
        dtype: of the result, which is computed in float64.

    Returns:
        [N, K, 3]: projections on the minor and the major axis, and |c_j - c_i|. Zero for missing neighbours.
    """
    geometry = torch.empty(*neighbors.shape, 3, dtype=dtype, device=coords.device)
    rows = max(1, EDGES_AT_ONCE // neighbors.shape[1])
    for start in range(0, len(neighbors), rows):
        part = slice(start, start + rows)
        steps = None if resolution is None else resolution[part]
        geometry[part] = _project_edges(coords, coords[part], neighbors[part], steps)
    return geometry


def _project_edges(coords: Tensor, centers: Tensor, neighbors: Tensor, resolution: Tensor | None) -> Tensor:
    """[n, K, 3] float64 of the spots at ``centers`` [n, 2]."""
    present = (neighbors != MISSING).unsqueeze(-1)
    offsets = (coords[neighbors.clamp(min=0)] - centers.unsqueeze(1)) * present
    distance = offsets.norm(dim=-1, keepdim=True)
    mean = offsets.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (offsets - mean) * present
    xx, yy = centred.square().sum(dim=1).unbind(-1)
    xy = centred.prod(dim=-1).sum(dim=1)
    angle = 0.5 * torch.atan2(2 * xy, xx - yy)
    gap = torch.hypot(2 * xy, xx - yy)
    spread = xx + yy
    tolerance = ISOTROPY_TOLERANCE * spread
    if resolution is not None:
        rounded = RESOLUTION_STEPS * resolution * (neighbors.shape[1] * spread).sqrt()
        tolerance = torch.maximum(tolerance, rounded)
    isotropic = gap <= tolerance
    first = offsets[torch.arange(len(offsets), device=offsets.device), (distance.squeeze(-1) > 0).int().argmax(dim=1)]
    angle = torch.where(isotropic, torch.atan2(first[:, 1], first[:, 0]), angle)
    cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
    x, y = centred.unbind(-1)
    return torch.stack([cos * y - sin * x, cos * x + sin * y, distance.squeeze(-1)], dim=-1)


class NeighborSearch(Protocol):
    """Finds neighbours on the device of its tensors, equal entry by entry to :func:`knn_graph`."""

    def __call__(self, points: Tensor, code: Tensor, slide_ptr: Tensor, tied: Tensor, spot: Tensor, k: int) -> Tensor:
        """Rows [N, k] int64 of the nearest spots, :data:`MISSING` where there is none.

        Args:
            points: [N, 2] float64 in space order.
            code: [N] int64 Morton codes, sorted within each slide.
            slide_ptr: [S + 1] int64 on the CPU.
            tied: [N] float64; distances from a spot that differ by less are equal.
            spot: [N] int64 the caller's index of each row: it decides between equal distances.
            k: neighbours wanted.
        """


def transpose_neighbors(neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Edges by the spot that they arrive at: by them, sums over arriving edges have one order, so the same bits.

    Args:
        neighbors: [N, K] int64, :data:`MISSING` where there is none.

    Returns:
        [N * K] int64 edges (row * K + slot) sorted by neighbour, those that are missing first; and [N + 1] int64 where
        each spot's begin.
    """
    arrivals, edges = neighbors.flatten().sort(stable=True)
    return edges, torch.searchsorted(arrivals, torch.arange(len(neighbors) + 1, device=neighbors.device))


@dataclass(frozen=True)
class SpotGraph:
    """One slide, or several packed one after another without padding, in space order.

    Attributes:
        order: [N] int64; row n of the graph is spot ``order[n]`` of the input.
        neighbors: [N, K] int64 rows of the graph, :data:`MISSING` where there is none.
        geometry: [N, K, 3] from :func:`edge_geometry`, in the model's dtype.
        slide_ptr: [S + 1] int64 first row of each slide, N at the end.
        slide_of: [N] int64 slide of each row.
        spot_id: [N] int64 original index of each spot within its own slide: randomness is counted by it.
    """

    order: Tensor
    neighbors: Tensor
    geometry: Tensor
    slide_ptr: Tensor
    slide_of: Tensor
    spot_id: Tensor

    @classmethod
    def build(
        cls,
        coords: Tensor | np.ndarray,
        k: int,
        slide_ptr: Tensor | np.ndarray | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        search: NeighborSearch | None = None,
    ) -> SpotGraph:
        """Build from coordinates [N, 2]; ``slide_ptr`` [S + 1] marks packed slides. Raises like :func:`knn_graph`.

        Ties are broken by the caller's spot index, not by the row.

        Args:
            coords: [N, 2] as for :func:`knn_graph`.
            k: neighbours wanted, at least 1.
            slide_ptr: [S + 1] first spot of each slide and N at the end; one slide when None.
            dtype: of the geometry.
            device: where the graph is wanted.
            search: finds neighbours on ``device``, where all the rest is then made too. On the CPU by a k-d tree
                when None.
        """
        _check_k(k)
        points, resolution = _checked_coords(coords)
        slide_ptr = _checked_ptr(slide_ptr, len(points))
        workplace = torch.device("cpu" if search is None else device)
        points, resolution = points.to(workplace), resolution.to(workplace)
        order, code = _space_order(points, slide_ptr)
        ordered = points[order]
        if search is None:
            neighbors = _table_of_rows(_neighbor_table(points, resolution, k, slide_ptr), order)
        else:
            neighbors = search(ordered, code, slide_ptr, RESOLUTION_STEPS * resolution[order], order, k)
        slide_of = slide_of_rows(slide_ptr, workplace)
        boundaries = slide_ptr.to(workplace)
        return cls(
            order=order,
            neighbors=neighbors,
            geometry=edge_geometry(ordered, neighbors, resolution[order], dtype),
            slide_ptr=boundaries,
            slide_of=slide_of,
            spot_id=order - boundaries[slide_of],
        ).to(device)

    @functools.cached_property
    def arriving(self) -> tuple[Tensor, Tensor]:
        """:func:`transpose_neighbors` of the graph, made once for all layers of a training step."""
        return transpose_neighbors(self.neighbors)

    @property
    def n_spots(self) -> int:
        return len(self.order)

    @property
    def n_slides(self) -> int:
        return len(self.slide_ptr) - 1

    def to_rows(self, values: Tensor) -> Tensor:
        """Bring [N, ...] from the caller's order into the graph's."""
        return values[self.order]

    def to_spots(self, rows: Tensor) -> Tensor:
        """Bring [N, ...] from the graph's order back into the caller's."""
        return torch.empty_like(rows).index_copy_(0, self.order, rows)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SpotGraph:
        """The graph on a device; ``dtype`` is that of the geometry."""
        moved = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__}
        moved["geometry"] = moved["geometry"].to(dtype or self.geometry.dtype)
        return replace(self, **moved)


def _table_of_rows(table: Tensor, order: Tensor) -> Tensor:
    """A neighbour table [N, K] in the caller's spots, in rows of the graph instead."""
    row_of = torch.empty_like(order)
    row_of[order] = torch.arange(len(order))
    table = table[order]
    return torch.where(table == MISSING, MISSING, row_of[table.clamp(min=0)]) if len(order) else table

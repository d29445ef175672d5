"""SpotGraph: spots of one or many slides in space order, their neighbours and the geometry of their edges.

Everything here depends on coordinates alone, so it is made once per slide and reused by every layer and flow step.
It is computed in float64. Neighbours are the exact ones, by distance and then spot index; on a lattice, where many
spots are at one distance, distances within the rounding of the coordinates are equal (:func:`lattice_tolerance`), so
that a rotated, mirrored or shifted lattice yields the same table and, to rounding, the same geometry. They are found on
the CPU by scipy's k-d tree, which defines them, or on a device by a :class:`NeighborSearch` that is handed in
(``stflow_fast.kernels.neighbors.nearest``).
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .arrays import as_tensor
from .errors import InputError
from .threads import blocks_of, in_turn, thread_count

MISSING = -1
"""Entry of a neighbour table where a spot has fewer than K neighbours."""

TIE_TOLERANCE = 1e-6
"""On a lattice, distances that differ by no more than this, relative to the pitch, are tied: the smaller spot index
comes first."""

RESOLUTION_STEPS = 4
"""On a lattice, distances that differ by no more than this many rounding steps of the coordinates as they came in are
tied as well: float32 pixels of a slide of 20,000 pixels are rounded to 0.002. Rounding moves two distances from a spot
apart by up to 2.83 steps (half a step in each of the coordinates of three spots)."""

WITNESSES = 8
"""A spot and this many nearest ones say whether it lies on a lattice, whatever K is: inside any lattice they stand in
pairs on opposite sides, which are four ties."""

NEAR_MISSES = 8
"""Two distances next to each other in their order, which are not tied but within so many tolerances, are a near miss.

Where distances are independent, those are seven times as many as ties; on a lattice, where distances are equal or
clearly apart, there are next to none. A spot lies on a lattice if it and its witnesses see, together, at least as many
ties as they are, and more than twice as many as near misses. Counted, in float64 and in float32 at 20,000 and 100,000
pixels, 10,000 spots at a time: no uniform or clustered ones, whatever their density, and none of a hexagonal lattice
jittered by 0.1 % of its pitch or more (in float32, by 0.05 %: 1 in 10,000; by 0.02 %, ten roundings: most); all of
hexagonal, square and rectangular lattices, at edges too and with half of the spots missing; all of oblique ones, and
with 30 % or 50 % missing all but 0.4 % or 2.4 %."""

PITCHES = 64
"""A tolerance of more than the pitch over this tells nothing from anything: no lattice."""

ISOTROPY_TOLERANCE = 1e-6
"""A neighbourhood whose two eigenvalues differ by less than this, relative to their sum, has no principal axis; on a
lattice the tolerance grows to what the tolerance of its distances makes of them."""

GRID_BITS = 16
"""The space order sees every slide as a square grid of 2^16 x 2^16 cells; a Morton code has twice as many bits."""

SPARE_CANDIDATES = 5
"""Candidates beyond the neighbours wanted that the k-d tree is asked for at first: the eighth neighbour of a hexagonal
lattice is tied with four more, and behind those is the fifth."""

CANDIDATES_AT_ONCE = 2**18
"""Candidates in memory together: 2 MB for each of their distances, ranks and groups. Sorting those of 300,000 spots
takes 0.10 s, and 0.18 s in parts of 2^23, which leave the cache."""

NOBODY = 2**63 - 1
"""Rank behind all others: of a spot among its own candidates."""

EDGES_AT_ONCE = 2**19
"""Edges whose geometry is computed together: 80 MB of float64 temporaries. On a CPU a half faster than all at once
(0.16 s for 2.4M edges, and 0.27 s), as are 2^14 and 2^20."""

SMOOTHED_AT_ONCE = 2**22
"""Numbers of a block of spots whose neighbours are averaged: 16 MB each of what is gathered and of the sum."""


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
    _check_k(k)
    points, resolution = _checked_coords(coords)
    rows = _find_neighbors(points.cpu(), resolution.cpu(), _checked_ptr(slide_ptr, len(points)), k, None)
    spots = torch.where(rows.neighbors == MISSING, MISSING, rows.order[rows.neighbors])
    return torch.empty_like(spots).index_copy_(0, rows.order, spots)


class _Rows(NamedTuple):
    """Spots in space order, and their neighbours."""

    order: Tensor  # [N] int64 the caller's spot of each row
    points: Tensor  # [N, 2] float64
    neighbors: Tensor  # [N, K] int64 rows
    tied: Tensor  # [N] float64 of :func:`lattice_tolerance`


def _find_neighbors(
    points: Tensor, resolution: Tensor, slide_ptr: Tensor, k: int, search: NeighborSearch | None
) -> _Rows:
    """Searched exactly at first; again if there are lattices, with their tolerance."""
    order, code = _space_order(points, slide_ptr)
    points, resolution = points[order], _rounding_steps(points, resolution, slide_ptr)[order]
    forest = _Forest(points, code, slide_ptr, order, max(k, WITNESSES)) if search is None else None

    def find(tied: Tensor, k: int) -> Tensor:
        return forest.nearest(tied, k) if forest else search(points, code, slide_ptr, tied, order, k)

    exact = find(torch.zeros_like(resolution), max(k, WITNESSES))
    tied = lattice_tolerance(points, exact[:, :WITNESSES], resolution)
    neighbors = find(tied, k) if tied.any() else exact[:, :k].contiguous()
    return _Rows(order, points, neighbors, tied)


def _rounding_steps(points: Tensor, resolution: Tensor, slide_ptr: Tensor) -> Tensor:
    """``resolution`` [N], but 0 in slides of whole and half numbers alone (pixels, and centres of patches): those are
    exact whatever they came in as. A row of a lattice may be whole, and the next one not, so slides are asked."""
    slide = slide_of_rows(slide_ptr, points.device)
    fractional = (2 * points != (2 * points).round()).any(dim=1)
    rounded = torch.zeros(len(slide_ptr) - 1, dtype=torch.bool, device=points.device)
    rounded[slide[fractional]] = True
    return resolution.masked_fill(~rounded[slide], 0)


def lattice_tolerance(points: Tensor, nearest: Tensor, resolution: Tensor) -> Tensor:
    """Distances from a spot that differ by no more than this are equal: 0 where the spot does not lie on a lattice.

    On one it is :data:`TIE_TOLERANCE` of the pitch (the distance to the nearest other place), or, if that is more,
    :data:`RESOLUTION_STEPS` of the coarsest rounding among the spot and its witnesses; :data:`NEAR_MISSES` says what a
    lattice is. Where nothing is rounded, what is equal is exactly equal, and needs no tolerance.

    Args:
        points: [N, 2] float64.
        nearest: [N, :data:`WITNESSES`] int64 rows, in the order of distance and then spot index.
        resolution: [N] float64 rounding step of each spot's coordinates, 0 where they are exact.

    Returns:
        [N] float64.
    """
    n, size = len(points), max(1, EDGES_AT_ONCE // WITNESSES)
    blocks = blocks_of(n, size)
    # What is missing (-1) is the last.
    places = torch.nn.functional.pad(points.T, (0, 1), value=torch.inf)
    steps = torch.nn.functional.pad(resolution, (0, 1))
    tolerance, counts = torch.zeros_like(resolution), nearest.new_zeros(2, n + 1)
    for rows in blocks:
        tolerance[rows], counts[:, rows] = _count_ties(places, steps, rows, nearest[rows])
    for rows in blocks:
        witnesses = nearest[rows]
        ties, misses = counts[:, rows] + counts[:, witnesses].sum(dim=-1)
        asked = 1 + (witnesses != MISSING).sum(dim=1)
        tolerance[rows] *= (ties >= asked) & (ties > 2 * misses)
    return tolerance


def _count_ties(places: Tensor, steps: Tensor, rows: slice, witnesses: Tensor) -> tuple[Tensor, Tensor]:
    """The tolerance [n] of each row if it lies on a lattice, 0 if it cannot, and [2, n] its ties and near misses."""
    offsets = places[:, witnesses] - places[:, rows, None]
    distance = _length(offsets)
    pitch = distance.masked_fill(distance == 0, torch.inf).amin(dim=1)
    step = torch.maximum(steps[rows], steps[witnesses].amax(dim=1))
    tolerance = torch.maximum(TIE_TOLERANCE * pitch, RESOLUTION_STEPS * step)
    tolerance.masked_fill_((step == 0) | (PITCHES * tolerance >= pitch), 0)
    gap, near = distance.diff(dim=1), NEAR_MISSES * tolerance[:, None]
    # Two spots in one place, or next to it, are at one distance from all others, and make no lattice.
    apart = _length(offsets.diff(dim=2)) > near
    tied, missed = (apart & (gap <= reach) for reach in (tolerance[:, None], near))
    ties, misses = tied.sum(dim=1), (missed & ~tied).sum(dim=1)
    return tolerance, torch.stack([ties * (tolerance > 0), misses])


def _length(offsets: Tensor) -> Tensor:
    """[n, K] of offsets [2, n, K], rounded alike on every device."""
    x, y = offsets.square()
    return (x + y).sqrt()


def _check_k(k: int) -> None:
    if not isinstance(k, numbers.Integral) or k < 1:
        raise InputError(f"k: must be a whole number of at least 1, not {k!r}")


def _checked_coords(coords: Any) -> tuple[Tensor, Tensor]:
    """Coordinates [N, 2] as float64, in the caller's memory if they are that already, and [N] the rounding step of each
    spot's in the precision that they came in; both on the device of the coordinates."""
    given = as_tensor("coords", coords, ("N", 2))
    precision = torch.finfo(given.dtype).eps if given.dtype.is_floating_point else 0.0
    points = given.double()
    broken = int((~points.isfinite()).any(dim=1).sum())
    if broken:
        raise InputError(f"coords: {broken} of {len(points)} spots are NaN or infinite; remove them")
    return points, precision * points.abs().amax(dim=1)


def _checked_ptr(slide_ptr: Any, n: int) -> Tensor:
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


class _Forest:
    """The k-d trees of packed slides."""

    def __init__(self, points: Tensor, code: Tensor, slide_ptr: Tensor, spot: Tensor, most: int) -> None:
        """Arguments as of a :class:`NeighborSearch`, on the CPU; ``most`` neighbours can be asked for."""
        self.n = len(points)
        self.slides = [slice(*bounds) for bounds in itertools.pairwise(slide_ptr.tolist())]
        arrays = points.numpy(), code.numpy(), spot.numpy()
        self.trees = [_Tree(*(array[slide] for array in arrays), most) for slide in self.slides]

    def nearest(self, tied: Tensor, k: int) -> Tensor:
        """Rows [N, k] int64 as of a :class:`NeighborSearch`."""
        table = torch.full((self.n, k), MISSING)
        for slide, tree in zip(self.slides, self.trees, strict=True):
            found = tree.nearest(tied[slide].numpy(), k)
            np.add(found, slide.start, out=table[slide, : found.shape[1]].numpy())
        return table


class _Candidates(NamedTuple):
    """The nearest of some rows, by their distance."""

    distance: np.ndarray  # [n, count] float64
    row: np.ndarray  # [n, count]


class _Tree:
    """The k-d tree of one slide. Its first candidates are kept, for on a lattice they are looked at twice."""

    def __init__(self, points: np.ndarray, code: np.ndarray, spot: np.ndarray, most: int) -> None:
        n = len(points)
        self.points, self.by_spot = points, spot.argsort()
        self.rank = np.empty_like(self.by_spot)
        self.rank[self.by_spot] = np.arange(n)
        self.eligible = _first_in_place(points, code, self.rank, most + 1)
        self.tree = cKDTree(points[self.eligible])
        count = min(len(self.eligible), most + 1 + SPARE_CANDIDATES)
        self.first = _Candidates(np.empty((n, count)), np.empty((n, count), dtype=np.int32))
        for part in _blocks(np.arange(n), count):
            self.first.distance[part], self.first.row[part] = self._ask(part, count)

    def _ask(self, rows: np.ndarray, count: int) -> _Candidates:
        found = self.tree.query(self.points[rows], k=count, workers=thread_count())
        distance, index = (values.reshape(len(rows), count) for values in found)
        return _Candidates(distance, self.eligible[index])

    def nearest(self, tied: np.ndarray, k: int) -> np.ndarray:
        """[n, min(k, n - 1)] rows, k at least 1."""
        n, count = self.first.row.shape
        table = np.empty((n, max(0, min(k, n - 1))), dtype=np.int64)
        if n > 1:
            for part in _blocks(np.arange(n), count):
                candidates = _Candidates(*(values[part] for values in self.first))
                table[part] = self._settle(part, candidates, table.shape[1], tied)
        return table

    def _settle(self, rows: np.ndarray, candidates: _Candidates, wanted: int, tied: np.ndarray) -> np.ndarray:
        """[n, wanted] nearest of ``rows`` [n]."""
        rank = self.rank[candidates.row]
        rank[candidates.row == rows[:, None]] = NOBODY
        ranks, settled = _order_ties(candidates.distance, rank, wanted, tied[rows])
        table, count = self.by_spot[ranks], rank.shape[1]
        # A shell of ties may reach past the candidates (lattices, duplicates): ask again, for those rows alone.
        if count < len(self.eligible):
            more = min(len(self.eligible), 4 * count)
            for part in _blocks(np.flatnonzero(~settled), more):
                table[part] = self._settle(rows[part], self._ask(rows[part], more), wanted, tied)
        return table


def _blocks(rows: np.ndarray, candidates: int) -> Iterator[np.ndarray]:
    """Parts of ``rows``, whose ``candidates`` each are looked at together."""
    size = max(1, CANDIDATES_AT_ONCE // max(1, candidates))
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _first_in_place(points: np.ndarray, code: np.ndarray, rank: np.ndarray, most: int) -> np.ndarray:
    """Ascending rows of the first ``most`` points of every place: the others of a place are nobody's neighbours."""
    if (code[most:] != code[:-most]).all():
        return np.arange(len(points))
    order = np.lexsort((rank, *points.T))
    moved = (np.diff(points[order], axis=0) != 0).any(axis=1)
    first = np.concatenate([[0], np.flatnonzero(moved) + 1])
    number = np.arange(len(points)) - np.repeat(first, np.diff(first, append=len(points)))
    return np.sort(order[number < most])


def _order_ties(distance: np.ndarray, rank: np.ndarray, wanted: int, tied: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first ``wanted`` ranks of each row's candidates [n, count] by (tie group, rank), those who are :data:`NOBODY`
    last; and [n] whether no tie reaches past the candidates."""
    group = np.zeros_like(rank)
    np.cumsum(np.diff(distance, axis=1) > tied[:, None], axis=1, out=group[:, 1:])
    key = np.where(rank == NOBODY, NOBODY, group << 32 | rank)  # one number to sort by
    key.sort(axis=1)
    return key[:, :wanted] & (2**32 - 1), key[:, wanted - 1] >> 32 < group[:, -1]


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
    coords: Tensor, neighbors: Tensor, tied: Tensor | None = None, dtype: torch.dtype = torch.float64
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
        tied: [N] float64 of :func:`lattice_tolerance`; all 0 when None.
        dtype: of the result, which is computed in float64.

    Returns:
        [N, K, 3]: projections on the minor and the major axis, and |c_j - c_i|. Zero for missing neighbours.
    """
    tied = coords.new_zeros(len(coords)) if tied is None else tied
    geometry = torch.empty(*neighbors.shape, 3, dtype=dtype, device=coords.device)
    rows = max(1, EDGES_AT_ONCE // neighbors.shape[1])
    for start in range(0, len(neighbors), rows):
        part = slice(start, start + rows)
        geometry[part] = _project_edges(coords, coords[part], neighbors[part], tied[part])
    return geometry


def _project_edges(coords: Tensor, centers: Tensor, neighbors: Tensor, tied: Tensor) -> Tensor:
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
    isotropic = gap <= torch.maximum(ISOTROPY_TOLERANCE * spread, tied * (neighbors.shape[1] * spread).sqrt())
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
            tied: [N] float64; sorted distances from a spot of which neighbours differ by no more are equal.
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
        rows = _find_neighbors(points, resolution, slide_ptr, k, search)
        slide_of = slide_of_rows(slide_ptr, workplace)
        boundaries = slide_ptr.to(workplace)
        return cls(
            order=rows.order,
            neighbors=rows.neighbors,
            geometry=edge_geometry(rows.points, rows.neighbors, rows.tied, dtype),
            slide_ptr=boundaries,
            slide_of=slide_of,
            spot_id=rows.order - boundaries[slide_of],
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

    def smoothed(self, values: Tensor, share: float) -> Tensor:
        """Values [N, C], rows of the graph: of each row 1 - ``share``, and ``share`` of the mean over its neighbours. A
        spot without neighbours keeps its own."""
        mixed = torch.empty_like(values)

        def mix(rows: slice) -> None:
            near = self.neighbors[rows]
            present = near != MISSING
            weights = (share * present / present.sum(dim=1, keepdim=True).clamp(min=1)).to(values.dtype)
            part = values[rows] * (1 - weights.sum(dim=1, keepdim=True))
            for slot, weight in zip(near.clamp(min=0).unbind(1), weights.unbind(1), strict=True):
                part.addcmul_(values[slot], weight.unsqueeze(1))
            mixed[rows] = part

        in_turn(mix, blocks_of(len(values), max(1, SMOOTHED_AT_ONCE // max(1, values.shape[1]))), values.device)
        return mixed

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SpotGraph:
        """The graph on a device; ``dtype`` is that of the geometry."""
        moved = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__}
        moved["geometry"] = moved["geometry"].to(dtype or self.geometry.dtype)
        return replace(self, **moved)

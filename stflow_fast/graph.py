"""SpotGraph: spots of one or many slides in space order, their neighbours and the geometry of their edges.

Everything here depends on coordinates alone, so it is made once per slide and reused by every layer and flow step.
It is computed in float64 on the CPU: scipy's k-d tree finds candidates, and the tie rules below are then exact
enough that a rotated, mirrored or shifted slide yields the same table and, to rounding, the same geometry.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .errors import InputError

MISSING = -1
"""Entry of a neighbour table where a spot has fewer than K neighbours."""

TIE_TOLERANCE = 1e-6
"""Distances closer than this, relative to themselves, are tied: the smaller spot index comes first.

Float64 coordinates of a rotated slide agree to about 1e-12 and float32 pixels of a whole slide to about 1e-6.
"""

ISOTROPY_TOLERANCE = 1e-6
"""A neighbourhood whose two eigenvalues differ by less than this, relative to their sum, has no principal axis."""


def knn_graph(coords: Tensor | np.ndarray, k: int, slide_ptr: Tensor | np.ndarray | None = None) -> Tensor:
    """The ``k`` nearest other spots of each spot, never across slides.

    Order within a row: distance (ties within :data:`TIE_TOLERANCE`), then spot index. Duplicated coordinates are
    neighbours at distance zero. Published: ``_build_graph`` of SpatialTransformer, a dense N x N top-k.

    Args:
        coords: [N, 2] positions, any unit, finite.
        k: neighbours wanted, at least 1.
        slide_ptr: [S + 1] first spot of each slide and N at the end; one slide when None.

    Returns:
        [N, k] int64 on the CPU; :data:`MISSING` where a slide has k spots or fewer.

    Raises:
        InputError: k below 1, coordinates of the wrong shape or not finite, slide_ptr that does not cover 0..N.
    """
    points = _checked_coords(coords)
    boundaries = _checked_ptr(slide_ptr, len(points))
    if k < 1:
        raise InputError(f"k: must be at least 1, not {k}")
    table = np.full((len(points), k), MISSING, dtype=np.int64)
    for start, stop in itertools.pairwise(boundaries):
        found = _slide_neighbors(points[start:stop], k)
        table[start:stop, : found.shape[1]] = found + start
    return torch.from_numpy(table)


def _checked_coords(coords: Tensor | np.ndarray) -> np.ndarray:
    points = coords.detach().cpu().numpy() if isinstance(coords, Tensor) else np.asarray(coords)
    if points.ndim != 2 or points.shape[1] != 2:
        raise InputError(f"coords: must have shape [N, 2], not {list(points.shape)}")
    points = points.astype(np.float64)
    broken = int((~np.isfinite(points)).any(axis=1).sum())
    if broken:
        raise InputError(f"coords: {broken} of {len(points)} spots are NaN or infinite; remove them")
    return points


def _checked_ptr(slide_ptr: Tensor | np.ndarray | None, n: int) -> np.ndarray:
    pointers = np.asarray([0, n] if slide_ptr is None else slide_ptr, dtype=np.int64)
    if (
        pointers.ndim != 1
        or len(pointers) < 2
        or pointers[0] != 0
        or pointers[-1] != n
        or (np.diff(pointers) < 0).any()
    ):
        raise InputError(f"slide_ptr: must rise from 0 to the number of spots ({n})")
    return pointers


def _slide_neighbors(points: np.ndarray, k: int) -> np.ndarray:
    """[n, min(k, n - 1)] neighbours within one slide."""
    n = len(points)
    wanted = min(k, n - 1)
    table = np.empty((n, max(wanted, 0)), dtype=np.int64)
    if wanted < 1:
        return table
    tree = cKDTree(points)
    rows = np.arange(n)
    candidates = min(n, wanted + 1 + 8)
    while len(rows):
        # A shell of ties may reach past the candidates (lattices, duplicates): ask again, for those rows alone.
        unsettled = []
        chunk = max(1, 2**23 // candidates)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            distance, index = tree.query(points[part], k=candidates, workers=-1)
            nearest, settled = _order_ties(part, distance, index, wanted, exhausted=candidates == n)
            table[part[settled]] = nearest[settled]
            unsettled.append(part[~settled])
        rows = np.concatenate(unsettled)
        candidates = min(n, candidates * 4)
    return table


def _order_ties(
    spots: np.ndarray, distance: np.ndarray, index: np.ndarray, wanted: int, exhausted: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Sort each row's candidates by (tie group, index) without the spot itself; also which rows are settled."""
    itself = index == spots[:, None]
    # With many duplicates the k-d tree may return others in place of the spot itself; then nothing is dropped.
    drop = np.where(itself.any(axis=1), itself.argmax(axis=1), distance.shape[1] - 1)
    keep = np.ones_like(index, dtype=bool)
    keep[np.arange(len(index)), drop] = False
    shape = (len(index), index.shape[1] - 1)
    index, distance = index[keep].reshape(shape), distance[keep].reshape(shape)
    step = np.diff(distance, axis=1, prepend=distance[:, :1])
    group = (step > TIE_TOLERANCE * distance).cumsum(axis=1)
    order = np.lexsort((index, group), axis=1)[:, :wanted]
    settled = group[:, wanted - 1] < group[:, -1]
    return np.take_along_axis(index, order, axis=1), settled | exhausted


def space_order(coords: Tensor | np.ndarray, slide_ptr: Tensor | np.ndarray | None = None) -> Tensor:
    """Permutation [N] that walks each slide along a Z-order curve, slide after slide: neighbours in space become
    neighbours in memory. Raises InputError like :func:`knn_graph`."""
    points = _checked_coords(coords)
    boundaries = _checked_ptr(slide_ptr, len(points))
    order = np.arange(len(points))
    for start, stop in itertools.pairwise(boundaries):
        if stop > start:
            order[start:stop] = start + np.argsort(_morton_code(points[start:stop]), kind="stable")
    return torch.from_numpy(order)


def _morton_code(points: np.ndarray) -> np.ndarray:
    extent = max(float(np.ptp(points, axis=0).max()), np.finfo(np.float64).tiny)
    cell = ((points - points.min(axis=0)) / extent * (2**16 - 1)).astype(np.uint64)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333), (1, 0x55555555)):
        cell = (cell | (cell << np.uint64(shift))) & np.uint64(mask)
    return cell[:, 0] | (cell[:, 1] << np.uint64(1))


def edge_geometry(coords: Tensor, neighbors: Tensor) -> Tensor:
    """Frame-projected offsets and distances of all edges.

    For spot i with neighbours j: the offsets c_j - c_i, centred on their mean, are projected on the eigenvectors of
    their 2 x 2 covariance (ascending eigenvalues, as ``torch.linalg.eigh`` orders them; closed form here). The four
    sign choices of the two axes are the frames of frame averaging (Puny et al. 2022; STFlow section 4.2).

    An isotropic neighbourhood (every regular lattice has them) has no principal axes; its second axis then points to
    its first neighbour at a distance above zero, which moves with the tissue as a frame must.

    Args:
        coords: [N, 2] float64.
        neighbors: [N, K] int64, :data:`MISSING` where there is none.

    Returns:
        [N, K, 3] float64: projections on the minor and the major axis, and |c_j - c_i|. Zero for missing neighbours.
    """
    present = (neighbors != MISSING).unsqueeze(-1)
    offsets = (coords[neighbors.clamp(min=0)] - coords.unsqueeze(1)) * present
    distance = offsets.norm(dim=-1, keepdim=True)
    mean = offsets.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (offsets - mean) * present
    xx, yy = centred.square().sum(dim=1).unbind(-1)
    xy = centred.prod(dim=-1).sum(dim=1)
    angle = 0.5 * torch.atan2(2 * xy, xx - yy)
    gap = torch.hypot(2 * xy, xx - yy)
    isotropic = gap <= ISOTROPY_TOLERANCE * (xx + yy)
    first = offsets[torch.arange(len(offsets)), (distance.squeeze(-1) > 0).int().argmax(dim=1)]
    angle = torch.where(isotropic, torch.atan2(first[:, 1], first[:, 0]), angle)
    cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
    x, y = centred.unbind(-1)
    return torch.stack([cos * y - sin * x, cos * x + sin * y, distance.squeeze(-1)], dim=-1)


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
    ) -> SpotGraph:
        """Build from coordinates [N, 2]; ``slide_ptr`` [S + 1] marks packed slides. Raises like :func:`knn_graph`.

        Neighbours are found before the spots are reordered, so ties are broken by the caller's spot index.
        """
        points = torch.from_numpy(_checked_coords(coords))
        boundaries = torch.from_numpy(_checked_ptr(slide_ptr, len(points)))
        table = knn_graph(points, k, boundaries)
        order = space_order(points, boundaries)
        row_of = torch.empty_like(order)
        row_of[order] = torch.arange(len(order))
        table = table[order]
        neighbors = torch.where(table == MISSING, MISSING, row_of[table.clamp(min=0)]) if len(order) else table
        slide_of = torch.repeat_interleave(torch.arange(len(boundaries) - 1), boundaries.diff())
        return cls(
            order=order,
            neighbors=neighbors,
            geometry=edge_geometry(points[order], neighbors).to(dtype),
            slide_ptr=boundaries,
            slide_of=slide_of,
            spot_id=order - boundaries[slide_of],
        )

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

"""SpotGraph: spots of one or many slides in space order, their neighbours and the geometry of their edges."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..threads import blocks_of, in_turn
from .checks import check_k, checked_coords, checked_ptr
from .geometry import edge_geometry
from .neighbors import find_neighbors
from .order import slide_of_rows
from .table import MISSING, NeighborSearch, transpose_neighbors

SMOOTHED_AT_ONCE = 2**22
"""Numbers of a block of spots whose neighbours are averaged: 16 MB each of what is gathered and of the sum."""


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
        """Build from coordinates [N, 2]; ``slide_ptr`` [S + 1] marks packed slides.

        Ties are broken by the caller's spot index, not by the row.

        Args:
            coords: [N, 2] as for :func:`knn_graph`.
            k: neighbours wanted, at least 1.
            slide_ptr: [S + 1] first spot of each slide and N at the end; one slide when None.
            dtype: of the geometry.
            device: where the graph is wanted.
            search: finds neighbours on ``device``, where all the rest is then made too. On the CPU by a k-d tree
                when None.

        Raises:
            InputError: as :func:`knn_graph`.
        """
        check_k(k)
        points, resolution = checked_coords(coords)
        slide_ptr = checked_ptr(slide_ptr, len(points))
        workplace = torch.device("cpu" if search is None else device)
        points, resolution = points.to(workplace), resolution.to(workplace)
        rows = find_neighbors(points, resolution, slide_ptr, k, search)
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
        """:func:`transpose_neighbors` of the graph, [N * K] and [N + 1], made once for all layers of a step."""
        return transpose_neighbors(self.neighbors)

    @property
    def n_spots(self) -> int:
        """N, of all slides."""
        return len(self.order)

    @property
    def n_slides(self) -> int:
        """S."""
        return len(self.slide_ptr) - 1

    def to_rows(self, values: Tensor) -> Tensor:
        """Bring ``values`` [N, ...] from the caller's order into the graph's."""
        return values[self.order]

    def to_spots(self, rows: Tensor) -> Tensor:
        """Bring ``rows`` [N, ...] from the graph's order back into the caller's."""
        return torch.empty_like(rows).index_copy_(0, self.order, rows)

    def smoothed(self, values: Tensor, share: float) -> Tensor:
        """``values`` [N, .], rows of the graph: of each 1 - ``share``, and ``share`` of the mean over its neighbours. A
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

"""Neighbour tables: what is missing in one, how one is found on a device, and its edges by arrival."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

MISSING = -1
"""Entry of a neighbour table where a spot has fewer than K neighbours."""

EDGES_AT_ONCE = 2**19
"""Edges whose geometry is computed together: 80 MB of float64 temporaries. On a CPU a half faster than all at once
(0.16 s for 2.4M edges, and 0.27 s), as are 2^14 and 2^20."""


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

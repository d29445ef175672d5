"""Nearest spots on the CPU: a k-d tree for each slide, and the order of ties."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..threads import thread_count
from .table import MISSING

SPARE_CANDIDATES = 5
"""Candidates beyond the neighbours wanted that the k-d tree is asked for at first: the eighth neighbour of a hexagonal
lattice is tied with four more, and behind those is the fifth."""

CANDIDATES_AT_ONCE = 2**18
"""Candidates in memory together: 2 MB for each of their distances, ranks and groups. Sorting those of 300,000 spots
takes 0.10 s, and 0.18 s in parts of 2^23, which leave the cache."""

NOBODY = 2**63 - 1
"""Rank behind all others: of a spot among its own candidates."""


class Forest:
    """The k-d trees of packed slides."""

    def __init__(self, points: Tensor, code: Tensor, slide_ptr: Tensor, spot: Tensor, most: int) -> None:
        """Arguments as of a :class:`NeighborSearch`, on the CPU; ``most`` neighbours can be asked for."""
        self.n = len(points)
        self.slides = [slice(*bounds) for bounds in itertools.pairwise(slide_ptr.tolist())]
        places, codes, spots = points.numpy(), code.numpy(), spot.numpy()
        self.trees = [_Tree(places[slide], codes[slide], spots[slide], most) for slide in self.slides]

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
        table: np.ndarray = self.by_spot[ranks]
        count = rank.shape[1]
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

"""Spots of tests: lattices, clouds and piles, motions of the plane, and the neighbours by all distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from stflow_fast.graph import WITNESSES, SpotGraph


def hexagonal(rows: int, columns: int) -> np.ndarray:
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])


def square(rows: int, columns: int) -> np.ndarray:
    return np.column_stack(np.divmod(np.arange(rows * columns), columns)).astype(float)


def motion(angle: float, mirror: bool, shift: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (turn * [1, -1] if mirror else turn), np.array(shift)


clouds = {
    "random": np.random.default_rng(0).uniform(0, 100, (200, 2)),
    "hexagonal": hexagonal(12, 15),
    "square": square(13, 11),
    "clusters": np.random.default_rng(1).normal(0, 1, (150, 2))
    + np.random.default_rng(2).integers(0, 4, (150, 1)) * 50,
    "duplicated": np.repeat(np.random.default_rng(3).uniform(0, 10, (12, 2)), 9, axis=0),
    "all in one place": np.zeros((40, 2)),
    "a pile among others": np.random.default_rng(4).permutation(
        np.concatenate([np.full((60, 2), 5.0), np.random.default_rng(5).uniform(0, 10, (60, 2))])
    ),
    "on a line": np.column_stack([np.arange(50.0), np.zeros(50)]),
}


def exact_table(coords: np.ndarray, k: int) -> np.ndarray:
    """Every float64 distance, sorted by (distance, index)."""
    points = coords.astype(np.float64)
    table = np.empty((len(points), k), dtype=np.int64)
    for start in range(0, len(points), 100):
        part = slice(start, start + 100)
        square, y = (points[:, axis] - points[part, axis, None] for axis in (0, 1))
        square *= square
        y *= y
        square += y
        distance = np.sqrt(square, out=square)
        spots = np.arange(len(distance))
        distance[spots, start + spots] = np.inf
        farthest = torch.from_numpy(distance).topk(k, largest=False).values.numpy()[:, -1:]
        spot, other = np.nonzero(distance <= farthest)
        order = np.lexsort((other, distance[spot, other], spot))
        table[part] = other[order][np.searchsorted(spot, spots)[:, None] + np.arange(k)]
    return table


def tolerance_of(coords: np.ndarray, exact: np.ndarray) -> torch.Tensor:
    """[N] what a search is told of the ties of each spot, 0 where that lies on no lattice."""
    told = torch.zeros(len(coords), dtype=torch.float64)

    def search(
        points: torch.Tensor,
        code: torch.Tensor,
        slide_ptr: torch.Tensor,
        tied: torch.Tensor,
        spot: torch.Tensor,
        k: int,
    ) -> torch.Tensor:
        told[spot] = tied
        return spot.argsort()[torch.from_numpy(exact[:, :k])[spot]]

    SpotGraph.build(coords, WITNESSES, search=search)
    return told


Draw = Callable[[np.random.Generator, int], np.ndarray]


def sheared(random: np.random.Generator, n: int) -> np.ndarray:
    """Columns 1000 pixels apart, and rows 0.0005 pixels more: a lattice, but in whole pixels, where 1000² and
    1000² + 1 are no ties."""
    return random.permutation(square(n // 20, 20)) @ [[1000, 0], [1, 1000]]


def sorted_frames(geometry: torch.Tensor) -> torch.Tensor:
    """What the four sign frames know: the projections up to a common sign per axis, and the distances."""
    products = [geometry[..., i : i + 1] * geometry[:, None, :, i] for i in range(2)]
    return torch.cat([*products, geometry[..., 2:]], dim=-1)

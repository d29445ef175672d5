"""Neighbours: by distance and then index, exact where there is no lattice, and sizes that break things."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.graph import MISSING, SpotGraph, knn_graph

from .graph_cases import Draw, clouds, exact_table, hexagonal, motion, sheared, square, tolerance_of


def brute_force(points: np.ndarray, k: int) -> np.ndarray:
    """Every distance, sorted by (distance rounded beyond what ties differ by, index): the rule, spelled out slowly."""
    table = np.full((len(points), k), MISSING)
    for spot, point in enumerate(points):
        distance = np.linalg.norm(points - point, axis=1)
        others = sorted(
            (index for index in range(len(points)) if index != spot), key=lambda i: (round(distance[i], 4), i)
        )
        table[spot, : len(others[:k])] = others[:k]
    return table


@pytest.mark.parametrize("name", clouds)
@pytest.mark.parametrize("k", [1, 6, 8, 13])
def test_neighbours_follow_distance_then_index(name: str, k: int) -> None:
    assert np.array_equal(knn_graph(clouds[name], k).numpy(), brute_force(clouds[name], k))


def clustered(random: np.random.Generator, n: int) -> np.ndarray:
    return random.normal(0, 1, (n, 2)) * random.choice([5, 50, 500], (n, 1)) + random.integers(1, 9, (n, 2)) * 2000


def jittered(by: float) -> Draw:
    return lambda random, n: (hexagonal(n // 100, 100) + random.uniform(-by, by, (n, 2))) * 100 + 5000


def visium_pixels(pitch: float) -> Draw:
    """Turned a little, as a scanned slide is; not in the order of the lattice."""
    turn, by = motion(0.02, False, (3000, 5000))
    return lambda random, n: np.round(random.permutation(hexagonal(n // 100, 100)) @ turn.T * pitch + by)


no_lattices: dict[str, tuple[int, Draw]] = {
    "uniform": (10_000, lambda random, n: random.uniform(0, 20_000, (n, 2))),
    "uniform, far away": (3000, lambda random, n: random.uniform(100_000, 103_000, (n, 2))),
    "clustered": (10_000, clustered),
    "jittered by 10 %": (10_000, jittered(0.1)),
    "jittered by 0.1 %": (10_000, jittered(0.001)),
    "two spots in every place": (
        3000,
        lambda random, n: random.permutation(random.uniform(0, 9000, (n // 2, 2)).repeat(2, axis=0)),
    ),
    "two spots next to each other": (
        3000,
        lambda random, n: random.uniform(0, 9000, (n // 2, 2)).repeat(2, axis=0) + random.uniform(0, 0.002, (n, 2)),
    ),
    "whole pixels": (3000, lambda random, n: random.integers(0, 10_000, (n, 2)).astype(float)),
    "Visium in whole pixels": (10_000, visium_pixels(100)),
    "Visium in whole pixels, 400": (3000, visium_pixels(400)),
    "Visium in whole pixels, 833": (3000, visium_pixels(833)),
    "whole pixels, sheared": (3000, sheared),
    "centres of patches of odd size": (3000, lambda random, n: np.add(visium_pixels(100)(random, n), [0.5, 0])),
}


@pytest.mark.parametrize("name", no_lattices)
def test_neighbours_are_the_exact_ones_where_there_is_no_lattice(name: str) -> None:
    n, draw = no_lattices[name]
    drawn = draw(np.random.default_rng(0), n)
    exact = exact_table(drawn, 16)
    for precision in (np.float64, np.float32):
        coords = drawn.astype(precision)
        if (coords != drawn).any():
            exact = exact_table(coords, 16)
        assert (tolerance_of(coords, exact) == 0).all()
        for k in (1, 4, 8, 16):
            assert (knn_graph(coords, k).numpy() != exact[:, :k]).any(axis=1).sum() == 0
    if (drawn == drawn.round()).all():
        assert np.array_equal(knn_graph(drawn.astype(np.int64), 16).numpy(), exact)


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9, 10])
def test_missing_neighbours_are_marked(n: int) -> None:
    table = knn_graph(np.random.default_rng(0).uniform(size=(n, 2)), 8)
    assert table.shape == (n, 8)
    assert ((table != MISSING).sum(dim=1) == min(8, max(n - 1, 0))).all()
    for spot, row in enumerate(table.tolist()):
        present = [other for other in row if other != MISSING]
        assert spot not in present
        assert len(set(present)) == len(present)


def test_neighbours_never_cross_slides() -> None:
    points = np.random.default_rng(0).uniform(size=(60, 2))
    slide_ptr = [0, 25, 25, 28, 60]
    table = knn_graph(points, 5, slide_ptr)
    for start, stop in itertools.pairwise(slide_ptr):
        alone = knn_graph(points[start:stop], 5)
        assert torch.equal(table[start:stop], torch.where(alone == MISSING, MISSING, alone + start))


@pytest.mark.parametrize(
    ("coords", "k", "slide_ptr", "complaint"),
    [
        (np.zeros((3, 3)), 2, None, "shape"),
        (np.array([[0, np.nan], [1, 1]]), 2, None, "1 of 2 spots"),
        (np.zeros((3, 2)), 0, None, "k: must be a whole number of at least 1, not 0"),
        (np.zeros((3, 2)), 2.5, None, "k: must be a whole number of at least 1, not 2.5"),
        (np.zeros((3, 2)), "4", None, "k: must be a whole number of at least 1, not '4'"),
        (np.zeros((3, 2)), 2, [0, 2], "slide_ptr"),
        (np.zeros((3, 2)), 2, [0, 2, 1, 3], "slide_ptr"),
    ],
)
def test_bad_input_is_named(coords: np.ndarray, k: int, slide_ptr: list[int] | None, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        knn_graph(coords, k, slide_ptr)


def test_neighbours_do_not_depend_on_what_is_packed_beside_them() -> None:
    """Float32, where ties are within the rounding: that of the spot itself, not of a slide far away."""
    small = square(10, 10).astype(np.float32)
    far = np.array([[2e6, 0], [0, 2e6], [1e9, 1e9]], dtype=np.float32)
    alone = SpotGraph.build(small, 8)
    packed = SpotGraph.build(np.concatenate([small, far]), 8, [0, 100, 103])
    assert torch.equal(packed.neighbors[:100], alone.neighbors)
    assert torch.equal(packed.geometry[:100], alone.geometry)
    assert torch.equal(knn_graph(np.concatenate([small, far]), 8)[:100], knn_graph(small, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_coordinates_of_any_type(dtype: torch.dtype) -> None:
    points = torch.from_numpy(square(6, 7)).to(dtype)
    assert torch.equal(knn_graph(points, 4), knn_graph(points.double(), 4))


def test_thousands_of_spots_in_one_place_cost_no_more_than_others() -> None:
    """By their number, a table of all distances within the pile would take 30 GB."""
    points = np.concatenate([np.zeros((60_000, 2)), np.random.default_rng(0).uniform(1, 2, (1000, 2))])
    table = knn_graph(points, 8)
    assert torch.equal(table[59_999], torch.arange(8))
    assert torch.equal(table[0], torch.arange(1, 9))
    assert (table[60_000:] >= 60_000).float().mean() > 0.9

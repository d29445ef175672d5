"""Lattices: ties that rounding parts are ties, wherever the lattice lies, and rounding ties nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast.graph import MISSING, WITNESSES, SpotGraph, knn_graph

from .graph_cases import clouds, exact_table, hexagonal, motion, sheared, sorted_frames, square, tolerance_of


@pytest.mark.parametrize("angle", [0.3, 2.0])
@pytest.mark.parametrize(("name", "isotropic"), [("hexagonal", 6), ("square", 8)])
def test_float32_lattices_keep_their_ties(name: str, isotropic: int, angle: float) -> None:
    """Pixels of a large slide in float32 are rounded to 0.002: distances that were equal differ by that much, and so do
    the eigenvalues of a neighbourhood."""
    turn, _ = motion(angle, False, (0, 0))
    points = clouds[name] * 100 + 20_000
    moved = (points @ turn.T + 40_000).astype(np.float32)
    for k in (isotropic, 8):
        table = knn_graph(points, k)
        assert torch.equal(knn_graph(points.astype(np.float32), k), table)
        assert torch.equal(knn_graph(moved, k), table)
    graphs = [SpotGraph.build(part, isotropic) for part in (points, points.astype(np.float32), moved)]
    still, rounded, turned = (sorted_frames(graph.to_spots(graph.geometry.double())) for graph in graphs)
    assert (still - rounded).abs().max() < 1e-4 * still.abs().max()
    assert (still - turned).abs().max() < 1e-3 * still.abs().max()


def oblique(rows: int, columns: int) -> np.ndarray:
    return square(rows, columns) @ [[1, 0.37], [0, 1.11]]


lattices = {
    "hexagonal": hexagonal(20, 20),
    "square": square(20, 20),
    "rectangular": square(20, 20) * [1, 1.3],
    "oblique": oblique(20, 20),
    "hexagonal, with holes": hexagonal(24, 24)[np.random.default_rng(0).random(576) > 0.3],
    "square, with holes": square(24, 24)[np.random.default_rng(1).random(576) > 0.3],
    "hexagonal, a disc with bites": hexagonal(24, 24)[
        (np.hypot(*(hexagonal(24, 24) - 11).T) < 11 + 2 * np.sin(hexagonal(24, 24)[:, 0]))
    ],
    "two, a place apart": np.concatenate([hexagonal(14, 14), np.add(hexagonal(14, 14), [0.31, 0.17])]),
    "two spots in every place": np.repeat(hexagonal(14, 14), 2, axis=0),
    "on a line": np.column_stack([np.zeros(60), np.arange(60)]),
}


@given(
    name=st.sampled_from(sorted(lattices)),
    pitch=st.sampled_from([30.0, 100.0, 833.0]),
    angle=st.floats(0.1, 1.5),
    mirror=st.booleans(),
    shift=st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)),
    precision=st.sampled_from([np.float64, np.float32]),
    seed=st.integers(0, 9),
    k=st.sampled_from([1, 4, 6, 8, 12]),
)
def test_lattices_keep_their_neighbours_when_they_move(
    name: str,
    pitch: float,
    angle: float,
    mirror: bool,
    shift: tuple[float, float],
    precision: type,
    seed: int,
    k: int,
) -> None:
    points = np.random.default_rng(seed).permutation(lattices[name]) * pitch
    turn, by = motion(angle, mirror, shift)
    moved = (points @ turn.T + by).astype(precision)
    assert (tolerance_of(moved, exact_table(moved, WITNESSES)) > 0).all()
    assert torch.equal(knn_graph(moved, k), knn_graph(points, k))
    if precision == np.float64:
        graphs = [SpotGraph.build(coords, k, dtype=torch.float64) for coords in (points, moved)]
        before, after = (sorted_frames(graph.to_spots(graph.geometry)) for graph in graphs)
        assert (before - after).abs().max() < 1e-6 * pitch**2


def test_a_lattice_in_half_a_slide() -> None:
    """Beside random spots: those are exact, and the lattice keeps its neighbours, but for four pitches at the seam."""
    random = np.random.default_rng(0)
    points = np.concatenate([hexagonal(60, 50), random.uniform((50.5, 0), (100, 52), (2500, 2))]) * 100
    turn, by = motion(0.3, True, (20_000, 30_000))
    moved = (points @ turn.T + by).astype(np.float32)
    away = np.abs(points[:, 0] - 5025) > 400
    lattice = away & (np.arange(len(points)) < 3000)
    assert torch.equal(knn_graph(moved, 8)[lattice], knn_graph(points, 8)[lattice])
    assert np.array_equal(knn_graph(moved, 8)[away & ~lattice].numpy(), exact_table(moved, 8)[away & ~lattice])
    assert np.array_equal(knn_graph(points, 8)[away & ~lattice].numpy(), exact_table(points, 8)[away & ~lattice])


def test_two_lattices_side_by_side() -> None:
    points = np.concatenate([hexagonal(30, 30), oblique(30, 30)[:, ::-1] * 1.3 + [31, 0]]) * 100
    turn, by = motion(2.0, False, (40_000, 10_000))
    moved = (points @ turn.T + by).astype(np.float32)
    assert (tolerance_of(moved, exact_table(moved, WITNESSES)) > 0).all()
    assert torch.equal(knn_graph(moved, 8), knn_graph(points, 8))


def test_packed_slides_are_judged_one_by_one() -> None:
    random = np.random.default_rng(0)
    turn, by = motion(0.3, False, (20_000, 20_000))
    lattice = (random.permutation(hexagonal(20, 20)) * 100 @ turn.T + by).astype(np.float32)
    pixels = sheared(random, 400).astype(np.float32)
    parts = [lattice, pixels, random.uniform(0, 900, (300, 2)).astype(np.float32), lattice[:1], pixels]
    slide_ptr = np.cumsum([0, *map(len, parts)])
    packed, table = SpotGraph.build(np.concatenate(parts), 8, slide_ptr), knn_graph(np.concatenate(parts), 8, slide_ptr)
    for part, start, stop in zip(parts, slide_ptr, slide_ptr[1:], strict=False):
        alone, graph = knn_graph(part, 8), SpotGraph.build(part, 8)
        assert torch.equal(table[start:stop], torch.where(alone == MISSING, MISSING, alone + start))
        assert torch.equal(packed.geometry[start:stop], graph.geometry)
    assert np.array_equal(knn_graph(pixels, 8).numpy(), exact_table(pixels, 8))


def test_rounding_as_coarse_as_the_lattice_ties_nothing() -> None:
    """Float16: whole numbers from 2048 on, and halves from 1024 on; below, 64 tolerances are more than the pitch."""
    for shift in (3000, 900):
        coords = (hexagonal(15, 15) * 2.2 + shift).astype(np.float16)
        exact = exact_table(coords, WITNESSES)
        assert not tolerance_of(coords, exact).any()
        assert np.array_equal(knn_graph(coords, WITNESSES).numpy(), exact)


def test_spots_as_dense_as_rounding_are_no_lattice() -> None:
    """They lie on the grid of the numbers themselves, 0.002 apart; others lie around them."""
    angle, radius = np.arange(12), np.linspace(1, 3, 12)
    dense = np.random.default_rng(0).permutation(square(6, 6))[:30] / 512
    around = np.column_stack([radius * np.cos(angle), radius * np.sin(angle)])
    coords = (np.concatenate([dense, around]) + 20_000).astype(np.float32)
    exact = exact_table(coords, WITNESSES)
    assert not tolerance_of(coords, exact).any()
    assert np.array_equal(knn_graph(coords, WITNESSES).numpy(), exact)

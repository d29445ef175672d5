"""Neighbours, spot order and frames: sizes that break things, ties on lattices, exactness elsewhere, and invariance
under motions of the plane."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast import graph as graph_module
from stflow_fast.errors import InputError
from stflow_fast.graph import (
    MISSING,
    WITNESSES,
    SpotGraph,
    edge_geometry,
    knn_graph,
    morton_code,
    space_order,
    spot_grid,
)


def hexagonal(rows: int, columns: int) -> np.ndarray:
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])


def square(rows: int, columns: int) -> np.ndarray:
    return np.column_stack(np.divmod(np.arange(rows * columns), columns)).astype(float)


def motion(angle: float, mirror: bool, shift: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (turn * [1, -1] if mirror else turn), np.array(shift)


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


@pytest.mark.parametrize("name", clouds)
@pytest.mark.parametrize("k", [1, 6, 8, 13])
def test_neighbours_follow_distance_then_index(name: str, k: int) -> None:
    assert np.array_equal(knn_graph(clouds[name], k).numpy(), brute_force(clouds[name], k))


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


def clustered(random: np.random.Generator, n: int) -> np.ndarray:
    return random.normal(0, 1, (n, 2)) * random.choice([5, 50, 500], (n, 1)) + random.integers(1, 9, (n, 2)) * 2000


def jittered(by: float) -> Draw:
    return lambda random, n: (hexagonal(n // 100, 100) + random.uniform(-by, by, (n, 2))) * 100 + 5000


def visium_pixels(pitch: float) -> Draw:
    """Turned a little, as a scanned slide is; not in the order of the lattice."""
    turn, by = motion(0.02, False, (3000, 5000))
    return lambda random, n: np.round(random.permutation(hexagonal(n // 100, 100)) @ turn.T * pitch + by)


def sheared(random: np.random.Generator, n: int) -> np.ndarray:
    """Columns 1000 pixels apart, and rows 0.0005 pixels more: a lattice, but in whole pixels, where 1000² and
    1000² + 1 are no ties."""
    return random.permutation(square(n // 20, 20)) @ [[1000, 0], [1, 1000]]


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


def sorted_frames(geometry: torch.Tensor) -> torch.Tensor:
    """What the four sign frames know: the projections up to a common sign per axis, and the distances."""
    products = [geometry[..., i : i + 1] * geometry[:, None, :, i] for i in range(2)]
    return torch.cat([*products, geometry[..., 2:]], dim=-1)


@given(
    angle=st.floats(0, 6.28),
    mirror=st.booleans(),
    shift=st.tuples(st.floats(-1e5, 1e5), st.floats(-1e5, 1e5)),
    name=st.sampled_from(sorted(clouds)),
)
def test_geometry_moves_with_the_tissue(angle: float, mirror: bool, shift: tuple[float, float], name: str) -> None:
    points = clouds[name] * 100
    turn, by = motion(angle, mirror, shift)
    moved = points @ turn.T + by
    table = knn_graph(points, 6)
    assert torch.equal(knn_graph(moved, 6), table)
    before, after = (edge_geometry(torch.from_numpy(p), table) for p in (points, moved))
    scale = max(before.abs().max().item(), 1.0) ** 2
    assert (sorted_frames(after) - sorted_frames(before)).abs().max() < 1e-6 * scale


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


def test_frames_equal_eigenvectors_where_those_exist() -> None:
    points = torch.from_numpy(clouds["random"])
    table = knn_graph(points, 8)
    offsets = points[table] - points[:, None]
    centred = offsets - offsets.mean(dim=1, keepdim=True)
    _, axes = torch.linalg.eigh(centred.mT @ centred)
    projected = centred @ axes
    ours = edge_geometry(points, table)
    torch.testing.assert_close(ours[..., :2].abs(), projected.abs(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[..., 2], offsets.norm(dim=-1))


def test_no_neighbours_give_zero_geometry() -> None:
    assert not edge_geometry(torch.zeros(1, 2).double(), knn_graph(torch.zeros(1, 2), 3)).any()


@pytest.mark.parametrize("name", clouds)
def test_space_order_is_a_permutation_within_each_slide(name: str) -> None:
    points = np.concatenate([clouds[name], clouds[name] + 7])
    n = len(clouds[name])
    order = space_order(points, [0, n, 2 * n])
    assert sorted(order[:n].tolist()) == list(range(n))
    assert torch.equal(order[n:], order[:n] + n)


def interleaved(column: int, row: int) -> int:
    return int("".join(y + x for x, y in zip(f"{column:016b}", f"{row:016b}", strict=True)), 2)


@pytest.mark.parametrize("name", clouds)
def test_space_order_follows_the_morton_codes(name: str) -> None:
    points = clouds[name] * 37.0 - 5
    extent = np.ptp(points, axis=0).max() or 1.0
    cells = ((points - points.min(axis=0)) / extent * (2**16 - 1)).astype(int)
    codes = [interleaved(*cell) for cell in cells.tolist()]
    assert space_order(points).tolist() == sorted(range(len(points)), key=lambda spot: codes[spot])
    assert morton_code(torch.from_numpy(cells)).tolist() == codes
    packed = spot_grid(
        torch.from_numpy(np.concatenate([points, clouds["random"]])),
        torch.tensor([0, 0, len(points), len(points) + 200]),
    )
    assert torch.equal(packed.position[: len(points)].long(), torch.from_numpy(cells))
    assert torch.equal(packed.last[0], torch.from_numpy(cells.max(axis=0)))


def test_neighbours_in_space_are_neighbours_in_memory() -> None:
    points = np.random.default_rng(0).permutation(hexagonal(100, 100))
    graph = SpotGraph.build(points, 6)
    rows = torch.arange(len(points)).unsqueeze(1)
    assert (graph.neighbors - rows).abs().float().median() < 100
    assert (knn_graph(points, 6) - rows).abs().float().median() > 1000


def test_graph_rows_are_the_spots_of_the_caller() -> None:
    points = torch.from_numpy(clouds["random"])
    graph = SpotGraph.build(points, 8, [0, 120, 200], torch.float64)
    table = knn_graph(points, 8, [0, 120, 200])
    assert torch.equal(graph.to_spots(graph.order[graph.neighbors]), table)
    assert torch.equal(graph.to_spots(graph.to_rows(points)), points)
    assert torch.equal(graph.to_spots(graph.geometry), edge_geometry(points, table))
    assert torch.equal(graph.to_spots(graph.spot_id), torch.cat([torch.arange(120), torch.arange(80)]))
    assert torch.equal(graph.slide_of, (torch.arange(200) >= 120).long())


def nearest_by_table(
    points: torch.Tensor, code: torch.Tensor, slide_ptr: torch.Tensor, tied: torch.Tensor, spot: torch.Tensor, k: int
) -> torch.Tensor:
    """A search as a device would bring it: checks what it is given, and answers in rows."""
    assert (tied >= 0).all()
    for start, stop in itertools.pairwise(slide_ptr.tolist()):
        assert (code[start:stop].diff() >= 0).all()
    coords = torch.empty_like(points).index_copy_(0, spot, points)
    table = knn_graph(coords, k, slide_ptr)[spot]
    return torch.where(table == MISSING, MISSING, spot.argsort()[table])


@pytest.mark.parametrize("name", clouds)
def test_graphs_do_not_depend_on_who_finds_the_neighbours(name: str) -> None:
    slide_ptr = [0, 5, 5, len(clouds[name])]
    ours, theirs = (SpotGraph.build(clouds[name], 7, slide_ptr, search=search) for search in (None, nearest_by_table))
    for field in dataclasses.fields(SpotGraph):
        assert torch.equal(getattr(ours, field.name), getattr(theirs, field.name)), field.name


def test_bad_input_never_reaches_a_search() -> None:
    def search(*_: object) -> torch.Tensor:
        raise AssertionError

    for coords, k, slide_ptr in (
        (np.full((3, 2), np.nan), 2, None),
        (np.zeros((3, 2)), 0, None),
        (np.zeros((3, 2)), 2, [0, 2]),
    ):
        with pytest.raises(InputError):
            SpotGraph.build(coords, k, slide_ptr, search=search)


@pytest.mark.parametrize("at_once", [1, 100])
def test_geometry_does_not_depend_on_its_parts(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = SpotGraph.build(clouds["hexagonal"].astype(np.float32), 6)
    monkeypatch.setattr(graph_module, "EDGES_AT_ONCE", at_once)
    assert torch.equal(SpotGraph.build(clouds["hexagonal"].astype(np.float32), 6).geometry, graph.geometry)

"""The neighbour kernel against the k-d tree, entry by entry: ties, piles, outliers, packed slides, sizes that break.

Where there is no lattice, both against all distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stflow_fast.errors import InputError
from stflow_fast.graph import MISSING, SpotGraph
from stflow_fast.graph.trees import Forest

from .graph_cases import exact_table, hexagonal, motion, square

triton = pytest.importorskip("triton")
neighbors = pytest.importorskip("stflow_fast.kernels.neighbors")
launch = pytest.importorskip("stflow_fast.kernels.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN_COLS = neighbors.COLS


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for each tile, whatever its size."""
    if DEVICE == "cpu":
        monkeypatch.setattr(neighbors, "COLS", 32)


def assert_equal_to_the_tree(
    coords: np.ndarray | torch.Tensor, k: int, slide_ptr: list[int] | None = None, device: str = DEVICE
) -> SpotGraph:
    expected = SpotGraph.build(coords, k, slide_ptr, torch.float64)
    graph = SpotGraph.build(coords, k, slide_ptr, torch.float64, device=device, search=neighbors.nearest)
    assert graph.neighbors.device.type == device
    for name in ("order", "neighbors", "slide_ptr", "slide_of", "spot_id"):
        found, wanted = getattr(graph, name).cpu(), getattr(expected, name)
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found, wanted), name
    scale = expected.geometry.abs().max().item() if expected.geometry.numel() else 0.0
    tolerance = 0.0 if device == "cpu" else 1e-9 * scale
    assert torch.allclose(graph.geometry.cpu(), expected.geometry, rtol=0, atol=tolerance)
    return graph


rng = np.random.default_rng(0)
turn, _ = motion(0.3, False, (0, 0))
no_lattices = {
    "uniform, float32": rng.uniform(0, 20_000, (70, 2)).astype(np.float32),
    "jittered by 10 %, float32": ((hexagonal(8, 9) + rng.uniform(-0.1, 0.1, (72, 2))) * 100 + 9000).astype(np.float32),
    "jittered by 0.1 %": hexagonal(8, 9) * 100 + rng.uniform(-0.1, 0.1, (72, 2)),
    "Visium in whole pixels": np.round(rng.permutation(hexagonal(8, 9)) @ turn * 100),
    "Visium in whole pixels, 833, float32": np.round(rng.permutation(hexagonal(8, 9)) @ turn * 833).astype(np.float32),
    "mirrored on the diagonal": np.concatenate(
        [half := rng.uniform(0, 9, (30, 2)), half[:, ::-1], rng.uniform(0, 9, (10, 1)).repeat(2, axis=1)]
    ),
}
clouds = {
    "half a lattice, in float32": np.concatenate(
        [hexagonal(6, 6) @ turn * 100 + 9000, rng.uniform(9600, 10_200, (36, 2))]
    ).astype(np.float32),
    "uniform": rng.uniform(0, 100, (70, 2)),
    "square": square(8, 9),
    "hexagonal, turned": rng.permutation(hexagonal(8, 9)) @ turn * 55,
    "square in float32, turned, far away": (square(8, 9) @ turn * 100 + 40_000).astype(np.float32),
    "whole numbers": rng.integers(0, 9, (70, 2)),
    "half precision": rng.uniform(0, 100, (40, 2)).astype(np.float16),
    "clusters of three densities and outliers": rng.permutation(
        np.concatenate([rng.normal(0, s, (22, 2)) + 50 * s for s in (1e-3, 0.1, 5)] + [[[1e5, 1e5], [-3e5, 2e4]]])
    ),
    "in one cell but for an outlier": np.concatenate([rng.uniform(0, 1, (40, 2)), [[1e7, -1e7]]]),
    "pairs and triples": rng.permutation(np.repeat(rng.uniform(0, 1, (28, 2)), [2, 3] * 14, axis=0)),
    "a pile among others": rng.permutation(np.concatenate([np.full((30, 2), 0.5), rng.uniform(0, 1, (40, 2))])),
    "all in one place": np.full((40, 2), -7.0),
    "on a line": np.column_stack([np.full(50, 3.0), rng.permutation(np.arange(50.0))]),
}


@pytest.mark.parametrize("name", clouds)
@pytest.mark.parametrize("k", [1, 9])
def test_graphs_are_equal(name: str, k: int) -> None:
    assert_equal_to_the_tree(clouds[name], k)


@pytest.mark.parametrize("name", no_lattices)
@pytest.mark.parametrize("k", [4, 16])
def test_neighbours_are_the_exact_ones_where_there_is_no_lattice(name: str, k: int) -> None:
    graph = assert_equal_to_the_tree(no_lattices[name], k)
    table = graph.to_spots(graph.order[graph.neighbors]).cpu()
    assert np.array_equal(table.numpy(), exact_table(no_lattices[name], k))


@pytest.mark.parametrize("name", ["uniform", "all in one place"])
def test_many_neighbours(name: str) -> None:
    assert_equal_to_the_tree(clouds[name], 64)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6])
def test_missing_neighbours_are_marked(n: int) -> None:
    graph = assert_equal_to_the_tree(np.random.default_rng(n).uniform(size=(n, 2)), 5)
    assert ((graph.neighbors != MISSING).sum(dim=1) == min(5, max(n - 1, 0))).all()


def test_packed_slides_are_as_if_alone() -> None:
    parts = [
        clouds["uniform"][:30],
        np.empty((0, 2)),
        square(4, 5) @ turn * 1e4,
        np.zeros((1, 2)),
        np.full((9, 2), 50.0),
    ]
    slide_ptr = np.cumsum([0, *map(len, parts)])
    packed = assert_equal_to_the_tree(np.concatenate(parts), 6, slide_ptr)
    for part, start, stop in zip(parts, slide_ptr, slide_ptr[1:], strict=False):
        alone = assert_equal_to_the_tree(part, 6).neighbors
        assert torch.equal(packed.neighbors[start:stop], torch.where(alone == MISSING, MISSING, alone + start))


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cells=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=0, max_size=24),
    precision=st.sampled_from([np.float64, np.float32, np.float16]),
    angle=st.sampled_from([0.0, 0.3]),
    shift=st.sampled_from([0.0, 1e3]),
    cut=st.integers(0, 24),
    k=st.integers(1, 6),
)
def test_ties_of_any_pattern(
    cells: list[tuple[int, int]], precision: type, angle: float, shift: float, cut: int, k: int
) -> None:
    turned, _ = motion(angle, False, (0, 0))
    coords = (np.array(cells, dtype=float).reshape(-1, 2) @ turned + shift).astype(precision)
    assert_equal_to_the_tree(coords, k, [0, min(cut, len(coords)), len(coords)])


def arguments(coords: np.ndarray, k: int, slide_ptr: list[int] | None = None) -> dict[str, Any]:
    """What ``SpotGraph.build`` hands over."""
    received: dict[str, Any] = {}

    def search(*args: Any) -> torch.Tensor:
        received.update(zip(("points", "code", "slide_ptr", "tied", "spot", "k"), args, strict=True))
        return neighbors.nearest(*args)

    SpotGraph.build(coords, k, slide_ptr, device=DEVICE, search=search)
    return received | {"k": k}


@pytest.mark.parametrize(
    ("millionths", "order"),
    [
        ([1.8, 0, 0.5], [2, 3, 1]),  # the farthest is tied to neither
        ([2.4, 1.6, 0.8, 0], [1, 2, 3, 4]),  # each is tied to the next
        ([4.2, 2.4, 1.6, 0.8, 0], [2, 3, 4, 5, 1]),
    ],
)
def test_ties_are_chains(millionths: list[float], order: list[int]) -> None:
    along = np.array([0.0, *(1 + 1e-6 * np.array(millionths))])
    given_ = arguments(np.column_stack([along, np.zeros_like(along)]), len(order))
    given_["tied"] = torch.full_like(given_["tied"], 1e-6)
    spot = given_["spot"]
    assert spot[neighbors.nearest(**given_)[spot == 0]][0].tolist() == order
    points, code, slide_ptr, tied, spot, k = (part.cpu() if torch.is_tensor(part) else part for part in given_.values())
    rows = Forest(points, code, slide_ptr, spot, k).nearest(tied, k)
    assert spot[rows[spot == 0]][0].tolist() == order


def test_the_tile_of_the_gpu_and_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "COLS", PLAIN_COLS)
    monkeypatch.setattr(neighbors, "QUERIES_AT_ONCE", 37)
    with launch.use_launch("nearest", launch.launch_of("nearest", 80, "float64")):
        assert_equal_to_the_tree(clouds["clusters of three densities and outliers"], 3, [0, 50, 68])


def test_a_pile_adds_no_candidates() -> None:
    random = np.random.default_rng(0)
    pile = random.permutation(np.concatenate([np.zeros((3000, 2)), random.uniform(1, 2, (50, 2))]))
    graph = assert_equal_to_the_tree(pile, 2)
    spots = graph.order[graph.neighbors]
    assert len(spots[(pile == 0).all(axis=1)[graph.order.cpu()]].unique()) == 3


def test_what_memory_held_before_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.empty

    def poisoned(*args: object, **options: object) -> torch.Tensor:
        memory = plain(*args, **options)
        return memory.fill_(float("nan") if memory.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert_equal_to_the_tree(clouds["a pile among others"], 5, [0, 3, 40, 70])


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("points", lambda points: points.float(), "points: must have shape"),
        ("points", lambda points: points[:, :1], "points: must have shape"),
        ("code", lambda code: code.int(), "code: must have shape"),
        ("code", lambda code: code.flip(0), "code: must be the Morton codes"),
        ("code", lambda code: code + 1, "code: must be the Morton codes"),
        ("tied", lambda tied: tied[1:], "tied: must have shape"),
        ("spot", lambda spot: spot.float(), "spot: must have shape"),
        ("spot", lambda spot: spot + 1, "spot: must hold every index once"),
        ("spot", lambda spot: spot // 2, "spot: must hold every index once"),
        ("tied", lambda tied: tied.to("meta"), "tied: must be on"),
        ("slide_ptr", lambda slide_ptr: slide_ptr - 1, "slide_ptr: must rise"),
        ("slide_ptr", lambda slide_ptr: slide_ptr[[0, 2, 1, 2]], "slide_ptr: must rise"),
        ("k", lambda k: 0, "k: must be at least 1"),
    ],
)
def test_bad_arguments_are_named(name: str, change: object, complaint: str) -> None:
    given_ = arguments(clouds["uniform"], 3, [0, 20, 70])
    given_[name] = change(given_[name])
    with pytest.raises(InputError, match=complaint):
        neighbors.nearest(**given_)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 8, 64])
def test_large_slides_on_a_gpu(k: int) -> None:
    random = np.random.default_rng(1)
    lattice = (random.permutation(hexagonal(100, 70)) @ turn * 100 + 20_000).astype(np.float32)
    clusters = [random.normal(0, s, (2000, 2)) + 100 * s for s in (0.01, 1, 100)]
    parts = [lattice, *clusters, [[1e6, 1e6]], random.uniform(0, 1, (6999, 2))]
    slide_ptr = [0, 7000, 13_001, 20_000]
    assert_equal_to_the_tree(np.concatenate(parts), k, slide_ptr, "cuda")
    assert_equal_to_the_tree(lattice, k, None, "cuda")

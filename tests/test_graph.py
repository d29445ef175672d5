"""Frames, spot order and the graph of packed slides, and invariance under motions of the plane."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast.errors import InputError
from stflow_fast.graph import MISSING, SpotGraph, edge_geometry, knn_graph, morton_code, space_order, spot_grid
from stflow_fast.graph import geometry as geometry_module
from stflow_fast.graph import lattices as lattices_module

from .graph_cases import clouds, hexagonal, motion, sorted_frames


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
    for module in (geometry_module, lattices_module):
        monkeypatch.setattr(module, "EDGES_AT_ONCE", at_once)
    assert torch.equal(SpotGraph.build(clouds["hexagonal"].astype(np.float32), 6).geometry, graph.geometry)

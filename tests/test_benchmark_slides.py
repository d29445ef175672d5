"""Synthetic slides of the benchmarks."""

from __future__ import annotations

import pytest
import torch
from scipy.spatial import cKDTree

from benchmarks.suite.slides import LAYOUTS, benchmark_slide, features
from benchmarks.suite.workload import PITCH, parse_sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 13, 1000])
def test_a_slide_is_its_arguments(layout: str, n: int) -> None:
    slide, again, other = (benchmark_slide(layout, n, seed, 3, 4) for seed in (5, 5, 6))
    assert [tuple(part.shape) for part in slide] == [(n, 4), (n, 2), (n, 3), (n, 3)]
    assert all(map(torch.equal, slide, again))
    assert not torch.equal(slide.features, other.features)
    assert torch.equal(slide.coords, slide.coords.float().double())
    assert all((part != 0).all() for part in (slide.features, slide.x_0, slide.x_1))


def nearest(coords: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cKDTree(coords.numpy()).query(coords.numpy(), k=2)[0][:, 1])


def test_only_the_regular_lattice_has_ties() -> None:
    distance = {name: nearest(benchmark_slide(name, 2000, 0, 1, 1).coords) for name in LAYOUTS}
    assert (distance["visium"] - PITCH).abs().max() < 1e-2
    for name in ("uniform", "visium_jittered", "clustered"):
        assert len(distance[name].unique()) > 900  # each distance at most twice: of a pair


def test_densities_of_clustered_tissue_differ_thirtyfold() -> None:
    distance = nearest(benchmark_slide("clustered", 12_000, 0, 1, 1).coords).view(12, 1000).median(dim=1).values
    density = distance[0].square() / distance.square()
    assert density[-1] < 1 / 10
    assert (density.diff() < 0).all()


def test_clusters_leave_empty_space() -> None:
    coords = benchmark_slide("clustered", 12_000, 0, 1, 1).coords
    cells = ((coords - coords.amin(dim=0)) / (coords.amax(dim=0) - coords.amin(dim=0)) * 29.99).long()
    assert len((cells[:, 0] * 30 + cells[:, 1]).unique()) < 0.5 * 30 * 30


def test_sets_of_features_to_rotate_among() -> None:
    first, second = (features(50, 4, seed) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_sizes_from_text() -> None:
    assert parse_sizes("1e3,1e4,605471") == [1000, 10_000, 605_471]


@pytest.mark.parametrize("text", ["1.5", "0", "-3", "1e3,", "many", "inf", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"sizes|could not convert"):
        parse_sizes(text)

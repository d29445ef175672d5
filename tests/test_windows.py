"""What training sees: windows, regions and slides that are held out, and settings that cannot be."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.graph import knn_graph
from stflow_fast.slides import Slide
from stflow_fast.synthetic import make_cohort
from stflow_fast.windows import TrainingConfig, TrainingData, WindowBatch, Windows, hold_out_slides

from .training_cases import QUICK, data

__all__ = ["data"]  # a fixture


def test_regions_are_held_out_whole(data: TrainingData) -> None:
    cohort = make_cohort(n_train=2, train_spots=120, test_spots=10, n_genes=6, feature_dim=12)
    for slide, rest, region in zip(cohort.train, data.train, data.selection, strict=True):
        assert sorted([*rest.barcodes, *region.barcodes]) == sorted(slide.barcodes)
        assert region.n_spots == 24
        # A disc: no spot outside is nearer to its middle than the farthest spot inside.
        centre = region.coords[np.argmin([np.linalg.norm(region.coords - c, axis=1).max() for c in region.coords])]
        inside = np.linalg.norm(region.coords - centre, axis=1).max()
        assert (np.linalg.norm(rest.coords - centre, axis=1) < 0.7 * inside).sum() == 0


def test_whole_slides_are_held_out_where_there_are_enough(data: TrainingData) -> None:
    slides = [dataclasses.replace(data.train[0], id=str(number)) for number in range(10)]
    for n, expected in ((2, 0), (3, 0), (4, 1), (10, 2)):
        train, held_out = hold_out_slides(slides[:n], 0.15, seed=0)
        assert len(held_out) == expected
        assert sorted(slide.id for slide in train + held_out) == [str(number) for number in range(n)]
    chosen = {hold_out_slides(slides, 0.1, seed)[1][0].id for seed in range(100)}
    assert chosen == {slide.id for slide in slides}


def test_windows_are_the_nearest_spots_and_do_not_depend_on_their_batch(data: TrainingData) -> None:
    windows = Windows(data, QUICK, n_neighbors=5)
    everything = [window for batch in windows.batches(1) for window in batch]
    assert sorted(everything) == [(slide, number) for slide in (0, 1) for number in range(4)]
    assert windows.batches(1) != windows.batches(2)
    alone, paired = windows.make(1, [(0, 3)]), windows.make(1, [(1, 0), (0, 3)])
    of_window = paired.graph.slide_of == 1
    for name in ("features", "x_0", "x_1"):
        assert torch.equal(getattr(paired, name)[of_window], getattr(alone, name))
    assert torch.equal(paired.t[1:], alone.t)
    assert torch.equal(paired.slide_seed[1:], alone.slide_seed)
    assert alone.graph.n_spots >= 6
    slide, spots = data.train[0], spots_of(alone, data.train[0])
    distances = (np.linalg.norm(slide.coords - slide.coords[spot], axis=1) for spot in spots)
    assert any(d[spots].max() <= np.delete(d, spots).min(initial=np.inf) + 1e-9 for d in distances)


def spots_of(window: WindowBatch, slide: Slide) -> np.ndarray:
    """Which spots of the slide a window of it has, in the window's order."""
    rows = window.graph.to_spots(window.features).numpy()
    return np.array([np.flatnonzero((slide.features == row).all(axis=1))[0] for row in rows])


def test_a_spot_has_the_neighbours_in_a_window_that_it_has_in_the_slide(data: TrainingData) -> None:
    """On a lattice, where the seventh and eighth neighbour are tied with others: ties are broken alike."""
    k, slide = 8, data.train[0]
    windows, whole = Windows(data, QUICK, k), knn_graph(slide.coords, k).numpy()
    compared = 0
    for number in range(20):
        window = windows.make(1, [(0, number)])
        spots, graph = spots_of(window, slide), window.graph
        found = spots[graph.to_spots(graph.order[graph.neighbors]).numpy()]
        # Inside: all spots of the slide up to a pitch and a half beyond the neighbours are in the window.
        reach = 1.5 * np.linalg.norm(slide.coords[whole[spots, -1]] - slide.coords[spots], axis=1)
        distance = np.linalg.norm(slide.coords[spots][:, None] - slide.coords, axis=2)
        inside = ~((distance <= reach[:, None]) & ~np.isin(np.arange(slide.n_spots), spots)).any(axis=1)
        assert np.array_equal(found[inside], whole[spots][inside])
        compared += inside.sum()
    assert compared > 100


def test_window_sizes_are_uniform_fractions(data: TrainingData) -> None:
    windows = Windows(data, QUICK, n_neighbors=5)
    sizes = [windows.make(epoch, [(0, n)]).graph.n_spots for epoch in range(50) for n in range(4)]
    fractions = np.array(sizes) / data.train[0].n_spots
    assert abs(fractions.mean() - 0.53) < 0.07  # a little over a half: no window is below K + 1 spots
    assert fractions.max() <= 1


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"n_sample_steps": 1}, "n_sample_steps"),
        ({"prior": "none"}, "prior"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: must be"):
        TrainingConfig(**settings)

"""Draws captured and replayed, with a stand-in for CUDA's graphs, and memory that is given back at once."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from stflow_fast import use_backend
from stflow_fast.sampling import PreparedSlide, Sampler

from .cuda_stand_in import StandIn
from .sampling_cases import model, slide


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_a_prepared_slide_gives_its_memory_back_at_once() -> None:
    prepared = Sampler(model()).prepare(slide(30))
    prepared.draw()
    prepared.draw(trajectory=True)
    gone = weakref.ref(prepared.image)
    with without_garbage_collection():
        del prepared
        assert gone() is None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


@pytest.fixture
def sampler(cuda: StandIn) -> Sampler:
    """On the CPU, with a stream as if it were on a GPU."""
    sampler = Sampler(model(), n_sample_steps=4)
    assert sampler.stream is None
    sampler.stream = torch.cuda.Stream()
    return sampler


@pytest.fixture
def plain(sampler: Sampler) -> PreparedSlide:
    return Sampler(sampler.model, n_sample_steps=4).prepare(slide())


def test_the_first_draw_runs_the_second_is_captured_and_all_behind_are_replayed(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide
) -> None:
    prepared, counts = sampler.prepare(slide()), []
    for seed in range(4):
        found = prepared.draw(seed=seed)
        counts.append((len(cuda.graphs), cuda.replays))
        assert torch.equal(found.expression, plain.draw(seed=seed).expression)
        assert found.nfe == 3
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_what_is_captured_ran_on_the_same_stream_before(cuda: StandIn, sampler: Sampler) -> None:
    prepared, current = sampler.prepare(slide()), torch.cuda.current_stream()
    prepared.draw()
    assert cuda.streams == [sampler.stream]
    assert sampler.stream.waited_for == [current]
    assert current.waited_for == [sampler.stream]
    prepared.draw()
    assert cuda.streams == [sampler.stream] * 2
    assert not cuda.workspaces  # they are the graph's, and nobody else may use them


def test_a_sample_outlives_later_replays(sampler: Sampler, plain: PreparedSlide) -> None:
    prepared = sampler.prepare(slide())
    draws = [prepared.draw(seed=seed).expression for seed in range(4)]
    for seed, draw in enumerate(draws):
        assert torch.equal(draw, plain.draw(seed=seed).expression)


def test_a_trajectory_is_no_replay_and_no_run_before_a_capture(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide
) -> None:
    prepared = sampler.prepare(slide())
    for seed, replays in enumerate((0, 0, 1, 2)):
        found = prepared.draw(seed=seed, trajectory=True)
        assert torch.equal(found.expression, plain.draw(seed=seed).expression)
        assert torch.equal(found.trajectory[-1], found.expression)
        assert cuda.replays == replays
        prepared.draw()


def test_a_slide_without_spots_is_not_captured(cuda: StandIn, sampler: Sampler) -> None:
    prepared = sampler.prepare((torch.rand(0, 6), torch.rand(0, 2)))
    assert [prepared.draw().expression.shape for _ in range(3)] == [(0, 5)] * 3
    assert not cuda.streams


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "other", [lambda: use_backend("reference"), lambda: torch.autocast("cpu", torch.bfloat16), tf32]
)
def test_under_other_circumstances_it_starts_again(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide, other: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    prepared, counts = sampler.prepare(slide()), []
    for circumstances in (contextlib.nullcontext, other, contextlib.nullcontext):
        for seed in range(3):
            with circumstances():
                assert torch.equal(prepared.draw(seed=seed).expression, plain.draw(seed=seed).expression)
            counts.append((len(cuda.graphs), cuda.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 2), (2, 3), (2, 4), (2, 4), (3, 5), (3, 6)]


def test_a_failed_capture_is_forgotten_and_so_is_the_one_before(
    cuda: StandIn, sampler: Sampler, plain: PreparedSlide
) -> None:
    prepared, runs = sampler.prepare(slide()), []

    def draw(seed: int) -> None:
        before = len(cuda.graphs), cuda.replays
        assert torch.equal(prepared.draw(seed=seed).expression, plain.draw(seed=seed).expression)
        runs.append((len(cuda.graphs) - before[0], cuda.replays - before[1]))

    draw(0)
    draw(1)
    with use_backend("reference"):
        draw(2)
        cuda.fails = True
        with pytest.raises(torch.OutOfMemoryError):
            prepared.draw()
        cuda.fails = False
        draw(3)
        draw(4)
        draw(5)
    run, capture, replay = (0, 0), (1, 1), (0, 1)
    assert runs == [run, capture, run, run, capture, replay]


def test_a_captured_slide_gives_its_memory_back_at_once(cuda: StandIn, sampler: Sampler) -> None:
    prepared = sampler.prepare(slide())
    prepared.draw()
    prepared.draw()
    gone = weakref.ref(prepared.image)
    with without_garbage_collection():
        cuda.graphs.clear()
        del prepared
        assert gone() is None

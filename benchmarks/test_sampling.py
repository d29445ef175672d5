"""Sampling a slide on the CPU, against the published algorithm. Run: ``python -m pytest benchmarks -q``.

All of ``stflow_fast.sample`` is timed: neighbour search, geometry, folding, four calls of the network. What is not:
making the inputs, and torch.compile, which a first sample of the same network pays for (``first_sample_seconds`` in
the JSON). Sizes for a rehearsal: STFLOW_BENCH_RACE, STFLOW_BENCH_SCALING, STFLOW_BENCH_MEMORY, STFLOW_BENCH_GRAPH,
STFLOW_BENCH_ROUNDS, STFLOW_BENCH_THREADS.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stflow_fast import sample
from stflow_fast.graph import SpotGraph
from stflow_fast.ops import COMPILED_BLOCK, cpp_compiler, use_compile

from .baselines.eager_stflow import EagerDenoiser, eager_sample
from .workload import (
    FEATURE_DIM,
    GRAPH_SPOTS,
    MEMORY_SPOTS,
    N_GENES,
    PITCH,
    RACE_SPOTS,
    ROUNDS,
    SAMPLE_STEPS,
    SCALING_SPOTS,
    hexagonal_lattice,
    network,
    slide,
)

ROOT = Path(__file__).resolve().parents[1]

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler for torch.compile")


def time_ours(benchmark: BenchmarkFixture, mode: str, n_spots: int) -> None:
    features, coords, noise = slide(n_spots)
    model = network()
    benchmark.extra_info.update(n_spots=n_spots, variant=mode)
    with use_compile(mode):
        begun = time.perf_counter()
        for small in (COMPILED_BLOCK, 2 * COMPILED_BLOCK):  # the second size makes torch.compile see that it varies
            sample(model, (features[:small], coords[:small]), x_0=noise[:small], n_sample_steps=SAMPLE_STEPS)
        benchmark.extra_info["first_sample_seconds"] = time.perf_counter() - begun
        drawn = benchmark.pedantic(
            sample,
            args=(model, (features, coords)),
            kwargs={"x_0": noise, "n_sample_steps": SAMPLE_STEPS},
            rounds=ROUNDS if n_spots <= 30_000 else 1,  # the largest take minutes
        )
    assert drawn.nfe == SAMPLE_STEPS - 1


@pytest.mark.benchmark(group="race")
def test_eager(benchmark: BenchmarkFixture) -> None:
    features, coords, noise = slide(RACE_SPOTS)
    model = EagerDenoiser(N_GENES, FEATURE_DIM).eval()
    model.load_state_dict(network().state_dict())
    benchmark.extra_info.update(n_spots=RACE_SPOTS, variant="eager")
    coords = coords.float()
    benchmark.pedantic(eager_sample, args=(model, features, coords, noise, SAMPLE_STEPS), rounds=max(1, ROUNDS - 1))


@pytest.mark.benchmark(group="race")
@pytest.mark.parametrize("mode", ["off", pytest.param("on", marks=needs_compiler)])
def test_ours(benchmark: BenchmarkFixture, mode: str) -> None:
    time_ours(benchmark, mode, RACE_SPOTS)


@needs_compiler
def test_they_compute_the_same() -> None:
    """On an irregular slide. On the lattice of the race the work is the same, but not the answer: which of several
    tied neighbours comes first, and the axes of an isotropic neighbourhood, the published code leaves to its libraries.
    """
    features, coords, noise = slide(2000)
    jitter = torch.rand(coords.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    coords = (coords + 0.8 * PITCH * jitter).float()
    model = network()
    eager = EagerDenoiser(N_GENES, FEATURE_DIM).eval()
    eager.load_state_dict(model.state_dict())
    expected = eager_sample(eager, features, coords, noise, SAMPLE_STEPS)
    for mode in ("off", "on"):
        with use_compile(mode):
            found = sample(model, (features, coords), x_0=noise, n_sample_steps=SAMPLE_STEPS).expression
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.benchmark(group="scaling")
@pytest.mark.parametrize("n_spots", SCALING_SPOTS)
def test_time_per_spot(benchmark: BenchmarkFixture, n_spots: int) -> None:
    time_ours(benchmark, "off", n_spots)


@pytest.mark.benchmark(group="graph")
def test_graph(benchmark: BenchmarkFixture) -> None:
    """The spot graph of the largest public slide: neighbours, space order and edge geometry."""
    coords = hexagonal_lattice(GRAPH_SPOTS)
    benchmark.extra_info.update(n_spots=GRAPH_SPOTS, variant="graph")
    graph = benchmark.pedantic(SpotGraph.build, args=(coords, 8), rounds=ROUNDS)
    assert graph.n_spots == GRAPH_SPOTS


@pytest.mark.parametrize("mode", ["off", pytest.param("on", marks=needs_compiler)])
@pytest.mark.benchmark(group="memory")
def test_peak_memory(benchmark: BenchmarkFixture, mode: str) -> None:
    """In a process of its own: the peak of a process never falls. The time is that of the process, imports and all."""
    command = [sys.executable, "-m", "benchmarks.peak_memory", str(MEMORY_SPOTS), mode]

    def measure() -> dict[str, int]:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    measured = benchmark.pedantic(measure, rounds=1)
    benchmark.extra_info.update(measured, n_spots=MEMORY_SPOTS, variant=mode)
    assert 0 < measured["peak_above_inputs"] < 3e9

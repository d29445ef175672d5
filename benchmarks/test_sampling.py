"""The regular set, for pytest-benchmark: ``python -m pytest benchmarks -q --benchmark-json=bench.json``.

The providers of ``stflow-fast benchmark`` one by one, grouped by workload; that command times them in turns, which
holds on a busy machine. For a rehearsal: STFLOW_BENCH_SPOTS, STFLOW_BENCH_ROUNDS, STFLOW_BENCH_THREADS.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stflow_fast import Denoiser, DenoiserConfig, Sampler

from .command import CPU_GRAPHS, CPU_PROVIDERS
from .suite import jobs, measure, run
from .suite.cases import Case, Plan
from .suite.workload import N_GENES, ROUNDS, SPOTS, THREADS

WORKLOADS = {"graph": CPU_GRAPHS, **dict.fromkeys(("denoise", "sample", "train_step"), CPU_PROVIDERS)}
RUNS = [
    pytest.param(workload, name, spots, marks=pytest.mark.benchmark(group=workload))
    for workload, names in WORKLOADS.items()
    for name, spots in itertools.product(names, SPOTS)
]


@pytest.mark.benchmark(group="host of a draw")
@pytest.mark.parametrize("spots", SPOTS)
def test_what_a_draw_is_beside_its_loop(benchmark: BenchmarkFixture, spots: int) -> None:
    """The share of the host where a GPU replays the loop: checks, modes, precision, order of the spots."""
    network = Denoiser(DenoiserConfig(n_genes=N_GENES, feature_dim=8))
    prepared = Sampler(network, precision="bf16", memory_budget=0).prepare((torch.rand(spots, 8), torch.rand(spots, 2)))
    x_0 = torch.rand(spots, N_GENES)
    prepared._loop = lambda terms: terms
    benchmark.extra_info.update(spots=spots)
    benchmark(lambda: prepared.draw(x_0))


@pytest.mark.parametrize(("workload", "name", "spots"), RUNS)
def test_provider(benchmark: BenchmarkFixture, workload: str, name: str, spots: int) -> None:
    device = torch.device("cpu")
    plan = Plan(device, int(0.9 * measure.free_memory(device)), ROUNDS)
    case = Case(workload, "visium", spots, 8, N_GENES, "float32", THREADS)
    job = jobs.job_of(plan, case, name)
    if lacks := job.why_not(spots, plan.memory_budget):
        pytest.skip(lacks)
    assert jobs.check(plan, case, name).check != "red"
    peak = measure.in_own_process(run.peak_of, plan, case, name)
    benchmark.extra_info.update(spots=spots, provider=name, peak_bytes=peak and peak.get("peak_bytes"))
    job.prepare(spots, case.layout)
    turns = itertools.count()
    timed: Any = benchmark  # pytest-benchmark says no types
    timed.pedantic(lambda: job.call(next(turns)), rounds=ROUNDS, warmup_rounds=1)

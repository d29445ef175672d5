"""The floor of the benchmarks: its count against torch's own, and the rates that it is set over."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stflow_fast.benchmarks.suite import floor
from stflow_fast.benchmarks.suite.floor import Rates, Work
from stflow_fast.benchmarks.suite.jobs import Case, Plan, job_of
from torch.utils.flop_counter import FlopCounterMode

from stflow_fast import DenoiserConfig

CONFIG = DenoiserConfig(n_genes=50, feature_dim=64, n_layers=2)
SPOTS = 1024
"""A whole number of blocks."""


def counting() -> FlopCounterMode:
    """torch's counter, and what it does not count: a product in place."""

    def flops(total: torch.Size, a: torch.Size, b: torch.Size, out_shape: torch.Size, **options: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops})


def sums_of_values(config: DenoiserConfig, calls: int) -> int:
    """Operations of the sums of neighbours' values, which torch counts where they are products of matrices alone."""
    return 2 * SPOTS * calls * config.n_layers * config.n_neighbors * config.hidden_dim


@pytest.mark.parametrize(
    "changed", [{}, {"n_genes": 700}, {"n_neighbors": 16}, {"activation": "gelu"}, {"pairwise_hidden_dim": 64}]
)
@pytest.mark.parametrize("workload", ["denoise", "sample"])
def test_the_count_is_torchs_count_of_what_runs(workload: str, changed: dict) -> None:
    config = dataclasses.replace(CONFIG, **changed)
    plan = Plan(torch.device("cpu"), 2**33, network=config)
    job = job_of(plan, Case(workload, "visium", SPOTS, config.n_neighbors, config.n_genes, "float32"), "reference")
    job.provider.model.requires_grad_(False)  # else the counter asks for gradient functions
    job.prepare(SPOTS, "visium")
    job.call(0)
    with counting() as counter:
        job.call(0)
    calls = 4 if workload == "sample" else 1
    done = counter.get_total_flops() + sums_of_values(config, calls)
    # Beside what is needed: padding of the context.
    assert 0.99 < floor.work(workload, config, SPOTS).flops / done <= 1


def test_a_training_step_needs_no_more_than_is_done() -> None:
    plan = Plan(torch.device("cpu"), 2**33, network=CONFIG)
    job = job_of(plan, Case("train_step", "visium", SPOTS, 8, CONFIG.n_genes, "float32"), "reference")
    job.prepare(SPOTS, "visium")
    job.call(0)
    with counting() as counter:
        job.call(0)
    done = counter.get_total_flops() + 3 * sums_of_values(CONFIG, 1)
    # Beside what is needed: padding of the context.
    assert 0.95 < floor.work("train_step", CONFIG, SPOTS).flops / done <= 1


def test_work_grows_with_the_spots_alone() -> None:
    one, ten = (floor.work("sample", CONFIG, spots) for spots in (1_000, 10_000))
    assert ten == pytest.approx(tuple(10 * part for part in one))


def test_the_slower_of_products_and_traffic_is_the_floor() -> None:
    rates = Rates(flops_per_s=1e9, bytes_per_s=1e9)
    assert floor.floor_ms(Work(2e9, 1.0), rates, 4) == pytest.approx(2000)
    assert floor.floor_ms(Work(1.0, 1e9), rates, 4) == pytest.approx(4000)
    assert floor.floor_ms(Work(1.0, 1e9), rates, 2) == pytest.approx(2000)


@pytest.mark.parametrize("precision", ["ieee", "bf16"])
def test_rates_are_measured(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "MATRIX_SIDE", {"cpu": 64})
    monkeypatch.setattr(floor, "COPIED_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(floor, "SETTLING", 0.0)
    assert all(rate > 1e6 for rate in floor.measured_rates(torch.device("cpu"), precision))
    assert torch.get_float32_matmul_precision() == "highest"

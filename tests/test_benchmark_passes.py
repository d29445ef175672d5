"""Launches, bytes and memory of a sample and a training step, as a GPU would make them: none may grow unseen."""

from __future__ import annotations

import pytest
import torch

from stflow_fast import Denoiser, DenoiserConfig, Sampler

from .kernel_cases import DEVICE

pytest.importorskip("triton")

if DEVICE == "cuda":
    pytest.skip("counts what is interpreted; a GPU has its profiler", allow_module_level=True)

from benchmarks.counts import passes


@pytest.fixture(scope="module")
def sample() -> passes.Counted:
    return passes.counted_sample(kept=4)


def test_a_layer_call_is_thirteen_launches_of_thirteen_kilobytes(sample: passes.Counted) -> None:
    of_layer = sample.layer_call()
    assert len(of_layer) <= 13
    assert sum(each.bytes for each in of_layer if each.name != passes.EDGE_KERNEL) <= 13_400
    assert len(sample.passes) <= 230


def test_memory_of_a_million_spots(sample: passes.Counted) -> None:
    """By tensors; 12.1 GB were measured, and 11.9 counted, where the terms outlived their layer."""
    fewer = passes.counted_sample(kept=3)
    assert sample.held + sample.live <= 8_900
    assert fewer.held + fewer.live <= 8_000
    assert [each.name for each in fewer.passes].count(passes.MADE) == 4


@pytest.mark.parametrize("non_negative", [False, True])
def test_a_transcriptome_needs_no_pass_over_the_terms(non_negative: bool) -> None:
    """Of folded heads a layer reads what the head before it reads; else it reads gene terms, one product more."""
    wide = passes.counted_sample(kept=4, n_genes=2000, non_negative=non_negative)
    names = [each.name for each in wide.layer_call()]
    assert "sub_" not in names
    assert len(names) <= 14


def test_a_training_step_of_a_transcriptome_neither() -> None:
    assert "sub_" not in {each.name for each in passes.counted_step(n_genes=2000).passes}


def test_a_training_step() -> None:
    step = passes.counted_step()
    assert len(step.passes) <= 620
    assert len(step.over_spots) <= 286
    assert sum(each.bytes for each in step.passes) <= 258_000
    assert step.live <= 22_000


def test_what_counts_as_a_pass() -> None:
    x, y = torch.ones(10, 4), torch.ones(10, 4, dtype=torch.bfloat16)
    with passes.counting() as found:
        x.view(40).t()
        torch.empty(1000)
        x + y
        x.mul_(2)
        x[torch.arange(5)]
        x.expand(3, 10, 4).sum()
        torch.nn.functional.linear(x, torch.ones(2, 4))
    of = {each.name: each for each in found.found}
    assert of["add"].bytes == 2 * 160 + 80
    assert of["mul_"].bytes == 2 * 160
    assert of["index"].bytes == 5 * 8 + 2 * 5 * 16
    assert of["sum"].bytes == 160 + 4  # an expanded tensor is read once
    assert of["mm"].flops == 2 * 10 * 4 * 2
    assert not {"view", "t", "empty", "expand"} & set(of)
    assert found.waits == 0
    assert found.peak_bytes >= 4000


def test_what_is_no_longer_live_is_not_counted() -> None:
    with passes.counting() as found:
        for _ in range(5):
            torch.zeros(1000)
    assert 4000 <= found.peak_bytes <= 8000


@pytest.mark.parametrize("whole", [False, True])
def test_a_draw_evaluates_and_leaves_the_mode_that_it_found(whole: bool) -> None:
    network = Denoiser(DenoiserConfig(3, 4, hidden_dim=16, n_layers=1, n_heads=1, dropout=0.5, attn_dropout=0.5)).eval()
    prepared, x_0 = Sampler(network).prepare((torch.randn(9, 4), torch.rand(9, 2))), torch.rand(9, 3)
    expected = prepared.draw(x_0).expression
    trained = network if whole else network.backbone
    trained.train()
    modes = [module.training for module in network.modules()]
    assert torch.equal(prepared.draw(x_0).expression, expected)
    assert [module.training for module in network.modules()] == modes

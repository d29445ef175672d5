"""Sampling on a GPU: what a CPU draws, without waiting, replayed, and by blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stflow_fast.arrays import as_array, as_tensor
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.sampling import Sampler, sample

from .sampling_cases import error_in_the_last_corner, model, slide


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_gpu_samples_as_the_cpu_does(monkeypatch: pytest.MonkeyPatch, cuda_graph: bool) -> None:
    """Features stream in from the host in several chunks; the graph is replayed for later draws."""
    monkeypatch.setattr("stflow_fast.sampling.features.FEATURE_CHUNK", 7)
    network, drawn = model(), slide(30)
    x_0 = torch.rand(30, network.config.n_genes, generator=torch.Generator().manual_seed(0))
    expected = sample(network, drawn, x_0=x_0).expression
    prepared = Sampler(network.cuda(), cuda_graph=cuda_graph).prepare(drawn)
    for _ in range(3):
        torch.testing.assert_close(prepared.draw(x_0).expression, expected, rtol=1e-4, atol=1e-5)
        prepared.draw(seed=1)
    trajectory = prepared.draw(x_0, trajectory=True).trajectory
    torch.testing.assert_close(trajectory[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_the_last_corner_of_a_million_spots_is_what_its_patch_alone_gives() -> None:
    torch.manual_seed(0)
    network = Denoiser(DenoiserConfig(n_genes=50, feature_dim=32)).cuda()
    assert error_in_the_last_corner(network, side=1000, patch=100, margin=22) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_a_gpus_sample_by_blocks_is_its_sample(precision: str) -> None:
    prepared = Sampler(model(40).float().cuda(), precision=precision).prepare(slide(3000))
    before, drawn = torch.backends.cuda.matmul.fp32_precision, prepared.draw_blocks(seed=3)
    found = torch.cat([part for _, part in drawn.blocks()])
    torch.testing.assert_close(found, prepared.draw(seed=3).expression, rtol=2**-8, atol=2**-8)
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.gpu
def test_arrays_on_a_gpu_stay_there() -> None:
    x = torch.rand(6, 4, device="cuda")
    for value in (x, x[None], x.clone().requires_grad_(), [*x], x.to(torch.uint32), x.bfloat16()):
        assert as_tensor("x", value, (6, 4)).is_cuda
    assert np.array_equal(as_array("x", x, (6, 4), np.float32), x.cpu().numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_draw_waits_for_the_gpu_once_at_its_end(cuda_graph: bool) -> None:
    """Neither the source nor the sample is copied from or to memory that is not pinned."""
    prepared = Sampler(model().cuda(), cuda_graph=cuda_graph).prepare(slide(30))
    expected = [prepared.draw(seed=0).expression for _ in range(2)][-1]
    torch.cuda.set_sync_debug_mode("error")  # lets an event or a stream be waited for
    try:
        found = prepared.draw(seed=0).expression
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.is_pinned()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_source_on_the_gpu_is_judged_without_another_wait() -> None:
    prepared = Sampler(model().cuda()).prepare(slide(30))
    x_0 = torch.rand(30, prepared.sampler.model.config.n_genes, device="cuda")
    expected = [prepared.draw(x_0).expression for _ in range(2)][-1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = prepared.draw(x_0).expression
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    x_0[3, 1] = torch.nan
    with pytest.raises(InputError, match="x_0: has values that are NaN or infinite"):
        prepared.draw(x_0)


@pytest.mark.gpu
def test_a_replay_under_a_new_autocast_reads_no_freed_weights() -> None:
    """Each draw in an autocast of its own, another slide alive; then in float32, which is captured anew."""
    sampler = Sampler(model().cuda())
    other, prepared = (sampler.prepare(slide(n)) for n in (20, 30))
    x_0 = torch.rand(30, sampler.model.config.n_genes, generator=torch.Generator().manual_seed(0))
    draws = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            draws.append(prepared.draw(x_0).expression)
            other.draw()
        torch.cuda.empty_cache()
    torch.testing.assert_close(draws[2], draws[1], rtol=0, atol=0)
    torch.testing.assert_close(draws[1], draws[0], rtol=2**-6, atol=2**-6)  # the first is no replay
    exact = Sampler(sampler.model, cuda_graph=False).prepare(slide(30)).draw(x_0).expression
    for _ in range(3):
        torch.testing.assert_close(prepared.draw(x_0).expression, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_graph_outlives_those_of_other_slides() -> None:
    """All are captured on one stream, whose cuBLAS memory torch frees with any of them; here that is then filled."""
    sampler = Sampler(model().cuda())
    one, kept, another = (sampler.prepare(slide(n)) for n in (20, 30, 40))
    x_0 = torch.rand(30, sampler.model.config.n_genes, generator=torch.Generator().manual_seed(0))
    for each in (one, kept, another) * 2:
        each.draw()
    expected = kept.draw(x_0).expression
    del one, another, each
    torch.cuda.empty_cache()
    torch.full((2**28,), torch.nan, device="cuda")
    assert torch.equal(kept.draw(x_0).expression, expected)

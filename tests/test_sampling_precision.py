"""Precisions: an autocast and tf32 of the sampler's own, and weights that are cast once."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stflow_fast import use_backend
from stflow_fast.errors import InputError
from stflow_fast.model import EncoderState
from stflow_fast.sampling import Sampler, sample
from stflow_fast.sampling.modes import TF32

from .sampling_cases import model, slide

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("n_genes", [5, 40])
def test_a_precision_is_an_autocast_of_the_samplers_own(n_genes: int) -> None:
    network, spots = model(n_genes).float().eval(), slide()
    exact = sample(network, spots).expression
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(network, spots).expression
        assert torch.equal(sample(network, spots, precision="float32").expression, exact)
    prepared = Sampler(network, precision="bf16").prepare(spots)
    found = prepared.draw().expression
    assert torch.equal(found, expected)
    assert found.dtype == prepared.draw(trajectory=True).expression.dtype == torch.float32
    assert prepared.denoise(torch.zeros(len(found), n_genes), 0.5).dtype == torch.float32
    assert 0 < (found - exact).norm() / exact.norm() < 0.05
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_lasts_until_the_last_thread_that_wants_it_has_left() -> None:
    matmul = torch.backends.cuda.matmul
    before, inside = matmul.fp32_precision, threading.Barrier(2, timeout=30)

    def other() -> None:
        with TF32:
            inside.wait()  # both are
            inside.wait()  # the first has left
            inside.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with TF32:
        inside.wait()
    assert matmul.fp32_precision == "tf32"
    inside.wait()
    inside.wait()
    thread.join()
    assert matmul.fp32_precision == before


def test_a_precision_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="precision: must be float32 or tf32 or bf16, not 'half'"):
        Sampler(model(), precision="half")
    with pytest.raises(InputError, match=r"precision: bf16 is of a float32 model, not one of torch.float64"):
        Sampler(model().double(), precision="bf16")
    with pytest.raises(InputError, match=r"^precision: tf32 is of NVIDIA GPUs, and the model is on the cpu$"):
        Sampler(model(), precision="tf32")


class CastsOf(TorchDispatchMode):
    """Counts the casts of some tensors, and of what shares their memory."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._memory = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage().data_ptr() in self._memory
        return function(*args, **(kwargs or {}))


overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0


@overflows
@pytest.mark.parametrize("n_genes", [5, 40])
def test_weights_are_cast_once_for_all_steps_and_draws_under_an_autocast(n_genes: int) -> None:
    pytest.importorskip("triton")
    counts = {}
    for n_sample_steps in (3, 5):
        sampler = Sampler(model(n_genes).to(DEVICE), n_sample_steps, cuda_graph=False)
        prepared = sampler.prepare(slide(10))
        folded = [leaf for leaf in tree_leaves(sampler.states) if isinstance(leaf, torch.Tensor)]
        casts = counts[n_sample_steps] = []
        for _ in range(2):
            with use_backend("triton"), torch.autocast(DEVICE, torch.bfloat16):
                with CastsOf([*folded, *sampler.model.parameters()]) as cast:
                    prepared.draw()
                casts.append(cast.count)
    assert counts[3] == counts[5]
    assert counts[3][0] > counts[3][1] == 0


@overflows
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("n_genes", [5, 40])
def test_weights_cast_before_give_the_bits_of_weights_cast_in_every_call(
    monkeypatch: pytest.MonkeyPatch, backend: str, n_genes: int
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    network, drawn = model(n_genes).to(DEVICE), slide(10)
    for budget in (0, "1GiB"):
        with use_backend(backend), torch.autocast(DEVICE, torch.bfloat16), monkeypatch.context() as patch:
            found = sample(network, drawn, memory_budget=budget).expression
            patch.setattr(EncoderState, "of_autocast", lambda states: states)
            assert torch.equal(found, sample(network, drawn, memory_budget=budget).expression)


def test_autocast_leaves_a_model_in_float64_alone() -> None:
    network, drawn = model().double(), slide(10)
    expected = sample(network, drawn, memory_budget=0).expression
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(network, drawn, memory_budget=0).expression, expected)

"""The gene head of sampling by the interpreted kernel against its reference; the gate before it with its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import stflow_fast.ops as ops
from stflow_fast.errors import InputError
from stflow_fast.ops import reference

from .kernel_cases import DEVICE, assert_results_agree, differentiate, error, leaves, poisoned_memory

gated = pytest.importorskip("stflow_fast.kernels.gated_mlp")
kernels = pytest.importorskip("stflow_fast.kernels.gene_head")
launch = pytest.importorskip("stflow_fast.kernels.launch")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


def drawn(n: int, d: int, genes: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(n + d + genes)
    sizes = {"pre": (n, d), "gain": (d,), "shift": (d,), "weight": (genes, d), "bias": (genes,), "total": (n, genes)}
    return {name: torch.randn(*size, generator=draw).to(dtype) for name, size in sizes.items()}


def by_kernel(of: dict[str, Tensor], relu: bool = False) -> tuple[Tensor, Tensor]:
    total = of["total"].clone()
    affine, head = (of["gain"], of["shift"]), (of["weight"], of["bias"])
    return kernels.gene_head(of["pre"], affine, head, total, relu), total


def by_reference(of: dict[str, Tensor], relu: bool) -> tuple[Tensor, Tensor]:
    exact = {name: tensor.double() for name, tensor in of.items()}
    affine, head = (exact["gain"], exact["shift"]), (exact["weight"], exact["bias"])
    return reference.gene_head(exact["pre"], affine, head, exact["total"], relu), exact["total"]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("n", "d", "genes"),
    [(0, 16, 5), (1, 16, 5), (5, 16, 0), (129, 128, 50), (40, 5, 1), (33, 48, 65), (20, 130, 200), (3, 512, 33)],
)
def test_expression_and_sum_are_the_references(n: int, d: int, genes: int, relu: bool) -> None:
    of = drawn(n, d, genes)
    for found, expected in zip(by_kernel(of, relu), by_reference(of, relu), strict=True):
        assert error(found, expected) < 1e-5


def test_half_precision_costs_its_roundings_and_the_sum_none() -> None:
    of = drawn(60, 32, 9, torch.float16) | {"total": torch.zeros(60, 9)}
    (x, total), (exact, _) = by_kernel(of), by_reference(of, False)
    assert (x.dtype, total.dtype) == (torch.float16, torch.float32)
    assert error(x, exact) < 2**-10
    assert error(total, exact) < 1e-5  # of what was not rounded


def test_tiles_change_little() -> None:
    of = drawn(70, 32, 9)
    whole = by_kernel(of)
    for rows in (16, 64):
        with launch.use_launch("gene_head", launch.Launch(rows, 2)):
            assert kernels.head_shape(0, "ieee", 32, 9, False)[0].rows == rows
            for found, expected in zip(by_kernel(of), whole, strict=True):
                assert error(found, expected) < 1e-6


def test_wider_heads_than_the_kernels_are_made_in_turn() -> None:
    of = drawn(9, 520, 4)
    (exact, _), total = by_reference(of, False), of["total"].clone()
    with torch.no_grad(), ops.use_backend("triton"):
        x = ops.gene_head(of["pre"], (of["gain"], of["shift"]), (of["weight"], of["bias"]), total, False)
    assert error(x, exact) < 1e-5
    with pytest.raises(InputError, match="pre and weight: must be matrices of at most 512 columns"):
        by_kernel(of)


@pytest.mark.parametrize(("n", "d"), [(0, 8), (1, 8), (300, 16), (40, 21), (3, 130)])
def test_gelu_and_norm_with_their_gradients(n: int, d: int) -> None:
    names, grad = ("pre", "gain", "shift"), drawn(n, d, 1)["pre"].flip(1)
    of = drawn(n, d, 1)
    inputs = leaves([of[name] for name in names], torch.float64)
    exact = differentiate(
        reference.gelu_norm(inputs[0], tuple(inputs[1:])), grad, dict(zip(names, inputs, strict=True))
    )
    inputs = leaves([of[name] for name in names], torch.float32)
    found = differentiate(gated.gelu_norm(*inputs), grad, dict(zip(names, inputs, strict=True)))
    assert_results_agree(found, exact, 1e-5)


def test_gelu_and_norm_are_registered_as_torch_wants_it() -> None:
    of = drawn(5, 6, 1)
    inputs = [of[name].requires_grad_() for name in ("pre", "gain", "shift")]
    torch.library.opcheck(torch.ops.stflow_fast.gelu_norm, tuple(inputs), atol=1e-5, rtol=1e-5)
    saved = tuple(tensor.detach() for tensor in (inputs[0], *inputs))
    torch.library.opcheck(torch.ops.stflow_fast.gelu_norm_backward, saved)


@pytest.mark.parametrize(
    ("argument", "change", "complaint"),
    [
        ("pre", lambda pre: pre[0], "pre and weight: must be matrices"),
        ("pre", lambda pre: pre.double(), "pre: .*float64"),
        ("gain", lambda gain: gain[1:], r"gain: must have shape \[6\]"),
        ("shift", lambda shift: shift.to("meta"), "shift: is on meta"),
        ("weight", lambda weight: weight.half(), "weight: must be torch.float32"),
        ("weight", lambda weight: torch.cat([weight, weight], 1)[:, :6], "weight: must be contiguous"),
        ("bias", lambda bias: bias[1:], r"bias: must have shape \[4\]"),
        ("total", lambda total: total[:, 1:], r"total: must have shape \[5, 4\]"),
    ],
)
def test_bad_arguments_are_named(argument: str, change: Callable, complaint: str) -> None:
    of = drawn(5, 6, 4)
    with pytest.raises(InputError, match=f"^{complaint}"):
        by_kernel(of | {argument: change(of[argument])})

"""Every kernel, forward and backward, at sizes that break things: no fault, and as near to float64 as plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
from stflow_fast.kernels import modules
from stflow_fast.kernels.launch import Launch, use_launch
from torch import Tensor

import stflow_fast.ops as ops
from stflow_fast.ops.reference import MLPWeights

from ..kernel_cases import (
    MLP,
    MLP_INPUTS,
    ROUNDING,
    STREAM,
    Attention,
    Result,
    Set,
    attention_exactly,
    attention_inputs,
    attention_kernel,
    differentiate,
    kernel_arguments,
    leaves,
    mlp_inputs,
    multiply_in,
    ratios_to_torch,
    spot_keys,
)
from ..margins import assert_within
from ..test_kernel_neighbors import assert_equal_to_the_tree, clouds

__all__ = ["multiply_in"]  # a fixture


class Precision(NamedTuple):
    """Of kernels, what plain torch computes in beside them, and a rounding, of which a tenth is allowed besides."""

    name: str
    dtype: torch.dtype
    plain: torch.dtype
    rounding: float


PRECISIONS = (
    # ttsem adds the terms of a product one after the other: 8e-7 off in the worst of these sums, torch's blocks 1e-7.
    Precision("ieee", torch.float32, torch.float32, 1e-5),
    # Torch has no tf32 on a CPU; fp16 has as many digits.
    Precision("tf32", torch.float32, torch.float16, ROUNDING["tf32"]),
    Precision("bf16", torch.bfloat16, torch.bfloat16, ROUNDING["bf16"]),
    Precision("fp16", torch.float16, torch.float16, ROUNDING["fp16"]),
)

N = 37
ROWS = (1, N)
"""What kernels of rows are given in one test, which then launches several programs."""


@pytest.fixture(params=PRECISIONS, ids=lambda precision: precision.name)
def precision(request: pytest.FixtureRequest, multiply_in: Set) -> Precision:
    multiply_in(request.param.name)
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda")


def check(result: Callable[[torch.dtype, str], Result], what: str, precision: Precision) -> None:
    """A result by the kernels and one by plain torch, against float64."""
    found, plain = result(precision.dtype, "triton"), result(precision.plain, "reference")
    ratios = ratios_to_torch(found, plain, result(torch.float64, "reference"), precision.rounding)
    assert_within(what, precision.name, ratios)


def check_gradients(
    operation: Callable[..., Tensor], tensors: dict[str, Tensor], what: str, precision: Precision
) -> None:
    """The output of an operation, and the gradients of its tensors."""
    rounded = tuple(tensor.to(precision.dtype) for tensor in tensors.values())

    def result(dtype: torch.dtype, backend: str) -> Result:
        inputs = leaves(rounded, dtype)
        with ops.use_backend(backend):
            output = operation(*inputs)
            return differentiate(output, normal(*output.shape, seed=1), dict(zip(tensors, inputs, strict=True)))

    check(result, what, precision)


ATTENTIONS = {
    "default widths": Attention(sizes=(12,), k=8, heads=4, e=64, z=64, dh=32),
    "odd widths, dropout, a lone spot": Attention(
        sizes=(1, 20), k=5, heads=2, e=24, z=12, dh=5, p_mlp=0.2, p_attention=0.1
    ),
    "gelu, a lattice": Attention(sizes=(17,), k=8, activation="gelu", coords="lattice"),
    "fewer spots than neighbours": Attention(sizes=(20,), k=33, heads=1, activation="relu", coords="duplicates"),
    "hidden vectors in parts": Attention(sizes=(11,), k=3, heads=1, z=140, dh=8),
}


@pytest.mark.launches("edge_attention_fwd_kernel", "edge_attention_bwd_query_kernel", "edge_attention_bwd_key_kernel")
@pytest.mark.parametrize("arch", [80, 90])  # with other parts of a message and of a hidden vector, and other tiles
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, precision: Precision, arch: int, on_architecture: Callable[[int], None]) -> None:
    on_architecture(arch)
    check_attention(ATTENTIONS[name], precision)


def test_attention_of_one_spot(precision: Precision) -> None:
    check_attention(Attention(sizes=(1,), k=8), precision)


def check_attention(case: Attention, precision: Precision) -> None:
    inputs = attention_inputs(case, "cuda").round_to(precision.dtype)

    def result(dtype: torch.dtype, backend: str) -> Result:
        return attention_kernel(inputs, dtype) if backend == "triton" else attention_exactly(inputs, dtype)

    check(result, "attention", precision)


@pytest.mark.launches("edge_attention_fwd_kernel", "edge_messages_kernel")
def test_kept_messages_change_nothing(precision: Precision) -> None:
    from stflow_fast.kernels.edge_attention import edge_attention, edge_messages

    dtype = precision.dtype
    arguments = kernel_arguments(attention_inputs(Attention(sizes=(1, 20), e=24, z=12, dh=5), "cuda"), dtype)
    settings, message_to_logit = arguments["settings"], arguments["message_to_logit"]
    with torch.no_grad():
        made = edge_attention(**arguments)
        messages = edge_messages(arguments["edges"], arguments["edge"], message_to_logit, settings, dtype)
        kept = arguments | {"edges": messages, "settings": settings._replace(edges_are_messages=True)}
        assert torch.equal(edge_attention(**kept), made)


MLPS = {
    "swiglu, odd widths, dropout": MLP(n=N, z=21, p=0.2),
    "gelu": MLP(n=N, activation="gelu"),
    "relu": MLP(n=16, z=5, activation="relu"),
}


@pytest.mark.launches("gate_norm_fwd_kernel", "gate_norm_bwd_kernel")
@pytest.mark.parametrize("name", MLPS)
def test_gated_mlp(name: str, precision: Precision) -> None:
    with use_launch("gate_norm", Launch(4, 1, 1)):  # more tiles than programs of the backward
        check_mlp(MLPS[name], precision)


def test_gated_mlp_of_one_row(precision: Precision) -> None:
    check_mlp(MLP(n=1), precision)


def check_mlp(case: MLP, precision: Precision) -> None:
    inputs = mlp_inputs(case, "cuda")

    def operation(x: Tensor, *weights: Tensor) -> Tensor:
        return ops.gated_mlp(x, MLPWeights(*weights), case.activation, case.p, inputs.keys, STREAM)

    tensors = dict(zip(MLP_INPUTS, (inputs.x, *inputs.weights), strict=True))
    precision = precision._replace(rounding=2 * precision.rounding)  # as on a GPU: a product before it, and one behind
    check_gradients(operation, tensors, "gated MLP", precision)


@pytest.mark.launches("gate_norm_fwd_kernel", "gate_norm_bwd_kernel")
def test_gelu_norm(precision: Precision) -> None:
    def operation(pre: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return ops.gelu_norm(pre, (gain, bias))

    for n in ROWS:
        tensors = {"pre": normal(n, 21), "gain": normal(21), "bias": normal(21, seed=2)}
        check_gradients(operation, tensors, f"gelu norm of {n}", precision)


@pytest.mark.launches("joined_norm_fwd_kernel", "joined_norm_bwd_kernel")
def test_joined_norm(precision: Precision) -> None:
    def operation(tokens: Tensor, x: Tensor) -> Tensor:
        return ops.joined_norm(tokens, x, 99)

    for n in ROWS:
        tensors = {"tokens": normal(n, 20), "x": normal(n, 70)}
        check_gradients(operation, tensors, f"joined norm of {n}", precision)


@pytest.mark.launches("residual_kernel")
def test_residual(precision: Precision) -> None:
    check_residual(0.0, precision)


@pytest.mark.launches("residual_kernel", "dropout_kernel")
def test_residual_with_dropout(precision: Precision) -> None:
    check_residual(0.3, precision)


def check_residual(p: float, precision: Precision) -> None:
    def operation(tokens: Tensor, update: Tensor) -> Tensor:
        total, cast = ops.residual(tokens, update, p, spot_keys(len(tokens), "cuda"), STREAM)
        return total + cast

    for n in ROWS:
        tensors = {"tokens": normal(n, 130), "update": normal(n, 130, seed=2)}
        check_gradients(operation, tensors, f"residual of {n}", precision)


@pytest.mark.launches("residual_kernel")
def test_residual_with_a_cast() -> None:
    from stflow_fast.kernels.residual import residual, residual_

    tokens, update = normal(N, 130).requires_grad_(), normal(N, 130, seed=2).bfloat16().requires_grad_()
    total, cast = residual(tokens, update, None, torch.bfloat16, 0.0, STREAM)
    grads = normal(N, 130, seed=3), normal(N, 130, seed=4).bfloat16()
    grad_tokens, grad_update = torch.autograd.grad((total, cast), (tokens, update), grads)
    assert torch.equal(total, tokens + update)
    assert torch.equal(grad_tokens, grads[0] + grads[1])
    assert torch.equal(grad_update, grad_tokens.bfloat16())
    with torch.no_grad():
        again = residual_(tokens, update, torch.bfloat16)
    assert torch.equal(tokens, total)
    assert torch.equal(again, cast)
    assert torch.equal(cast, total.bfloat16())


@pytest.mark.launches("gene_head_kernel")
@pytest.mark.parametrize("relu", [False, True])
def test_gene_head(relu: bool, precision: Precision) -> None:
    for n in ROWS:
        check_gene_head(n, relu, precision)


def check_gene_head(n: int, relu: bool, precision: Precision) -> None:
    shapes = (n, 21), (21,), (21,), (70, 21), (70,), (n, 70)
    tensors = [normal(*shape, seed=seed).to(precision.dtype) for seed, shape in enumerate(shapes)]

    @torch.no_grad()
    def result(dtype: torch.dtype, backend: str) -> Result:
        wide = torch.promote_types(dtype, torch.float32)  # the LayerNorm's parameters and the sum, in use
        types = dtype, wide, wide, dtype, dtype, wide
        pre, gain, shift, weight, bias, total = (
            tensor.to(of, copy=True) for tensor, of in zip(tensors, types, strict=True)
        )
        with ops.use_backend(backend):
            return Result(ops.gene_head(pre, (gain, shift), (weight, bias), total, relu), {"total": total})

    check(result, f"gene head of {n}", precision)


@pytest.mark.launches("dropout_kernel")
def test_dropout(precision: Precision) -> None:
    def operation(x: Tensor) -> Tensor:
        return ops.apply_dropout(x, 0.3, spot_keys(len(x), "cuda"), STREAM)

    for n in ROWS:
        check_gradients(operation, {"x": normal(n, 130)}, f"dropout of {n}", precision)


@pytest.mark.launches("nearest_kernel")
@pytest.mark.parametrize("name", ["clusters of three densities and outliers", "pairs and triples"])
def test_nearest(name: str) -> None:
    assert_equal_to_the_tree(clouds[name], 9)


@pytest.mark.launches("nearest_kernel")
def test_nearest_of_packed_slides() -> None:
    assert_equal_to_the_tree(np.random.default_rng(0).uniform(0, 9, (40, 2)), 5, [0, 1, 1, 6, 12, 40])


def test_every_kernel_is_launched() -> None:
    kernels = {
        value.fn.__name__
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.fn.__name__.endswith("_kernel")
    }
    marks = [mark for test in globals().values() for mark in getattr(test, "pytestmark", ())]
    assert {kernel for mark in marks if mark.name == "launches" for kernel in mark.args} == kernels

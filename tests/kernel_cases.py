"""Inputs of the kernels, what the float64 reference makes of them, and memory that shows what nobody wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from stflow_fast.graph import SpotGraph
from stflow_fast.ops.dropout import DropoutKeys
from stflow_fast.ops.reference import AttentionSpec, Dropouts, EdgeWeights, MLPWeights, attend_block

from .graph_cases import hexagonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOGIT_ACTIVATION = {"swiglu": "swiglu", "gelu": "gelu", "relu": "gelu"}  # as in the model
GRADIENTS = ("terms", "edge", "message_to_logit", "logit")
MLP_INPUTS = ("x", *MLPWeights._fields)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {"ieee": 2e-6, "tf32": 2**-10, "bf16": 2**-8, "fp16": 2**-10}  # the gates by tanh.approx are 2^-11 off
STREAM = 6

Set = Callable[[str], torch.dtype]


def poison(patch: pytest.MonkeyPatch) -> None:
    """Tensors of floats made by new_empty, empty_like or empty hold NaN until something is written."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: object, **options: object) -> Tensor:
            memory = make(*args, **options)
            return memory.fill_(float("nan")) if memory.is_floating_point() else memory

        return made

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        patch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned_memory() -> Iterator[None]:
    """The body of a fixture around a module's tests."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        yield


def halves(activation: str) -> int:
    return 2 if activation == "swiglu" else 1


def coordinates(kind: str, n: int) -> np.ndarray:
    draw = np.random.default_rng(n)
    if kind == "lattice":
        side = int(np.ceil(n**0.5))
        return 100 * hexagonal(side, side)[:n]
    if kind == "duplicates":
        return draw.integers(0, 3, (n, 2)).astype(float)
    return draw.uniform(0, n**0.5, (n, 2))


@dataclass(frozen=True)
class Attention:
    """Sizes and settings of one attention; ``sizes`` are the spots of packed slides."""

    sizes: tuple[int, ...] = (20,)
    k: int = 5
    heads: int = 2
    e: int = 16
    z: int = 16
    dh: int = 16
    activation: str = "swiglu"
    p_mlp: float = 0.0
    p_attention: float = 0.0
    coords: str = "uniform"
    seed: int = 0

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.heads, self.activation, LOGIT_ACTIVATION[self.activation])

    @property
    def hp(self) -> int:
        return self.heads * self.z * halves(self.spec.logit_activation)


@dataclass(frozen=True)
class AttentionInputs:
    """Tensors of one attention in float64, and the gradient that its context receives."""

    case: Attention
    graph: SpotGraph
    terms: Tensor
    weights: EdgeWeights
    grad_context: Tensor
    keys: DropoutKeys = field(repr=False)

    def round_to(self, dtype: torch.dtype) -> AttentionInputs:
        """Every number representable in ``dtype``, the tensors still float64; geometry is float32 at least."""
        weights = EdgeWeights(*(weight.to(dtype).double() for weight in self.weights))
        graph = self.graph.to(self.terms.device, torch.float32).to(self.terms.device, torch.float64)
        terms, grad = (tensor.to(dtype).double() for tensor in (self.terms, self.grad_context))
        return AttentionInputs(self.case, graph, terms, weights, grad, self.keys)


def attention_inputs(case: Attention, device: str = "cpu") -> AttentionInputs:
    """Drawn from the case's seed; what multiplies sums is scaled so that every output is of the order of one."""
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).double().to(device)

    n, d, hp = sum(case.sizes), case.heads * case.dh, case.hp
    slide_ptr = np.cumsum([0, *case.sizes])
    coords = np.concatenate([coordinates(case.coords, size) for size in case.sizes])
    graph = SpotGraph.build(coords, case.k, slide_ptr, torch.float64)
    seeds = torch.arange(len(case.sizes)) + 2**40
    used = d + case.heads * (case.e + 1)
    return AttentionInputs(
        case,
        graph.to(device),
        normal(n, 2 * hp + d),
        EdgeWeights(
            normal(4, case.e * halves(case.activation)),
            normal(case.e, hp, scale=case.e**-0.5),
            normal(case.z + 1, scale=case.z**-0.5),
        ),
        normal(n, used + -used % 8),
        DropoutKeys.for_spots(seeds.to(device), graph.slide_of.to(device), graph.spot_id.to(device)),
    )


class Result(NamedTuple):
    output: Tensor
    gradients: dict[str, Tensor]


def leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def by_block(result: Result, case: Attention) -> Result:
    """Gradients of the terms by their blocks too, whose scales differ."""
    blocks = result.gradients["terms"].split((case.hp, case.hp, case.heads * case.dh), dim=1)
    return Result(result.output, result.gradients | dict(zip(("A", "B", "V"), blocks, strict=True)))


def differentiate(output: Tensor, grad: Tensor, named: dict[str, Tensor]) -> Result:
    gradients = torch.autograd.grad(output, tuple(named.values()), grad.to(output.dtype))
    return Result(output.detach(), dict(zip(named, gradients, strict=True)))


def attention_reference(inputs: AttentionInputs, dtype: torch.dtype = torch.float64) -> Result:
    """Context and gradients by the formulas of ``ops.reference``."""
    case, graph = inputs.case, inputs.graph
    terms, *weights = leaves((inputs.terms, *inputs.weights), dtype)
    dropouts = Dropouts(inputs.keys, case.p_mlp, case.p_attention)
    geometry = graph.geometry.to(torch.promote_types(dtype, torch.float32))
    query = terms[:, : case.hp]
    context = attend_block(query, terms, graph.neighbors, geometry, EdgeWeights(*weights), case.spec, dropouts)
    return differentiate(context, inputs.grad_context, dict(zip(GRADIENTS, (terms, *weights), strict=True)))


def kernel_arguments(inputs: AttentionInputs, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Arguments of ``kernels.edge_attention.edge_attention``; what can be differentiated is."""
    from stflow_fast.kernels.edge_attention import Settings

    case = inputs.case
    tensors = dict(zip(GRADIENTS, leaves((inputs.terms, *inputs.weights), dtype), strict=True))
    dropout = case.p_mlp > 0 or case.p_attention > 0
    return {
        **tensors,
        "neighbors": inputs.graph.neighbors,
        "edges": inputs.graph.geometry.float(),
        "settings": Settings(*case.spec, case.p_mlp, case.p_attention),
        "dropout_keys": inputs.keys.keys if dropout else None,
    }


def attention_kernel(inputs: AttentionInputs, dtype: torch.dtype = torch.float32) -> Result:
    """Context and gradients by the kernels."""
    from stflow_fast.kernels.edge_attention import edge_attention

    arguments = kernel_arguments(inputs, dtype)
    context = edge_attention(**arguments)
    return differentiate(context, inputs.grad_context, {name: arguments[name] for name in GRADIENTS})


@dataclass(frozen=True)
class MLP:
    """Sizes and settings of one gated MLP."""

    n: int = 20
    columns: int = 24
    z: int = 32
    out: int = 12
    activation: str = "swiglu"
    p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class MLPTensors:
    """Tensors of one gated MLP in float64, and the gradient that its output receives."""

    case: MLP
    x: Tensor
    weights: MLPWeights
    grad: Tensor
    keys: DropoutKeys = field(repr=False)


def mlp_inputs(case: MLP, device: str = "cpu") -> MLPTensors:
    draw = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).double().to(device)

    p = case.z * halves(case.activation)
    weights = MLPWeights(
        normal(p, case.columns, scale=case.columns**-0.5),
        normal(p),
        normal(case.z),
        normal(case.z),
        normal(case.out, case.z, scale=case.z**-0.5),
        normal(case.out),
    )
    keys = spot_keys(case.n, device)
    return MLPTensors(case, normal(case.n, case.columns), weights, normal(case.n, case.out), keys)


def spot_keys(n: int, device: str = "cpu") -> DropoutKeys:
    """Keys of the spots of one slide."""
    spots = torch.arange(n, device=device)
    return DropoutKeys.for_spots(torch.tensor([2**40 + 7], device=device), torch.zeros_like(spots), spots)


def error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest entry expected; what is zero must be zero, and nothing NaN."""
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    difference, largest = (found.double() - expected.double()).abs().max(), expected.double().abs().max()
    if largest == 0:
        return 0.0 if difference == 0 else float("inf")
    return float("inf") if difference.isnan() else (difference / largest).item()


def assert_results_agree(found: Result, expected: Result, tolerance: float) -> None:
    errors = {"output": error(found.output, expected.output)}
    assert found.gradients.keys() == expected.gradients.keys()
    errors |= {name: error(found.gradients[name], value) for name, value in expected.gradients.items()}
    assert max(errors.values()) <= tolerance, errors


def assert_same_bits(found: Result, expected: Result) -> None:
    assert torch.equal(found.output, expected.output)
    for name, value in expected.gradients.items():
        assert torch.equal(found.gradients[name], value), name


@pytest.fixture
def multiply_in() -> Iterator[Set]:
    """Sets how float32 multiplies, and gives the type of the tensors."""
    before = torch.get_float32_matmul_precision()

    def choose(precision: str) -> torch.dtype:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        return DTYPES.get(precision, torch.float32)

    yield choose
    torch.set_float32_matmul_precision(before)


def ratios_to_torch(found: Result, plain: Result, exact: Result, rounding: float) -> dict[str, float]:
    """Errors over their limits: twice the error of plain torch in the same precision, and a tenth of a rounding, for
    where torch happens to be exact."""
    parts = {"output": (found.output, plain.output, exact.output)} | {
        f"gradient of {name}": (found.gradients[name], plain.gradients[name], exact.gradients[name])
        for name in exact.gradients
    }
    return {
        name: error(ours, truth) / (2 * error(theirs, truth) + rounding / 10)
        for name, (ours, theirs, truth) in parts.items()
    }


def attention_exactly(inputs: AttentionInputs, dtype: torch.dtype) -> Result:
    if not len(inputs.terms):
        gradients = {name: torch.zeros_like(tensor) for name, tensor in named_tensors(inputs).items()}
        return Result(torch.zeros_like(inputs.grad_context), gradients)
    return attention_reference(inputs, dtype)


def named_tensors(inputs: AttentionInputs) -> dict[str, Tensor]:
    return {"terms": inputs.terms, **inputs.weights._asdict()}

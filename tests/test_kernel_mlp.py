"""The gated MLP and dropout kernels against the float64 reference, and what they promise as torch ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import stflow_fast.ops as ops
from stflow_fast.errors import InputError
from stflow_fast.ops import reference
from stflow_fast.ops.dropout import dropout as plain_dropout
from stflow_fast.ops.reference import MLPWeights

from .kernel_cases import (
    DEVICE,
    MLP,
    MLP_INPUTS,
    MLPTensors,
    Result,
    assert_results_agree,
    assert_same_bits,
    differentiate,
    error,
    leaves,
    mlp_inputs,
    poisoned_memory,
    spot_keys,
)

pytest.importorskip("triton")
gated = pytest.importorskip("stflow_fast.kernels.gated_mlp")
dropping = pytest.importorskip("stflow_fast.kernels.dropout")
launch = pytest.importorskip("stflow_fast.kernels.launch")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

TOLERANCE = 1e-5
STREAM = 6

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


def mlp_reference(inputs: MLPTensors, stream: int = STREAM) -> Result:
    tensors = leaves((inputs.x, *inputs.weights), torch.float64)
    x, *weights = tensors
    case = inputs.case
    output = reference.gated_mlp(x, MLPWeights(*weights), case.activation, case.p, inputs.keys, stream)
    return differentiate(output, inputs.grad, dict(zip(MLP_INPUTS, tensors, strict=True)))


def mlp_kernel(inputs: MLPTensors, dtype: torch.dtype = torch.float32, stream: int = STREAM) -> Result:
    tensors = leaves((inputs.x, *inputs.weights), dtype)
    x, *weights = tensors
    case = inputs.case
    with ops.use_backend("triton"):
        output = ops.gated_mlp(x, MLPWeights(*weights), case.activation, case.p, inputs.keys, stream)
    return differentiate(output, inputs.grad, dict(zip(MLP_INPUTS, tensors, strict=True)))


CASES = {
    **{f"{n} rows": MLP(n=n) for n in (0, 1, 2, 127, 128, 129)},
    "more tiles than programs": MLP(n=1200, columns=5, z=16, out=3),
    **{f"{activation}, {z} wide": MLP(z=z, activation=activation) for activation in ("gelu", "relu") for z in (5, 64)},
    "odd widths": MLP(columns=7, z=21, out=1),
    "one column": MLP(columns=1, z=5, out=1),
    "widths beyond a power of two": MLP(columns=40, z=130, out=9, activation="gelu"),
    "dropout": MLP(n=130, p=0.3),
    "dropout, gelu, odd widths": MLP(p=0.5, z=21, activation="gelu"),
    "dropout, relu": MLP(p=0.2, activation="relu"),
    "dropout, 0 rows": MLP(n=0, p=0.2),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_equal_the_reference(name: str) -> None:
    inputs = mlp_inputs(CASES[name])
    assert_results_agree(mlp_kernel(inputs), mlp_reference(inputs), TOLERANCE)


@pytest.mark.parametrize("name", ["dropout", "more tiles than programs"])
def test_every_run_gives_the_same_bits(name: str) -> None:
    inputs = mlp_inputs(CASES[name])
    assert_same_bits(mlp_kernel(inputs), mlp_kernel(inputs))


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("programs", [1, 3])
def test_tiles_and_programs_change_nothing(rows: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mlp_inputs(MLP(n=150, z=21, p=0.3))
    whole = mlp_kernel(inputs)
    monkeypatch.setattr(gated, "launch_of", lambda *_: launch.Launch(rows, 4, programs))
    monkeypatch.setattr(dropping, "launch_of", lambda *_: launch.Launch(rows, 4, programs))
    assert_results_agree(mlp_kernel(inputs), whole, 2e-6)


def test_rows_are_as_if_alone() -> None:
    inputs = mlp_inputs(MLP(n=40, p=0.3))
    whole = mlp_kernel(inputs)
    part = slice(13, 29)
    alone = mlp_kernel(replace(inputs, x=inputs.x[part], grad=inputs.grad[part], keys=inputs.keys.rows(13, 29)))
    assert error(alone.output, whole.output[part]) < TOLERANCE
    assert error(alone.gradients["x"], whole.gradients["x"][part]) < TOLERANCE


def test_float16_costs_its_roundings() -> None:
    inputs = mlp_inputs(MLP(n=30, p=0.2))
    half = torch.float16
    rounded = replace(
        inputs,
        x=inputs.x.to(half).double(),
        weights=MLPWeights(*(weight.to(half).double() for weight in inputs.weights)),
        grad=inputs.grad.to(half).double(),
    )
    found = mlp_kernel(rounded, half)
    assert found.output.dtype == half
    assert {gradient.dtype for gradient in found.gradients.values()} == {half}
    assert_results_agree(found, mlp_reference(rounded), 8 * torch.finfo(half).eps)


def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters() -> None:
    inputs = mlp_inputs(MLP())
    tensors = leaves((inputs.x, *inputs.weights), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = gated.gated_mlp(tensors[0], tuple(tensors[1:]), "swiglu", 0.0, None, 0)
        dropped = dropping.dropout(output, inputs.keys.keys, 0.5, 1)
    assert output.dtype == dropped.dtype == torch.bfloat16
    found = differentiate(output, inputs.grad, dict(zip(MLP_INPUTS, tensors, strict=True)))
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}
    assert_results_agree(found, mlp_reference(inputs), 0.05)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 0), (40, 200), (300, 5)])
def test_dropout_draws_the_masks_of_the_reference(shape: tuple[int, int], p: float) -> None:
    x, keys = torch.randn(shape, generator=torch.Generator().manual_seed(0)), spot_keys(shape[0])
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    results = []
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with ops.use_backend(backend):
            dropped = ops.apply_dropout(leaf, p, keys, 3)
        results.append(differentiate(dropped, grad, {"x": leaf}))
    found, expected = results
    assert torch.equal(found.output == 0, expected.output == 0)
    assert_results_agree(found, expected, 1e-7)
    for stream in (-3, 0, 1, 2**31 - 1):
        other = dropping.dropout(x, keys.keys, p, stream)
        assert error(other, plain_dropout(x, p, keys, stream)) < 1e-7


def test_dropout_without_keys_or_share_is_the_tensor_itself() -> None:
    x = torch.randn(3, 4)
    with ops.use_backend("triton"):
        assert ops.apply_dropout(x, 0.5, None, 0) is x
        assert ops.apply_dropout(x, 0.0, spot_keys(3), 0) is x
    assert torch.equal(dropping.dropout(x, spot_keys(3).keys, 0.0, 0), x)


def test_dropout_takes_rows_with_gaps() -> None:
    wide, keys = torch.randn(20, 12), spot_keys(20)
    found = dropping.dropout(wide[:, ::2], keys.keys, 0.5, 2)
    assert torch.equal(found, dropping.dropout(wide[:, ::2].clone(), keys.keys, 0.5, 2))


def mlp_arguments(inputs: MLPTensors) -> tuple[object, ...]:
    x, *weights = leaves((inputs.x, *inputs.weights), torch.float32)
    return (x, *weights, inputs.keys.keys if inputs.case.p else None, inputs.case.activation, inputs.case.p, STREAM)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_operators_are_registered_as_torch_wants_it(p: float) -> None:
    inputs = mlp_inputs(MLP(n=5, columns=6, z=7, out=4, p=p))
    arguments = mlp_arguments(inputs)
    torch.library.opcheck(torch.ops.stflow_fast.gated_mlp, arguments, atol=1e-5, rtol=1e-5)
    torch.library.opcheck(torch.ops.stflow_fast.dropout, (arguments[0], inputs.keys.keys, p, STREAM))
    saved = [value.detach() if isinstance(value, Tensor) else value for value in arguments]
    del saved[6]  # the bias of fc2
    torch.library.opcheck(torch.ops.stflow_fast.gated_mlp_backward, (inputs.grad.float(), *saved))


def test_one_compilation_serves_every_number_of_rows() -> None:
    from torch._dynamo.backends.debugging import aot_eager

    compiled_graphs = []

    def count(module: torch.fx.GraphModule, examples: list[Tensor]) -> Callable:
        compiled_graphs.append(module)
        return aot_eager(module, examples)

    def function(x: Tensor, keys: Tensor, *weights: Tensor) -> Tensor:
        hidden = gated.gated_mlp(2 * x, weights, "swiglu", 0.3, keys, STREAM)
        return dropping.dropout(hidden, keys, 0.3, STREAM + 1).square()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    counts = []
    for n in (5, 9, 20):
        inputs = mlp_inputs(MLP(n=n, columns=6, z=7, out=4))
        results = []
        for run in (function, compiled):
            tensors = leaves((inputs.x, *inputs.weights), torch.float32)
            output = run(tensors[0], inputs.keys.keys, *tensors[1:])
            results.append(differentiate(output, inputs.grad, dict(zip(MLP_INPUTS, tensors, strict=True))))
        assert_same_bits(*results)
        counts.append(len(compiled_graphs))
    assert counts[0] == counts[-1] > 0


def refused(**changes: Callable) -> None:
    inputs = mlp_inputs(MLP(n=5, columns=6, z=8, out=4, p=0.2))
    names = ("x", *MLPWeights._fields, "keys", "activation", "p", "stream")
    arguments = dict(zip(names, mlp_arguments(inputs), strict=True))
    with torch.no_grad():
        arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    weights = tuple(arguments[name] for name in MLPWeights._fields)
    torch.ops.stflow_fast.gated_mlp(arguments["x"], *weights, *(arguments[name] for name in names[7:]))


def test_the_inputs_of_the_refusals_are_otherwise_taken() -> None:
    refused()


@pytest.mark.parametrize(
    ("argument", "change", "complaint"),
    [
        ("x", lambda x: x[:, :-1], r"x: must have shape \[5, 6\]"),
        ("x", lambda x: x[0], "x, fc1 and fc2: must be matrices"),
        ("x", lambda x: x.double(), "x: .*float64"),
        ("x", lambda x: torch.cat([x, x], dim=1)[:, :6], "x: must be contiguous"),
        ("fc1_weight", lambda weight: weight.double(), "fc1: must be torch.float32"),
        ("fc1_bias", lambda bias: bias[1:], r"fc1_bias: must have shape \[16\]"),
        ("fc1_bias", lambda bias: bias.half(), "fc1_bias: must be torch.float32"),
        ("norm_weight", lambda gain: gain[1:], r"gain: must have shape \[8\]"),
        ("norm_weight", lambda gain: gain.to("meta"), "gain: is on meta"),
        ("norm_bias", lambda bias: bias.repeat(2), r"bias: must have shape \[8\]"),
        ("norm_bias", lambda bias: bias.repeat(2)[::2], "bias: must be contiguous"),
        ("fc2_weight", lambda weight: weight[:, 1:].contiguous(), r"fc2: must have shape \[4, 8\]"),
        ("fc2_weight", lambda weight: weight.half(), "fc2: must be torch.float32"),
        ("fc2_bias", lambda bias: bias[1:], r"fc2_bias: must have shape \[4\]"),
        ("keys", lambda keys: keys[1:], r"keys: must have shape \[5\]"),
        ("keys", lambda keys: keys.long(), "keys: must be torch.int32"),
        ("keys", lambda keys: None, "keys: are needed"),
        ("activation", lambda activation: "tanh", "activation: must be swiglu, gelu or relu, not 'tanh'"),
    ],
)
def test_bad_arguments_are_named(argument: str, change: Callable, complaint: str) -> None:
    with pytest.raises(InputError, match=f"^{complaint}"):
        refused(**{argument: change})


@pytest.mark.parametrize(
    ("x", "keys", "p", "complaint"),
    [
        (torch.zeros(4), spot_keys(4).keys, 0.5, "x: must have shape"),
        (torch.zeros(4, 2).double(), spot_keys(4).keys, 0.5, "x: .*float64"),
        (torch.zeros(4, 2), spot_keys(3).keys, 0.5, r"keys: must have shape \[4\]"),
        (torch.zeros(4, 2), spot_keys(4).keys.long(), 0.5, "keys: must be torch.int32"),
        (torch.zeros(4, 2), spot_keys(8).keys[::2], 0.5, "keys: must be contiguous"),
        (torch.zeros(4, 2), spot_keys(4).keys.to("meta"), 0.5, "keys: is on meta"),
        (torch.zeros(4, 2), spot_keys(4).keys, 1.0, "p: must be a probability"),
        (torch.zeros(4, 2), spot_keys(4).keys, -0.1, "p: must be a probability"),
    ],
)
def test_bad_arguments_of_dropout_are_named(x: Tensor, keys: Tensor, p: float, complaint: str) -> None:
    with pytest.raises(InputError, match=f"^{complaint}"):
        dropping.dropout(x, keys, p, 0)


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(InputError, match="^x: is on cpu; Triton kernels need a CUDA device"):
        refused()
    with pytest.raises(InputError, match="^x: is on cpu; Triton kernels need a CUDA device"):
        dropping.dropout(torch.zeros(4, 2), spot_keys(4).keys, 0.5, 0)

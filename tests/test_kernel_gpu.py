"""The compiled kernels on a GPU: every precision, sizes of use, 64-bit offsets, CUDA graphs, golden files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import stflow_fast.ops as ops
from stflow_fast import Denoiser, DenoiserConfig, Sampler
from stflow_fast.graph import MISSING
from stflow_fast.ops import reference
from stflow_fast.ops.reference import MLPWeights

from .golden import CASES, relative_error
from .kernel_cases import (
    DTYPES,
    MLP,
    MLP_INPUTS,
    ROUNDING,
    STREAM,
    Attention,
    MLPTensors,
    Result,
    Set,
    assert_same_bits,
    attention_exactly,
    attention_inputs,
    attention_kernel,
    differentiate,
    error,
    kernel_arguments,
    leaves,
    mlp_inputs,
    multiply_in,
    poisoned_memory,
    ratios_to_torch,
    spot_keys,
)
from .margins import assert_within
from .test_golden import TOLERANCE, Load, load

__all__ = ["load", "multiply_in"]  # fixtures

pytestmark = pytest.mark.gpu

PRECISIONS = ("ieee", "tf32", "bf16", "fp16")
MEMORY_WANTED = 30 * 2**30

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)

DEFAULT = Attention(sizes=(1000,), k=8, heads=4, e=64, z=64, dh=32)  # the default model: P = 128, d = 128
ATTENTIONS = {
    "default": DEFAULT,
    "default, gelu": replace(DEFAULT, activation="gelu", e=128, z=128),
    "default, relu": replace(DEFAULT, activation="relu", e=128, z=128),
    "default, dropout": replace(DEFAULT, p_mlp=0.2, p_attention=0.2),
    "5 neighbours": replace(DEFAULT, k=5),
    "64 neighbours": replace(DEFAULT, k=64, heads=2),
    "odd widths": Attention(sizes=(1000,), k=8, heads=3, e=24, z=12, dh=5, p_mlp=0.2),
    "packed behind a lone spot": replace(DEFAULT, sizes=(1, 7, 300, 0, 9, 1)),
    "lattice": replace(DEFAULT, sizes=(900,), coords="lattice"),
    "one spot": replace(DEFAULT, sizes=(1,)),
    "K + 1 spots": replace(DEFAULT, sizes=(9,)),
    "no spots": replace(DEFAULT, sizes=(0,)),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_as_exact_as_plain_torch(name: str, precision: str, multiply_in: Set) -> None:
    dtype = multiply_in(precision)
    inputs = attention_inputs(ATTENTIONS[name], "cuda").round_to(dtype)
    found, plain = attention_kernel(inputs, dtype), attention_exactly(inputs, dtype)
    assert found.output.dtype == dtype
    exact = attention_exactly(inputs, torch.float64)
    ratios = ratios_to_torch(found, plain, exact, ROUNDING[precision])
    assert_within("attention", f'"{name}", {precision}', ratios)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention_gives_the_same_bits_in_every_run(precision: str, multiply_in: Set) -> None:
    dtype = multiply_in(precision)
    inputs = attention_inputs(replace(DEFAULT, sizes=(20_000, 1, 500), p_mlp=0.2, p_attention=0.2), "cuda")
    first = attention_kernel(inputs, dtype)
    for _ in range(9):
        assert_same_bits(attention_kernel(inputs, dtype), first)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_kept_messages_change_little(precision: str, multiply_in: Set) -> None:
    from stflow_fast.kernels.edge_attention import edge_attention, edge_messages

    dtype = multiply_in(precision)
    arguments = kernel_arguments(attention_inputs(DEFAULT, "cuda"), dtype)
    settings, message_to_logit = arguments["settings"], arguments["message_to_logit"]
    with torch.no_grad():
        made = edge_attention(**arguments)
        messages = edge_messages(arguments["edges"], arguments["edge"], message_to_logit, settings, dtype)
        kept = arguments | {"edges": messages, "settings": settings._replace(edges_are_messages=True)}
        ratio = error(edge_attention(**kept), made) / (4 * ROUNDING[precision])
    assert_within("kept messages", precision, {"output": ratio})


@pytest.mark.parametrize("kept", [False, True])
def test_offsets_pass_32_bits(kept: bool, multiply_in: Set) -> None:
    """The rows at the end of tensors of more than 2^31 numbers are those of a small problem with the same rows."""
    from stflow_fast.kernels.edge_attention import edge_attention, edge_messages

    if torch.cuda.get_device_properties(0).total_memory < MEMORY_WANTED:
        pytest.skip("needs 30 GiB of GPU memory")
    dtype = multiply_in("bf16")
    small = kernel_arguments(attention_inputs(DEFAULT, "cuda"), dtype)
    rows, width = small["terms"].shape
    # Kept messages have K * E = 512 numbers a spot, terms 2 * H * P + d = 1152.
    n = spots_beyond_32_bits(512 if kept else width, rows)
    large = dict(small)
    with torch.no_grad():
        large["terms"] = at_the_end(small["terms"], n, 0)
        large["neighbors"] = at_the_end(small["neighbors"] + n - rows, n, MISSING)
        large["edges"] = at_the_end(small["edges"], n, 0)
        if kept:
            for arguments in (small, large):
                settings = arguments["settings"]._replace(edges_are_messages=True)
                weights = (arguments["edge"], arguments["message_to_logit"], arguments["settings"])
                arguments["edges"] = edge_messages(arguments["edges"], *weights, dtype)
                arguments["settings"] = settings
        found, expected = edge_attention(**large), edge_attention(**small)
        assert torch.equal(found[-rows:], expected)
        assert not found[:-rows].any()


def test_offsets_of_gradients_pass_32_bits(multiply_in: Set) -> None:
    from stflow_fast.kernels.edge_attention import edge_attention

    if torch.cuda.get_device_properties(0).total_memory < MEMORY_WANTED:
        pytest.skip("needs 30 GiB of GPU memory")
    dtype = multiply_in("bf16")
    inputs = attention_inputs(DEFAULT, "cuda")
    small = kernel_arguments(inputs, dtype)
    rows, width = small["terms"].shape
    n = spots_beyond_32_bits(width, rows)
    large = dict(small)
    with torch.no_grad():
        large["terms"] = at_the_end(small["terms"], n, 0).requires_grad_()
        large["neighbors"] = at_the_end(small["neighbors"] + n - rows, n, MISSING)
        large["edges"] = at_the_end(small["edges"], n, 0)
    expected = attention_kernel(inputs, dtype).gradients["terms"]
    context = edge_attention(**large)
    grad = at_the_end(inputs.grad_context.to(dtype), n, 0)
    (found,) = torch.autograd.grad(context, large["terms"], grad)
    assert torch.equal(found[-rows:], expected)
    assert not found[:-rows].any()


def spots_beyond_32_bits(width: int, rows: int) -> int:
    """So many that the last ``rows`` lie beyond 2^31 numbers, and begin a tile, which keeps the order of sums."""
    return rows + 128 * (2**31 // width // 128 + 1)


def at_the_end(tensor: Tensor, n: int, fill: float) -> Tensor:
    """Rows [n, ...] that are ``fill`` but for the last ones."""
    large = torch.full((n, *tensor.shape[1:]), fill, dtype=tensor.dtype, device=tensor.device)
    large[-len(tensor) :] = tensor.detach()
    return large


def test_a_cuda_graph_replays_the_operations(multiply_in: Set) -> None:
    from stflow_fast.kernels.dropout import dropout
    from stflow_fast.kernels.edge_attention import edge_attention
    from stflow_fast.kernels.gated_mlp import gated_mlp

    dtype = multiply_in("bf16")
    inputs = attention_inputs(replace(DEFAULT, p_mlp=0.2), "cuda")
    arguments = kernel_arguments(inputs, dtype)
    columns = inputs.grad_context.shape[1]
    weights = mlp_inputs(MLP(columns=columns, z=64, out=128), "cuda").weights
    weights = tuple(weight.to(dtype) for weight in weights)
    keys = inputs.keys.keys

    @torch.no_grad()
    def run(terms: Tensor) -> Tensor:
        context = edge_attention(**arguments | {"terms": terms})
        return dropout(gated_mlp(context, weights, "swiglu", 0.2, keys, STREAM), keys, 0.2, STREAM + 1)

    static = arguments["terms"].detach().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled before the capture
        run(static)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        output = run(static)
    for scale in (1.0, -0.5):
        static.copy_(scale * arguments["terms"].detach())
        captured.replay()
        assert torch.equal(output, run(static))


def test_a_replayed_sample_is_the_launched_one(multiply_in: Set) -> None:
    """In every precision on one slide: a draw that runs, one that captures and two replays, each from its own x_0."""
    torch.manual_seed(0)
    network = Denoiser(DenoiserConfig(n_genes=50, feature_dim=32)).cuda()
    slide, sources = (torch.randn(1000, 32), torch.rand(1000, 2)), torch.rand(4, 1000, 50)
    captured, launched = (Sampler(network, cuda_graph=cuda_graph).prepare(slide) for cuda_graph in (True, False))
    for precision in PRECISIONS:
        multiply_in(precision)
        with torch.autocast("cuda", DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES):
            for x_0 in sources:
                off = error(captured.draw(x_0).expression, launched.draw(x_0).expression)
                assert_within("replayed sample", precision, {"expression": off / ROUNDING[precision]})


@pytest.mark.parametrize("seed", [None, 3])
def test_a_training_step_never_waits_for_the_gpu(seed: int | None) -> None:
    torch.manual_seed(0)
    network = Denoiser(DenoiserConfig(n_genes=50, feature_dim=32, dropout=0.2, attn_dropout=0.2)).cuda().train()
    graph = network.build_graph(torch.rand(1000, 2))
    x, features, t = (torch.rand(*shape, device="cuda") for shape in ((1000, 50), (1000, 32), (1,)))
    slide_seed = None if seed is None else torch.tensor([seed], device="cuda")

    def step() -> None:
        network.denoise(graph, x, network.image_transform(features), t, slide_seed=slide_seed).sum().backward()

    with ops.use_backend("triton"):
        step()  # compiles the kernels, and makes what stays on the GPU
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def mlp_result(inputs: MLPTensors, dtype: torch.dtype, backend: str) -> Result:
    x, *weights = leaves((inputs.x, *inputs.weights), dtype)
    case, weights = inputs.case, MLPWeights(*weights)
    arguments = (x, weights, case.activation, case.p, inputs.keys, STREAM)
    with ops.use_backend(backend):
        output = reference.gated_mlp(*arguments) if backend == "reference" else ops.gated_mlp(*arguments)
    return differentiate(output, inputs.grad, dict(zip(MLP_INPUTS, (x, *weights), strict=True)))


MLPS = {
    "default": MLP(n=1000, columns=128, z=256, out=128),
    "gelu": MLP(n=1000, columns=128, z=512, out=128, activation="gelu"),
    "relu, odd widths": MLP(n=333, columns=40, z=21, out=9, activation="relu"),
    "dropout": MLP(n=1000, columns=128, z=256, out=128, p=0.2),
    "one row": MLP(n=1, columns=128, z=64, out=128),
    "no rows": MLP(n=0, columns=128, z=64, out=128),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MLPS)
def test_gated_mlp_is_as_exact_as_plain_torch(name: str, precision: str, multiply_in: Set) -> None:
    dtype = multiply_in(precision)
    inputs = mlp_inputs(MLPS[name], "cuda")
    rounded = replace(
        inputs,
        x=inputs.x.to(dtype).double(),
        weights=MLPWeights(*(weight.to(dtype).double() for weight in inputs.weights)),
        grad=inputs.grad.to(dtype).double(),
    )
    found, plain = (mlp_result(rounded, dtype, backend) for backend in ("triton", "reference"))
    exact = mlp_result(rounded, torch.float64, "reference")
    ratios = ratios_to_torch(found, plain, exact, 2 * ROUNDING[precision])
    assert_within("gated MLP", f'"{name}", {precision}', ratios)


def test_gated_mlp_gives_the_same_bits_in_every_run(multiply_in: Set) -> None:
    dtype = multiply_in("bf16")
    inputs = mlp_inputs(MLP(n=20_000, columns=128, z=256, out=128, p=0.2), "cuda")
    first = mlp_result(inputs, dtype, "triton")
    for _ in range(9):
        assert_same_bits(mlp_result(inputs, dtype, "triton"), first)


def spot_result(operation: str, n: int, d: int, dtype: torch.dtype, backend: str, exactly: bool) -> Result:
    """What treats every spot alone beside the gated MLP: outputs side by side, and gradients where there are any. The
    LayerNorm's parameters, the tokens and the sum of a gene head are float32 whatever the products' type."""
    draw, wide = torch.Generator("cuda").manual_seed(n + d), torch.float64 if exactly else torch.float32
    narrow = torch.float64 if exactly else dtype

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(dtype).to(narrow).requires_grad_()

    def drawn_wide(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda").to(wide).requires_grad_()

    spots, genes, keys = (n, d), 50, spot_keys(n, "cuda")
    cast = torch.autocast("cuda", dtype, enabled=not exactly and dtype != torch.float32)
    with ops.use_backend(backend), cast:
        if operation == "residual":
            inputs = {"tokens": drawn_wide(*spots), "update": drawn(*spots)}
            total, read = ops.residual(*inputs.values(), 0.2, keys, STREAM)
            outputs = (total, read.to(narrow))  # as autocast casts it for the products in plain torch
        elif operation == "joined norm":
            inputs = {"tokens": drawn_wide(*spots), "x": drawn(n, genes)}
            outputs = (ops.joined_norm(*inputs.values(), d + genes + 6).to(narrow),)
        else:
            inputs = {"pre": drawn(*spots), "gain": drawn_wide(d), "shift": drawn_wide(d)}
            affine, head = tuple(inputs.values())[1:], (drawn(genes, d), drawn(genes))
            if operation == "gelu norm":
                outputs = (ops.gelu_norm(inputs["pre"], affine).to(narrow),)
            else:
                total = drawn_wide(n, genes).detach()
                with torch.no_grad():
                    outputs = (ops.gene_head(inputs["pre"], affine, head, total, relu=True), total)
    output = torch.cat([output.to(wide) for output in outputs], dim=1)
    if operation == "gene head":
        return Result(output, {})
    grad = torch.randn(*output.shape, generator=draw, device="cuda")
    return differentiate(output, grad, inputs)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("n", "d"), [(1000, 128), (333, 40), (1, 512), (0, 128)])
@pytest.mark.parametrize("operation", ["residual", "joined norm", "gelu norm", "gene head"])
def test_what_treats_spots_alone_is_as_exact_as_plain_torch(
    operation: str, n: int, d: int, precision: str, multiply_in: Set
) -> None:
    dtype = multiply_in(precision)
    found, plain = (spot_result(operation, n, d, dtype, backend, False) for backend in ("triton", "reference"))
    exact = spot_result(operation, n, d, dtype, "reference", True)
    ratios = ratios_to_torch(found, plain, exact, 2 * ROUNDING[precision])
    assert_within(operation, f"[{n}, {d}], {precision}", ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1000, 128), (333, 50)])
def test_dropout_draws_the_masks_of_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, keys = torch.randn(shape, device="cuda").to(dtype), spot_keys(shape[0], "cuda")
    found, expected = [], []
    for backend, results in (("triton", found), ("reference", expected)):
        leaf = x.clone().requires_grad_()
        with ops.use_backend(backend):
            dropped = ops.apply_dropout(leaf, 0.3, keys, 3)
        results += [dropped.detach(), *torch.autograd.grad(dropped.sum(), leaf)]
    for what, ours, theirs in zip(("output", "gradient of x"), found, expected, strict=True):
        assert torch.equal(ours == 0, theirs == 0)
        assert_within("dropout", f"{list(shape)}, {dtype}", {what: error(ours, theirs) / torch.finfo(dtype).eps})


@pytest.mark.parametrize("name", CASES)
def test_the_model_predicts_what_the_published_code_does(load: Load, name: str, multiply_in: Set) -> None:
    multiply_in("ieee")
    golden, model = load(name, torch.float32)
    model = model.cuda()
    x, features, coords = (golden[f"input/{key}"].cuda() for key in ("gene_exp", "features", "coords"))
    with ops.use_backend("triton"), torch.no_grad():
        steps = [model.inference(x, features, coords, t.expand(len(x))) for t in golden["input/t"].cuda()]
    off = relative_error(torch.stack(steps).cpu(), golden["output/prediction"])
    assert_within("golden file", name, {"prediction": off / TOLERANCE[torch.float32]})


@pytest.mark.parametrize("name", ["small_gelu", "small_swiglu", "non_negative", "batched_padding"])
def test_the_model_learns_what_the_published_code_does(load: Load, name: str, multiply_in: Set) -> None:
    multiply_in("ieee")
    golden, model = load(name, torch.float32)
    model = model.cuda()
    x, features, coords, labels, t = (
        golden[f"input/{key}"].cuda() for key in ("gene_exp", "features", "coords", "labels", "t_train")
    )
    with ops.use_backend("triton"):
        _, loss = model(exp=x, img_features=features, coords=coords, labels=labels, t_steps=t)
        loss.backward()
    off = {"loss": relative_error(loss.detach().cpu(), golden["output/loss"])}
    expected = golden.part("grad/")
    for parameter, value in model.named_parameters():
        if expected[parameter].abs().max() < 1e-12:  # a bias in front of a softmax: its gradient is rounding
            off[f"gradient of {parameter}"] = value.grad.abs().max().item()
        else:
            off[f"gradient of {parameter}"] = relative_error(value.grad.cpu(), expected[parameter])
    assert_within("golden file", name, {what: each / TOLERANCE[torch.float32] for what, each in off.items()})


def test_a_gpu_runs_the_kernels_by_itself() -> None:
    found = ops.backend_for(ops.Workload(torch.device("cuda", 0)))
    assert found.name == ("triton" if torch.cuda.get_device_capability(0) >= (8, 0) else "reference")

"""The edge kernels against the float64 reference, forward and every gradient, and what they promise as torch ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stflow_fast.errors import InputError
from stflow_fast.graph import MISSING, SpotGraph, transpose_neighbors

from .kernel_cases import (
    DEVICE,
    GRADIENTS,
    Attention,
    AttentionInputs,
    Result,
    assert_results_agree,
    assert_same_bits,
    attention_inputs,
    attention_kernel,
    attention_reference,
    by_block,
    differentiate,
    error,
    kernel_arguments,
    poisoned_memory,
)

pytest.importorskip("triton")
kernels = pytest.importorskip("stflow_fast.kernels.edge_attention")
shapes = pytest.importorskip("stflow_fast.kernels.edge_shape")
launch = pytest.importorskip("stflow_fast.kernels.launch")
tiles = pytest.importorskip("stflow_fast.kernels.tiles")
tl = pytest.importorskip("triton.language")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0

TOLERANCE = 1e-5

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)

CASES = {
    **{f"{n} spots": Attention(sizes=(n,), k=8) for n in (1, 2, 8, 9, 16, 37)},
    **{f"{k} neighbours": Attention(sizes=(n,), k=k, dh=12) for k, n in ((1, 2), (5, 6), (12, 13))},
    "one neighbour of many": Attention(sizes=(33,), k=1),
    "64 neighbours": Attention(sizes=(65,), k=64, heads=1, e=12, z=12),
    **{f"{heads} heads": Attention(heads=heads, e=24, z=12, dh=8) for heads in (1, 3, 4)},
    "64 wide": Attention(e=64, z=64, dh=32),
    "as hidden_dim 144": Attention(sizes=(11,), heads=1, e=72, z=72, dh=144, p_mlp=0.2),
    "as hidden_dim 512": Attention(sizes=(5,), k=3, heads=1, e=256, z=256, dh=32),
    "messages as of hidden_dim 2048": Attention(sizes=(3,), k=2, heads=1, e=1024, z=80, dh=256, p_attention=0.2),
    "odd widths": Attention(e=24, z=12, dh=5),
    "odd widths, other way round": Attention(e=12, z=24, dh=24),
    "5 wide": Attention(e=5, z=5, dh=12, heads=3),
    "gelu": Attention(activation="gelu", e=12, z=24),
    "relu": Attention(activation="relu"),
    "several programs": Attention(sizes=(60,), k=12),
    "more tiles than programs": Attention(sizes=(8, 40), k=24, heads=1, z=12, e=12, dh=5),
    "lattice with ties": Attention(sizes=(36,), k=6, coords="lattice"),
    "duplicated coordinates": Attention(sizes=(30,), coords="duplicates", activation="gelu"),
    "packed": Attention(sizes=(9, 1, 3, 6, 20)),
    "packed behind a lone spot": Attention(sizes=(1, 30, 4), k=8, e=12, z=5),
    "packed before a lone spot": Attention(sizes=(12, 7, 1), k=6, activation="gelu"),
    "packed with slides of nobody": Attention(sizes=(0, 6, 0, 2)),
    "fewer spots than neighbours": Attention(sizes=(9,), k=12),
    "dropout in the MLPs": Attention(p_mlp=0.3, z=24),
    "dropout of the attention": Attention(p_attention=0.4, heads=3),
    "dropout": Attention(sizes=(1, 20), p_mlp=0.2, p_attention=0.4, e=24, z=12, dh=5, heads=3, k=8),
    "dropout, gelu": Attention(p_mlp=0.2, p_attention=0.2, activation="gelu"),
    "dropout, relu": Attention(p_mlp=0.2, p_attention=0.2, activation="relu", e=24),
    "dropout over 64 neighbours": Attention(sizes=(12,), k=64, heads=1, p_mlp=0.5, p_attention=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_context_and_every_gradient_equal_the_reference(name: str) -> None:
    assert_equals_reference(attention_inputs(CASES[name]))


def assert_equals_reference(inputs: AttentionInputs, tolerance: float = TOLERANCE) -> None:
    found, expected = (by_block(made(inputs), inputs.case) for made in (attention_kernel, attention_reference))
    assert_results_agree(found, expected, tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_spots_give_no_context_and_zero_gradients(p: float) -> None:
    found = attention_kernel(attention_inputs(Attention(sizes=(0,), p_mlp=p, p_attention=p)))
    assert found.output.shape == (0, 72)
    assert not any(gradient.any() for gradient in found.gradients.values())
    assert keep_messages(kernel_arguments(attention_inputs(Attention(sizes=(0,)))))["edges"].shape == (0, 5, 16)


def test_the_cases_hold_what_breaks_things() -> None:
    def graph(name: str) -> SpotGraph:
        return attention_inputs(CASES[name]).graph

    assert (graph("packed behind a lone spot").neighbors[0] == MISSING).all()
    assert (graph("fewer spots than neighbours").neighbors == MISSING).any(dim=1).all()
    assert (graph("duplicated coordinates").geometry[..., 2] == 0).any()
    distance = graph("lattice with ties").geometry[..., 2]
    assert ((distance.diff(dim=1).abs() < 1e-9).sum(dim=1) >= 2).any()


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 1), (torch.float16, 0.5)], ids=str)
@pytest.mark.parametrize("name", ["odd widths", "packed behind a lone spot", "gelu"])
def test_short_types_cost_the_rounding_of_what_is_stored(name: str, dtype: torch.dtype, steps: float) -> None:
    """Of the output, and in the backward of the messages between the two kernels. The interpreter cuts bf16 off."""
    inputs = attention_inputs(CASES[name]).round_to(dtype)
    found, expected = attention_kernel(inputs, dtype), attention_reference(inputs)
    assert found.output.dtype == dtype
    step = torch.finfo(dtype).eps
    rounding = steps * step * expected.output.abs() + TOLERANCE * expected.output.abs().max() + torch.finfo(dtype).tiny
    assert ((found.output.double() - expected.output).abs() <= rounding).all()
    assert all(found.gradients[name].dtype == dtype for name in GRADIENTS)
    assert_results_agree(found, expected, 4 * step)


def test_weights_may_stay_float32_with_shorter_terms() -> None:
    inputs = attention_inputs(Attention()).round_to(torch.bfloat16)
    short, mixed = kernel_arguments(inputs, torch.bfloat16), kernel_arguments(inputs)
    mixed["terms"] = short["terms"]
    found, expected = kernels.edge_attention(**mixed), kernels.edge_attention(**short)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    found.sum().backward()
    assert [mixed[name].grad.dtype for name in GRADIENTS] == [torch.bfloat16, *[torch.float32] * 3]


@pytest.mark.parametrize("name", ["odd widths", "packed", "gelu", "relu"])
def test_kept_messages_change_nothing(name: str) -> None:
    inputs = attention_inputs(CASES[name])
    arguments = kernel_arguments(inputs)
    with torch.no_grad():
        made = kernels.edge_attention(**arguments)
        kept = kernels.edge_attention(**keep_messages(arguments))
    assert made.shape == kept.shape
    assert error(kept, made) < 1e-6
    expected = attention_reference(inputs).output
    assert error(kept, expected) < TOLERANCE


def keep_messages(arguments: dict[str, object]) -> dict[str, object]:
    settings = arguments["settings"]
    messages = kernels.edge_messages(
        arguments["edges"], arguments["edge"], arguments["message_to_logit"], settings, arguments["terms"].dtype
    )
    return {**arguments, "edges": messages, "settings": settings._replace(edges_are_messages=True)}


def test_kept_messages_cannot_be_differentiated() -> None:
    context = kernels.edge_attention(**keep_messages(kernel_arguments(attention_inputs(Attention()))))
    with pytest.raises(InputError, match="^edges: kept messages"):
        context.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_spots_without_neighbours_take_nothing_and_give_nothing(p: float) -> None:
    case = Attention(sizes=(1, 1, 7, 1), p_mlp=p, p_attention=p)
    found = attention_kernel(attention_inputs(case))
    alone = torch.tensor([0, 1, 9])
    assert not found.output[alone].any()
    assert not found.gradients["terms"][alone].any()
    assert found.output[2:9].any(dim=1).all()
    lone = attention_kernel(attention_inputs(replace(case, sizes=(1, 1, 1))))
    assert not lone.output.any()
    assert not any(lone.gradients[name].any() for name in GRADIENTS)


@pytest.mark.parametrize("broken", [0, 10, 28])
def test_not_a_number_stays_with_the_spots_of_its_tile_and_its_neighbours(
    broken: int, launched: Callable[..., None]
) -> None:
    """Lanes without an edge read something, times zero. The first slide has lone spots, whose lanes they are, the last
    tile lanes of nobody."""
    launched(16, 2)
    inputs = attention_inputs(Attention(sizes=(1, 1, 13, 1, 13), k=8))
    terms = inputs.terms.clone()
    terms[broken] = torch.nan
    found = attention_kernel(replace(inputs, terms=terms)).output.isnan().any(dim=1)
    near = (inputs.graph.neighbors == broken).any(dim=1)
    reached = [*near.nonzero().flatten().tolist(), broken]
    tiles = {row // 2 for row in reached}  # 16 edges are two spots
    assert all(row // 2 in tiles for row in found.nonzero().flatten().tolist())
    assert found[near].all()
    assert found[broken]


def test_kept_messages_are_without_gradients() -> None:
    assert not keep_messages(kernel_arguments(attention_inputs(Attention())))["edges"].requires_grad


def test_padding_of_the_context_is_zero() -> None:
    case = Attention(e=24, z=12, dh=5, heads=3)
    context = attention_kernel(attention_inputs(case)).output
    used = 3 * (5 + 24 + 1)
    assert context.shape == (20, 96)
    assert context[:, :used].any(dim=0).all()
    assert not context[:, used:].any()


def test_every_run_gives_the_same_bits() -> None:
    inputs = attention_inputs(Attention(sizes=(30,), k=8, e=12, z=5, dh=5, p_mlp=0.2, p_attention=0.2))
    assert_same_bits(attention_kernel(inputs), attention_kernel(inputs))


def test_dropout_follows_the_keys() -> None:
    arguments = kernel_arguments(attention_inputs(Attention(sizes=(9,), p_mlp=0.2, p_attention=0.2)))
    with torch.no_grad():
        found = kernels.edge_attention(**arguments)
        other = kernels.edge_attention(**arguments | {"dropout_keys": arguments["dropout_keys"] + 1})
    assert error(other, found) > 0.1


def test_arriving_edges_may_be_given() -> None:
    inputs = attention_inputs(CASES["packed"])
    arguments = kernel_arguments(inputs)
    context = kernels.edge_attention(**arguments, arriving=transpose_neighbors(inputs.graph.neighbors))
    given_ = differentiate(context, inputs.grad_context, {name: arguments[name] for name in GRADIENTS})
    assert_same_bits(given_, attention_kernel(inputs))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how every edge kernel is launched."""

    def set_rows(rows: int, programs: int) -> None:
        monkeypatch.setattr(shapes, "launch_of", lambda *_: launch.Launch(rows, 4, programs))

    return set_rows


@pytest.mark.parametrize(("rows", "programs"), [(16, 2), (32, 1), (64, 3)])
def test_tiles_and_programs_change_nothing(rows: int, programs: int, launched: Callable[..., None]) -> None:
    inputs = attention_inputs(Attention(sizes=(1, 9, 3), k=8, heads=1, e=12, z=5, dh=5, p_mlp=0.2, p_attention=0.2))
    whole = attention_kernel(inputs)
    launched(rows, programs)
    assert (
        kernels.edge_shape("edge_attention_fwd", 0, "ieee", shapes.Sizes(8, 12, 10, 5), settings_of(inputs))[0].rows
        == rows
    )
    assert_results_agree(attention_kernel(inputs), whole, 2e-6)


def settings_of(inputs: AttentionInputs) -> object:
    return kernel_arguments(inputs)["settings"]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Takes Z in parts of 16 columns, and the messages of the key-owned backward too."""
    monkeypatch.setattr(shapes, "part_of_z", lambda *_: 16)
    monkeypatch.setattr(shapes, "part_of_e", lambda *_: 16)
    shapes._edge_shape.cache_clear()
    yield
    shapes._edge_shape.cache_clear()


IN_PARTS = {
    "three parts": Attention(e=24, z=40, dh=5, heads=3, p_mlp=0.2, p_attention=0.3),
    "the last of one column": Attention(sizes=(1, 12), e=40, z=33),
    "gelu": Attention(activation="gelu", e=16, z=48, p_mlp=0.3),
    "relu": Attention(activation="relu", e=33, z=20, sizes=(9,), k=12),
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_hidden_vectors_may_be_taken_in_parts(name: str, in_parts: None) -> None:
    inputs = attention_inputs(IN_PARTS[name])
    case = inputs.case
    sizes = shapes.Sizes(case.k, case.e, case.hp, case.heads * case.dh)
    shape, _ = shapes.edge_shape("edge_attention_bwd_key", 0, "ieee", sizes, settings_of(inputs))
    assert (shape.z_parts, shape.e_parts) == (-(-case.z // 16), -(-case.e // 16))
    assert_equals_reference(inputs)


@pytest.mark.parametrize(
    ("products", "case"),
    [
        ({"batched": 64}, Attention(sizes=(1, 41), k=40, heads=1, e=24, z=20, p_mlp=0.2)),
        ({"batched": 32}, Attention(sizes=(13, 4), k=5, activation="gelu", e=16, z=33)),
        ({"halved": 64}, Attention(sizes=(1, 12), heads=2, e=40, z=50, p_attention=0.2)),
        ({"halved": 32}, Attention(activation="relu", e=24, z=20)),
    ],
)
def test_products_may_be_taken_in_batches_and_in_halves(
    products: dict[str, int], case: Attention, launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Hopper with many neighbours takes them, and exact float32."""
    whole = shapes._edge_shape
    monkeypatch.setattr(shapes, "_edge_shape", lambda *arguments: replace(whole(*arguments), **products))
    launched(products.get("batched", 16), 2)
    assert_equals_reference(attention_inputs(case))


@pytest.mark.parametrize(
    "case",
    [
        Attention(sizes=(1, 12), e=24, z=12, dh=5, heads=3, p_mlp=0.2, p_attention=0.2),
        Attention(sizes=(9,), k=3, activation="gelu", e=12, z=24),
    ],
    ids=["swiglu", "gelu"],
)
def test_the_edge_mlp_may_multiply_high_and_low_parts(
    case: Attention, launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU in every precision but ieee. Left out is low times low: 2^-16 there, and up to 2^-14 here, where the
    interpreter cuts bf16 off, and a low part is up to 2^-7 of its number."""
    whole = shapes._edge_shape
    monkeypatch.setattr(shapes, "_edge_shape", lambda *arguments: replace(whole(*arguments), split=True))
    launched(16, 2)
    assert_equals_reference(attention_inputs(case), 2**-14)


def test_gates_may_be_taken_by_tanh(launched: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU in every precision but ieee; there by one instruction, which the interpreter does not have."""
    whole, calls = shapes._edge_shape, []

    def tanh(b_x: tl.tensor) -> tl.tensor:
        calls.append(b_x)
        return 1.0 - 2.0 / (tl.exp(2.0 * b_x) + 1.0)

    monkeypatch.setattr(tiles, "fast_tanh", tanh)
    monkeypatch.setattr(shapes, "_edge_shape", lambda *arguments: replace(whole(*arguments), fast=True))
    launched(16, 2)
    assert_equals_reference(attention_inputs(Attention(sizes=(1, 12), p_mlp=0.2)))
    assert calls


def test_parts_do_not_cancel(in_parts: None) -> None:
    """Hidden vectors far from zero, in the first part most of all."""
    inputs = attention_inputs(Attention(activation="gelu", e=16, z=48))
    terms = inputs.terms.clone()
    terms[:, : inputs.case.hp] += 50
    terms[:, :16] += 50
    assert_equals_reference(replace(inputs, terms=terms), 4 * TOLERANCE)


def permuted(inputs: AttentionInputs, order: Tensor) -> AttentionInputs:
    """Row n of the result is row order[n]."""
    row_of = order.argsort()
    neighbors = inputs.graph.neighbors[order]
    neighbors = torch.where(neighbors == MISSING, MISSING, row_of[neighbors.clamp(min=0)])
    graph = replace(inputs.graph, neighbors=neighbors, geometry=inputs.graph.geometry[order])
    keys = replace(inputs.keys, keys=inputs.keys.keys[order])
    return replace(inputs, graph=graph, terms=inputs.terms[order], grad_context=inputs.grad_context[order], keys=keys)


few = settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(
    seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3), p=st.sampled_from([0, 0.3])
)
def test_context_and_gradients_follow_a_permutation_of_the_spots(seed: int, sizes: list[int], p: float) -> None:
    inputs = attention_inputs(
        Attention(sizes=tuple(sizes), k=4, heads=1, e=12, z=5, dh=5, p_mlp=p, p_attention=p, seed=seed)
    )
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    plain, moved = attention_kernel(inputs), attention_kernel(permuted(inputs, order))
    expected = Result(plain.output[order], {**plain.gradients, "terms": plain.gradients["terms"][order]})
    assert_results_agree(moved, expected, TOLERANCE)


@few
@given(
    seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 9), min_size=2, max_size=3), p=st.sampled_from([0, 0.3])
)
def test_packed_slides_are_as_if_alone(seed: int, sizes: list[int], p: float) -> None:
    inputs = attention_inputs(
        Attention(sizes=tuple(sizes), k=4, heads=1, e=12, z=5, dh=5, p_mlp=p, p_attention=p, seed=seed)
    )
    packed = attention_kernel(inputs)
    alone = [attention_kernel(slide_alone(inputs, index)) for index in range(len(sizes))]
    assert error(packed.output, torch.cat([slide.output for slide in alone])) < TOLERANCE
    assert error(packed.gradients["terms"], torch.cat([slide.gradients["terms"] for slide in alone])) < TOLERANCE
    for name in GRADIENTS[1:]:
        assert error(packed.gradients[name], sum(slide.gradients[name] for slide in alone)) < TOLERANCE


def slide_alone(inputs: AttentionInputs, index: int) -> AttentionInputs:
    start, stop = inputs.graph.slide_ptr[index : index + 2].tolist()
    neighbors = inputs.graph.neighbors[start:stop]
    neighbors = torch.where(neighbors == MISSING, MISSING, neighbors - start)
    graph = replace(inputs.graph, neighbors=neighbors, geometry=inputs.graph.geometry[start:stop])
    return replace(
        inputs,
        graph=graph,
        terms=inputs.terms[start:stop],
        grad_context=inputs.grad_context[start:stop],
        keys=inputs.keys.rows(start, stop),
    )


def operator_arguments(inputs: AttentionInputs) -> tuple[object, ...]:
    arguments = kernel_arguments(inputs)
    return (
        *(arguments[name] for name in ("terms", "neighbors", "edges", "edge", "message_to_logit", "logit")),
        arguments["dropout_keys"],
        *transpose_neighbors(inputs.graph.neighbors),
        *arguments["settings"],
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_operator_is_registered_as_torch_wants_it(p: float) -> None:
    inputs = attention_inputs(Attention(sizes=(7,), k=3, e=12, z=5, dh=5, p_mlp=p, p_attention=p))
    torch.library.opcheck(torch.ops.stflow_fast.edge_attention, operator_arguments(inputs), atol=1e-5, rtol=1e-5)


def test_the_messages_operator_is_registered_as_torch_wants_it() -> None:
    arguments = (torch.rand(7, 5, 3), torch.rand(4, 24), torch.rand(12, 32), 2, "swiglu", "swiglu", torch.float32)
    torch.library.opcheck(torch.ops.stflow_fast.edge_messages, arguments)
    with pytest.raises(InputError, match=r"^geometry: must have shape \[N, 1 to 64, 3\]"):
        torch.ops.stflow_fast.edge_messages(torch.rand(7, 3), *arguments[1:])
    with pytest.raises(InputError, match=r"^edge: must have shape \[4, 24\]"):
        torch.ops.stflow_fast.edge_messages(arguments[0], torch.rand(4, 12), *arguments[2:])


def test_the_backward_operator_is_registered_as_torch_wants_it() -> None:
    inputs = attention_inputs(Attention(sizes=(7,), k=3, e=12, z=5, dh=5))
    detached = (value.detach() if isinstance(value, Tensor) else value for value in operator_arguments(inputs))
    arguments = (inputs.grad_context.float(), *detached)
    torch.library.opcheck(torch.ops.stflow_fast.edge_attention_backward, arguments)


def test_one_compilation_serves_every_number_of_spots() -> None:
    compiled_graphs = []

    def count(module: torch.fx.GraphModule, examples: list[Tensor]) -> Callable:
        from torch._dynamo.backends.debugging import aot_eager

        compiled_graphs.append(module)
        return aot_eager(module, examples)

    def function(
        terms: Tensor, neighbors: Tensor, edges: Tensor, edge: Tensor, weight: Tensor, logit: Tensor
    ) -> Tensor:
        context = kernels.edge_attention(2 * terms, neighbors, edges, edge, weight, logit, spec)
        return context.square()

    torch._dynamo.reset()
    spec = kernels.Settings(2, "swiglu", "swiglu")
    compiled = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    counts = []
    for n in (7, 11, 4):
        inputs = attention_inputs(Attention(sizes=(n,), k=3, e=12, z=5, dh=5))
        results = []
        for run in (function, compiled):
            arguments = kernel_arguments(inputs)
            tensors = {name: arguments[name] for name in GRADIENTS}
            output = run(tensors.pop("terms"), arguments["neighbors"], arguments["edges"], *tensors.values())
            results.append(differentiate(output, inputs.grad_context, {name: arguments[name] for name in GRADIENTS}))
        assert_same_bits(*results)
        counts.append(len(compiled_graphs))
    assert counts[0] == counts[-1] > 0


def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters() -> None:
    inputs = attention_inputs(Attention(sizes=(9,)))
    arguments = kernel_arguments(inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        context = kernels.edge_attention(**arguments)
    assert context.dtype == torch.bfloat16
    found = differentiate(context, inputs.grad_context, {name: arguments[name] for name in GRADIENTS})
    assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
    assert_results_agree(found, attention_reference(inputs), 0.1)


def gap_between_rows(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]


@pytest.mark.parametrize("name", ["odd widths", "packed", "gelu"])
def test_inputs_of_the_edge_mlp_in_two_parts_are_float32_but_for_2_to_the_minus_16(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU computes them in bf16 and tf32; the interpreter would not by itself."""
    shaped = shapes.edge_shape

    def in_parts(*arguments: object) -> tuple[shapes.EdgeShape, launch.Launch]:
        shape, launched = shaped(*arguments)
        return replace(shape, split=True), launched

    monkeypatch.setattr(kernels, "edge_shape", in_parts)
    inputs = attention_inputs(CASES[name])
    # Eight steps of it in gradients; without the low part they are 100 times as far off.
    assert_results_agree(attention_kernel(inputs), attention_reference(inputs), 2**-13)


def test_the_inputs_of_the_refusals_are_otherwise_taken() -> None:
    kernels.edge_attention(**refused({}))


def refused(changes: dict[str, Callable]) -> dict[str, object]:
    arguments = kernel_arguments(attention_inputs(Attention(sizes=(9,), k=3, p_mlp=0.2)))
    with torch.no_grad():
        arguments["arriving"] = transpose_neighbors(arguments["neighbors"])
        return {**arguments, **{name: change(arguments[name]) for name, change in changes.items()}}


REFUSALS = {
    "terms of too few columns": ("terms", lambda terms: terms[:, :-1].contiguous(), "terms: must have shape"),
    "terms without values": ("terms", lambda terms: terms[:, :128].contiguous(), "terms: must have shape"),
    "terms of too few spots": ("terms", lambda terms: terms[:-1], r"terms: must have shape \[9, 160\]"),
    "terms in one dimension": ("terms", lambda terms: terms[0], "terms: must have shape"),
    "terms in float64": ("terms", lambda terms: terms.double(), "terms: .*float64"),
    "terms that are numbers": ("terms", lambda terms: terms.int(), "terms: .*int32"),
    "terms with gaps": ("terms", gap_between_rows, "terms: must be contiguous"),
    "no neighbours": ("neighbors", lambda table: table[:, :0], "neighbors: must have 1 to 64 columns"),
    "65 neighbours": ("neighbors", lambda table: table[:, :1].repeat(1, 65), "neighbors: must have 1 to 64 columns"),
    "neighbours in one dimension": ("neighbors", lambda table: table[:, 0], "neighbors: must have 1 to 64 columns"),
    "neighbours in int32": ("neighbors", lambda table: table.int(), "neighbors: must be torch.int64"),
    "neighbours with gaps": ("neighbors", gap_between_rows, "neighbors: must be contiguous"),
    "neighbours elsewhere": ("neighbors", lambda table: table.to("meta"), "neighbors: is on meta"),
    "edges of too few neighbours": ("edges", lambda edges: edges[:, :2], r"edges: must have shape \[9, 3, 3\]"),
    "edges of two numbers": ("edges", lambda edges: edges[..., :2], r"edges: must have shape \[9, 3, 3\]"),
    "edges with gaps": ("edges", gap_between_rows, "edges: must be contiguous"),
    "edges elsewhere": ("edges", lambda edges: edges.to("meta"), "edges: is on meta"),
    "edge weights without bias": ("edge", lambda edge: edge[:3], "edge: must have shape"),
    "edge weights of half": ("edge", lambda edge: edge[:, :16].contiguous(), "edge: must have shape"),
    "edge weights with gaps": ("edge", gap_between_rows, "edge: must be contiguous"),
    "weights in one dimension": ("message_to_logit", lambda weight: weight[0], "message_to_logit: must have shape"),
    "weights with gaps": ("message_to_logit", gap_between_rows, "message_to_logit: must be contiguous"),
    "logit without bias": ("logit", lambda logit: logit[:-1], r"logit: must have shape \[17\]"),
    "logit in two dimensions": ("logit", lambda logit: logit[None], r"logit: must have shape \[17\]"),
    "no keys": ("dropout_keys", lambda keys: None, "dropout_keys: are needed"),
    "keys of too few spots": ("dropout_keys", lambda keys: keys[1:], r"dropout_keys: must have shape \[9\]"),
    "keys in int64": ("dropout_keys", lambda keys: keys.long(), "dropout_keys: must be torch.int32"),
    "no heads": ("settings", lambda settings: settings._replace(n_heads=0), "terms: .*H = 0"),
    "heads that do not divide": ("settings", lambda settings: settings._replace(n_heads=3), "terms: .*H = 3"),
    "an unknown edge gate": (
        "settings",
        lambda settings: settings._replace(edge_activation="tanh"),
        "edge_activation: must be swiglu, gelu or relu, not 'tanh'",
    ),
    "an unknown logit gate": (
        "settings",
        lambda settings: settings._replace(logit_activation="silu"),
        "logit_activation: must be swiglu, gelu or relu, not 'silu'",
    ),
    "a short list of edges": ("arriving", lambda pair: (pair[0][1:], pair[1]), r"arriving: must have shape \[27\]"),
    "edges in int32": ("arriving", lambda pair: (pair[0].int(), pair[1]), "arriving: must be torch.int64"),
    "edges with gaps between": (
        "arriving",
        lambda pair: (pair[0].repeat_interleave(2)[::2], pair[1]),
        "arriving: must be contiguous",
    ),
    "a short list of spots": ("arriving", lambda pair: (pair[0], pair[1][1:]), r"arriving_ptr: must have shape \[10\]"),
    "weights of too many columns": (
        "message_to_logit",
        lambda weight: weight.repeat(65, 1),
        r"message_to_logit: must have shape \[E, H \* P\] with E from 1 to 1024",
    ),
    "no columns": ("message_to_logit", lambda weight: weight[:0], r"message_to_logit: .* with E from 1 to 1024"),
    "kept messages with dropout": (
        "settings",
        lambda settings: settings._replace(edges_are_messages=True, p_mlp=0.1),
        "edges: kept messages are without dropout",
    ),
    "half a gate": (
        "message_to_logit",
        lambda weight: weight[:, : 2 * 15].contiguous(),
        "message_to_logit: must have an even number of columns a head for swiglu, not 15",
    ),
    "dropout of everything": ("settings", lambda settings: settings._replace(p_mlp=1.0), "p_mlp: .*not 1.0"),
    "less than no dropout": ("settings", lambda settings: settings._replace(p_attention=-0.1), "p_attention: .*-0.1"),
    "geometry for messages": (
        "settings",
        lambda settings: settings._replace(edges_are_messages=True, p_mlp=0.0),
        r"edges: must have shape \[9, 3, 16\]",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_arguments_are_named(name: str) -> None:
    argument, change, complaint = REFUSALS[name]
    with pytest.raises(InputError, match=f"^{complaint}"):
        kernels.edge_attention(**refused({argument: change}))


def test_neighbours_out_of_range_are_named_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STFLOW_DEBUG", "1")
    kernels.edge_attention(**refused({}))
    with pytest.raises(InputError, match=r"^neighbors: 9 is no row of the 9 terms"):
        kernels.edge_attention(**refused({"neighbors": lambda table: table + (table == table.max())}))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(InputError, match="^terms: is on cpu; Triton kernels need a CUDA device"):
        kernels.edge_attention(**refused({}))


def test_an_old_gpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"^device: .*not 7\.5"):
        launch.launch_of("edge_attention_fwd", 75, "bf16", 64)

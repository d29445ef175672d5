"""The edge kernels against the float64 reference, forward and every gradient: sizes, types, packed slides, dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stflow_fast.errors import InputError
from stflow_fast.graph import MISSING, SpotGraph, transpose_neighbors

from .attention_cases import CASES, TOLERANCE, assert_equals_reference, keep_messages, launched
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
    differentiate,
    error,
    kernel_arguments,
    poisoned_memory,
)

__all__ = ["launched"]  # a fixture

pytest.importorskip("triton")
kernels = pytest.importorskip("stflow_fast.kernels.edge_attention")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


@pytest.mark.parametrize("name", CASES)
def test_context_and_every_gradient_equal_the_reference(name: str) -> None:
    assert_equals_reference(attention_inputs(CASES[name]))


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

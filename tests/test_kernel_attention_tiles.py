"""The edge kernels however they are launched: tiles, parts, batches and halves of products, other gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from .attention_cases import CASES, TOLERANCE, assert_equals_reference, launched
from .kernel_cases import (
    DEVICE,
    Attention,
    AttentionInputs,
    Result,
    assert_results_agree,
    attention_inputs,
    attention_kernel,
    attention_reference,
    kernel_arguments,
    poisoned_memory,
)

__all__ = ["launched"]  # a fixture

pytest.importorskip("triton")
kernels = pytest.importorskip("stflow_fast.kernels.edge_attention")
shapes = pytest.importorskip("stflow_fast.kernels.edge_shape")
launch = pytest.importorskip("stflow_fast.kernels.launch")
tiles = pytest.importorskip("stflow_fast.kernels.tiles")
tl = pytest.importorskip("triton.language")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


@pytest.fixture(scope="module")
def small() -> tuple[AttentionInputs, Result]:
    """An attention, and what the kernels make of it as the interpreter launches them."""
    inputs = attention_inputs(Attention(sizes=(1, 9, 3), k=8, heads=1, e=12, z=5, dh=5, p_mlp=0.2, p_attention=0.2))
    return inputs, attention_kernel(inputs)


@pytest.mark.parametrize(("rows", "programs"), [(16, 2), (32, 1), (64, 3)])
def test_tiles_and_programs_change_nothing(
    rows: int, programs: int, small: tuple[AttentionInputs, Result], launched: Callable[..., None]
) -> None:
    inputs, whole = small
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

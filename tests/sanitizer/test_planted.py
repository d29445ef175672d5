"""The check itself: faults planted in small kernels are found, and their sound counterparts are let through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from ttsem.sanitize import KernelFault

from ..kernel_cases import error

BLOCK = tl.constexpr(16)
N = 40


@triton.jit
def put(place, b_x):
    tl.store(place, b_x)


@triton.jit
def add_sum_kernel(x, out, n, FAULT: tl.constexpr):
    """To every number the sum of those of its program."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if FAULT == "load without a mask":
        b_x = tl.load(x + i)
    elif FAULT == "load without other":
        b_x = tl.load(x + i, mask=i < n)
    else:
        b_x = tl.load(x + i, mask=i < n, other=0.0)
    b_x += tl.sum(b_x, 0)
    if FAULT == "store without a mask":
        put(out + i, b_x)
    else:
        tl.store(out + i, b_x, mask=i < n)


@triton.jit
def sum_kernel(x, out, n, OWN: tl.constexpr):
    """A sum of each program, to a place of its own or to that of all."""
    i_program = tl.program_id(0)
    i = i_program * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + (i_program if OWN else 0), tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


@triton.jit
def move_kernel(x, out, n, offset):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + offset + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def twice_kernel(x, out, n, STEP: tl.constexpr):
    """Two blocks of x, one after the other or over its half."""
    i = tl.program_id(0) * 2 * BLOCK + tl.arange(0, BLOCK)
    for i_half in range(2):
        i_out = i + i_half * STEP
        tl.store(out + i_out, tl.load(x + i + i_half * BLOCK, mask=i_out < n, other=0.0), mask=i_out < n)


@triton.jit
def product_kernel(x, y, out, n):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0) * tl.load(y + i, mask=i < n, other=0.0), mask=i < n)


PROGRAMS = (triton.cdiv(N, BLOCK.value),)
WHOLE = PROGRAMS[0] * BLOCK.value
"""So many numbers need no mask."""


def numbers(n: int = N) -> Tensor:
    return torch.arange(1.0, n + 1, device="cuda")


def add_sum(n: int, fault: str = "") -> Tensor:
    out = torch.empty(n, device="cuda")
    add_sum_kernel[PROGRAMS](numbers(n), out, n, fault)
    return out


def sums_added(n: int) -> Tensor:
    return torch.cat([part + part.sum() for part in numbers(n).split(BLOCK.value)])


@pytest.mark.parametrize("n", [1, 15, N, WHOLE])
def test_a_sound_kernel_is_let_through(n: int) -> None:
    assert torch.equal(add_sum(n), sums_added(n))


@pytest.mark.parametrize(
    ("access", "kind", "lines"),
    [
        ("load", "oob_read", ["b_x = tl.load(x + i)"]),
        ("store", "oob_write", ["tl.store(place, b_x)", ": put(out + i, b_x)"]),
    ],
)
def test_a_missing_mask_is_out_of_bounds(access: str, kind: str, lines: list[str]) -> None:
    with pytest.raises(KernelFault) as found:
        add_sum(N, f"{access} without a mask")
    fault = found.value.fault
    assert (fault.kind, fault.elements_past_end) == (kind, WHOLE - N)
    assert all(line in str(found.value) for line in lines)
    assert torch.equal(add_sum(WHOLE, f"{access} without a mask"), sums_added(WHOLE))


def test_what_is_masked_off_without_other_is_nan() -> None:
    assert add_sum(N, "load without other")[32:].isnan().all()
    assert torch.equal(add_sum(WHOLE, "load without other"), sums_added(WHOLE))


def test_what_lies_behind_a_tensor_is_not_another_one() -> None:
    x, other, out = numbers(), numbers(), torch.empty(N, device="cuda")
    between = (other.data_ptr() - x.data_ptr()) // x.element_size()
    with pytest.raises(KernelFault) as found:
        move_kernel[PROGRAMS](x, other, N, between)
    assert found.value.fault.kind == "oob_read"
    move_kernel[PROGRAMS](x, out, N, 0)
    assert torch.equal(out, x)


def test_programs_that_store_to_one_place_race() -> None:
    with pytest.raises(KernelFault) as found:
        sum_kernel[PROGRAMS](numbers(), torch.zeros(1, device="cuda"), N, False)
    assert found.value.fault.kind == "race"
    assert "tl.store(" in found.value.fault.source_text
    sums = torch.empty(PROGRAMS, device="cuda")
    sum_kernel[PROGRAMS](numbers(), sums, N, True)
    assert torch.equal(sums, torch.stack([part.sum() for part in numbers().split(BLOCK.value)]))


def test_programs_that_read_what_others_store_race() -> None:
    x, out = numbers(), torch.empty(N, device="cuda")
    with pytest.raises(KernelFault) as found:
        move_kernel[PROGRAMS](x, x, N - 1, 1)
    assert found.value.fault.kind == "race"
    move_kernel[PROGRAMS](numbers(), out, N - 1, 1)
    assert torch.equal(out[:-1], numbers()[1:])


def test_stores_of_one_program_to_one_place_race() -> None:
    x, out = numbers(2 * WHOLE), torch.empty(2 * WHOLE, device="cuda")
    with pytest.raises(KernelFault) as found:
        twice_kernel[PROGRAMS](x, out, len(x), BLOCK.value // 2)
    assert found.value.fault.kind == "race"
    twice_kernel[PROGRAMS](x, out, len(x), BLOCK.value)
    assert torch.equal(out, x)


class EmptyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        return torch.empty_like(grad)


def empty_gradient(like: Tensor) -> Tensor:
    x = like.clone().requires_grad_()
    return torch.autograd.grad(EmptyGradient.apply(x).sum(), x)[0]


@pytest.mark.parametrize(
    "make",
    [torch.empty_like, lambda like: like.new_empty(N), lambda like: torch.empty(N, device="cuda"), empty_gradient],
    ids=["empty_like", "new_empty", "empty", "in a backward"],
)
def test_what_nobody_wrote_is_nan(make: Callable[[Tensor], Tensor]) -> None:
    out, expected = make(numbers()), numbers() + 1
    move_kernel[PROGRAMS](numbers(), out, N - 1, 1)
    assert error(out, expected) == float("inf")
    assert error(out[:-1], expected[:-1]) == 0


def test_a_product_of_bf16_is_rounded_as_torch_rounds_it() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, N, generator=draw).bfloat16().unbind()
    out = torch.empty_like(x)
    product_kernel[PROGRAMS](x, y, out, N)
    assert torch.equal(out, x * y)
    assert not torch.equal(out.float(), x.float() * y.float())

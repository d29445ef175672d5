"""Blocks of spots that are differentiated by themselves: what they add up to, and what that costs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stflow_fast.graph import MISSING
from stflow_fast.ops.blocks import Blocks, Part, Reading, rows_read
from stflow_fast.threads import blocks_of

N, K, QUERY, WIDTH = 23, 3, 4, 10


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Neighbours, terms, edges and a weight, as an attention has them; some neighbours are missing."""
    generator = torch.Generator().manual_seed(3)
    neighbors = torch.randint(n, (n, K), generator=generator, dtype=torch.int32)
    neighbors[::5, 1:] = MISSING
    neighbors[1] = MISSING
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((n, WIDTH), (n, K, 2), (2, QUERY))]
    return [neighbors, *(x.requires_grad_() for x in made)]


def run(rows: slice, neighbors: Tensor, query: Tensor, terms: Tensor, edges: Tensor, weight: Tensor) -> tuple[Tensor]:
    """Something that depends on everything, nonlinear in the terms, and on the block's place."""
    read = terms[neighbors.clamp(min=0), QUERY:] * (neighbors != MISSING).unsqueeze(-1)
    spots = torch.arange(rows.start, rows.stop, dtype=terms.dtype).unsqueeze(1)
    return ((read.square().sum(dim=1) * spots).cos() + ((edges @ weight).sum(dim=1) * query).sum(1, keepdim=True),)


def whole(neighbors: Tensor, terms: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    return run(slice(0, len(terms)), neighbors, terms[:, :QUERY], terms, edges, weight)[0]


def blockwise(size: int, neighbors: Tensor, *tensors: Tensor, keep: bool = False) -> Tensor:
    def reading(rows: slice) -> Reading:
        near, place = rows_read(neighbors[rows])
        parts = [Part(0, (rows, slice(QUERY))), Part(0, near), Part(1, rows), Part(2, ...)]
        return Reading(parts, functools.partial(run, rows, place))

    return Blocks.apply(reading, blocks_of(len(neighbors), size), keep, *tensors)[0]


@pytest.fixture(params=[1, 3])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("size", [1, 7, N])
def test_blocks_add_up_to_the_whole(size: int, keep: bool, n_threads: int) -> None:
    neighbors, *others = inputs()
    expected, found = whole(neighbors, *others), blockwise(size, neighbors, *others, keep=keep)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = [torch.autograd.grad(output, others, upstream) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", [False, True])
def test_a_graph_that_is_retained_goes_backward_twice(keep: bool) -> None:
    neighbors, *others = inputs()
    loss = blockwise(7, neighbors, *others, keep=keep).square().sum()
    first = torch.autograd.grad(loss, others, retain_graph=True)
    second = torch.autograd.grad(loss, others)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, others)


def test_of_several_outputs_those_that_are_read_go_backward(n_threads: int) -> None:
    x, weight = torch.randn(N, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)

    def reading(rows: slice) -> Reading:
        return Reading([Part(0, rows), Part(1, ...)], lambda x, weight: (x @ weight, x.square()))

    def outputs() -> tuple[Tensor, ...]:
        return Blocks.apply(reading, blocks_of(N, 5), True, x, weight)

    (gradient,) = torch.autograd.grad(outputs()[1].sum(), x)
    torch.testing.assert_close(gradient, 2 * x)
    assert torch.autograd.grad(outputs()[1].sum(), weight)[0].eq(0).all()
    (gradient,) = torch.autograd.grad(outputs()[0].sum(), weight)
    torch.testing.assert_close(gradient, x.sum(dim=0).unsqueeze(1).expand(3, 2))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(index: int, keep: bool) -> None:
    neighbors, *others = inputs()
    others[index].requires_grad_(False)
    wanted = [x for x in others if x.requires_grad]
    outputs = blockwise(7, neighbors, *others, keep=keep), whole(neighbors, *others)
    torch.testing.assert_close(*(torch.autograd.grad(output.sum(), wanted) for output in outputs))
    blockwise(7, neighbors, *others, keep=keep).sum().backward()
    assert others[index].grad is None


@pytest.mark.parametrize("keep", [False, True])
def test_the_backward_computes_in_the_precision_of_the_forward(keep: bool, n_threads: int) -> None:
    neighbors, *others = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = blockwise(7, neighbors, *others, keep=keep), whole(neighbors, *others)
    assert outputs[0].dtype == outputs[1].dtype
    gradients = [torch.autograd.grad(output.sum(), others) for output in outputs]
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-5, atol=1e-5)


class Made(TorchDispatchMode):
    """Counts tensors of so many rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.count = rows, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        is_new = isinstance(out, Tensor) and all(out is not x for x in args) and not out._is_view()
        self.count += is_new and out.ndim > 0 and len(out) == self.rows
        return out


def test_no_block_makes_a_tensor_of_the_slides_size() -> None:
    neighbors, *others = inputs(97)
    counts = []
    for size in (40, 10, 5):
        output = blockwise(size, neighbors, *others)
        with Made(97) as made:
            torch.autograd.grad(output.sum(), others)
        counts.append(made.count)
    assert counts[0] == counts[1] == counts[2]

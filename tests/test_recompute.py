"""The backward of plain torch that computes blocks of spots again: what it adds up, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stflow_fast.graph import MISSING
from stflow_fast.ops.recompute import Recomputed

N, K, QUERY, WIDTH = 23, 3, 4, 10


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Neighbours, terms, edges and a weight, as :class:`Recomputed` has them; some neighbours are missing."""
    generator = torch.Generator().manual_seed(3)
    neighbors = torch.randint(n, (n, K), generator=generator, dtype=torch.int32)
    neighbors[::5, 1:] = MISSING
    neighbors[1] = MISSING
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((n, WIDTH), (n, K, 2), (2, QUERY))]
    return [neighbors, *(x.requires_grad_() for x in made)]


def run(rows: slice, query: Tensor, terms: Tensor, neighbors: Tensor, edges: Tensor, weights: tuple[Tensor]) -> Tensor:
    """Something that depends on everything, nonlinear in the terms, and on the block's place."""
    read = terms[neighbors.clamp(min=0), QUERY:] * (neighbors != MISSING).unsqueeze(-1)
    spots = torch.arange(rows.start, rows.stop, dtype=terms.dtype).unsqueeze(1)
    return (read.square().sum(dim=1) * spots).cos() + ((edges @ weights[0]).sum(dim=1) * query).sum(1, keepdim=True)


def whole(neighbors: Tensor, terms: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    return run(slice(0, len(terms)), terms[:, :QUERY], terms, neighbors, edges, (weight,))


def blockwise(size: int, neighbors: Tensor, terms: Tensor, edges: Tensor, weight: Tensor) -> Tensor:
    n = len(terms)
    blocks = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    return Recomputed.apply(run, blocks, QUERY, neighbors, terms, edges, weight)


@pytest.mark.parametrize("size", [1, 7, N])
def test_blocks_add_up_to_the_whole(size: int) -> None:
    neighbors, *others = inputs()
    expected, found = whole(neighbors, *others), blockwise(size, neighbors, *others)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = [torch.autograd.grad(output, others, upstream) for output in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(index: int) -> None:
    neighbors, *others = inputs()
    others[index].requires_grad_(False)
    wanted = [x for x in others if x.requires_grad]
    outputs = blockwise(7, neighbors, *others), whole(neighbors, *others)
    torch.testing.assert_close(*(torch.autograd.grad(output.sum(), wanted) for output in outputs))
    blockwise(7, neighbors, *others).sum().backward()
    assert others[index].grad is None


def test_the_backward_computes_in_the_precision_of_the_forward() -> None:
    neighbors, *others = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = blockwise(7, neighbors, *others), whole(neighbors, *others)
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

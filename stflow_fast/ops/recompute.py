"""Attention in blocks of spots that a backward computes again, in time and memory linear in the spots.

``torch.utils.checkpoint`` over blocks is neither: the gradient of every block's gather is as large as the slide, and
time grows with spots times blocks. Here a block's gradient is as large as the block, and is added to one for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ..graph import MISSING

RunBlock = Callable[..., Tensor]
"""(rows, query, terms, neighbors, edges, weights) -> context of the spots of ``rows``, a slice: query, neighbours and
edges are of these spots, and ``terms`` has the rows that ``neighbors`` names."""


class Recomputed(torch.autograd.Function):
    """[N, C] of all blocks, which cover the N spots in order; differentiable once in terms, edges and weights.

    Arguments of ``apply`` are those of :meth:`forward`: ``width`` columns of ``terms`` [N, T] are a spot's query,
    ``neighbors`` [N, K] are rows of ``terms``, MISSING where there is none, and ``edges`` are [N, ...].
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        run: RunBlock,
        blocks: Sequence[slice],
        width: int,
        neighbors: Tensor,
        terms: Tensor,
        edges: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(neighbors, terms, edges, *weights)
        ctx.run, ctx.blocks, ctx.width = run, blocks, width
        ctx.precision = _autocast_of(terms.device.type)
        return torch.cat(
            [run(rows, terms[rows, :width], terms, neighbors[rows], edges[rows], weights) for rows in blocks]
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        neighbors, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[-len(inputs) :]
        totals = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
        terms, edges, *weights = totals
        for rows in ctx.blocks:
            near, place = _rows_read(neighbors[rows])
            of_query, of_near, of_edges, *of_weights = _gradients(ctx, rows, near, place, grad[rows], inputs)
            if terms is not None:
                terms[rows, : ctx.width] += of_query
                terms.index_add_(0, near, of_near)
            if edges is not None:
                edges[rows] = of_edges
            for total, part in zip(weights, of_weights, strict=True):
                if total is not None:
                    total += part
        return None, None, None, None, *totals


def _rows_read(neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block's neighbours [n, K], the rows that are read, each once [M], and each one's place among them [n, K]."""
    near, place = neighbors.unique(return_inverse=True)
    return near.clamp(min=0), place.to(neighbors.dtype).masked_fill(neighbors == MISSING, MISSING)


def _gradients(
    ctx: FunctionCtx, rows: slice, near: Tensor, place: Tensor, grad: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of a block's query, the terms that it reads, its edges and the weights; None where none is needed."""
    terms, edges, *weights = inputs
    of_terms, *of_others = ctx.needs_input_grad[-len(inputs) :]
    read = (terms[rows, : ctx.width], terms.index_select(0, near), edges[rows], *weights)
    leaves = [x.detach().requires_grad_(need) for x, need in zip(read, (of_terms, of_terms, *of_others), strict=True)]
    with torch.enable_grad(), ctx.precision():
        query, local, part, *others = leaves
        out = ctx.run(rows, query, local, place, part, others)
    found = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _autocast_of(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """That of the moment, to be entered again in a backward, which autograd may run elsewhere."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)

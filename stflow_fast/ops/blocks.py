"""Blocks of spots in several threads, with gradients: each block is differentiated by itself.

``torch.utils.checkpoint`` over blocks would not be linear in the spots: the gradient of every block's gather is as
large as the slide, and time grows with spots times blocks. Here a block's gradients are as large as what the block
reads, and are added to one for all, in the order of the blocks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..graph import MISSING
from ..threads import in_turn


class Part(NamedTuple):
    """What a block reads of one tensor."""

    source: int  # the tensor's place among the arguments
    where: Any  # slices, an ellipsis for the whole, or rows [M] as a tensor

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        tensor = tensors[self.source]
        if tensor is None:
            return None
        return tensor.index_select(0, self.where) if isinstance(self.where, Tensor) else tensor[self.where]

    def add(self, totals: Sequence[Tensor | None], gradient: Tensor | None) -> None:
        """The gradient of this part to that of its tensor."""
        total = totals[self.source]
        if gradient is None or total is None:
            return
        if isinstance(self.where, Tensor):
            total.index_add_(0, self.where, gradient)
        else:
            total[self.where] += gradient


class Reading(NamedTuple):
    """What a block reads, and what it makes of that: tensors [n, ...] of its spots."""

    parts: list[Part]
    function: Callable[..., tuple[Tensor, ...]]


class Gathered:
    """Tensors [N, ...] whose rows come in blocks, from several threads."""

    def __init__(self, n: int) -> None:
        self.tensors: tuple[Tensor, ...] = ()
        self._n, self._making = n, threading.Lock()

    def put(self, rows: slice, parts: Sequence[Tensor]) -> None:
        with self._making:
            self.tensors = self.tensors or tuple(part.new_empty(self._n, *part.shape[1:]) for part in parts)
        for whole, part in zip(self.rows(rows) or (), parts, strict=True):
            if part.data_ptr() != whole.data_ptr():  # else it was written there
                whole.copy_(part)

    def rows(self, rows: slice) -> tuple[Tensor, ...] | None:
        """Where these rows belong; None before there is a place."""
        return tuple(whole[rows] for whole in self.tensors) or None


class _Graph(NamedTuple):
    """How the outputs of a block came from its leaves."""

    parts: list[Part]
    leaves: list[Tensor | None]
    outputs: list[GradientEdge | None]  # not the tensors, whose memory is free; None of what needs no gradient


class _Context(FunctionCtx):
    """What a forward leaves for its backward, and what torch puts there."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: tuple[bool, ...]
    reading: Callable[[slice], Reading]
    blocks: Sequence[slice]
    device: torch.device
    precision: Callable[[], contextlib.AbstractContextManager[Any]]
    kept: dict[int, _Graph]


class Blocks(torch.autograd.Function):
    """Tensors [N, ...] of all blocks, which cover the N spots; differentiable once.

    Arguments of ``apply`` are those of :meth:`forward`. ``reading`` says what a block, a slice of the spots, reads of
    ``tensors`` and computes. ``keep``: what the backward needs of the blocks stays in memory; else they are computed
    again, as they are for a second backward.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        reading: Callable[[slice], Reading],
        blocks: Sequence[slice],
        keep: bool,
        first: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        tensors = (first, *others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)  # type: ignore[arg-type]  # takes None too, which its annotation leaves out
        ctx.reading, ctx.blocks, ctx.device = reading, blocks, first.device
        ctx.precision, ctx.kept = present_precision(first.device.type), {}
        needed, gathered = ctx.needs_input_grad[3:], Gathered(blocks[-1].stop)

        def compute(rows: slice) -> None:
            if keep:
                outputs, ctx.kept[rows.start] = _differentiable(ctx, rows, tensors, needed)
            else:
                parts, function = reading(rows)
                with ctx.precision():
                    outputs = function(*(part.of(tensors) for part in parts))
            gathered.put(rows, [output.detach() for output in outputs])

        in_turn(compute, blocks, first.device)
        return gathered.tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        totals = [
            torch.zeros_like(x) if need and x is not None else None for x, need in zip(tensors, needed, strict=True)
        ]
        arrived = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}

        def differentiate(rows: slice) -> tuple[Sequence[Part], Sequence[Tensor | None]]:
            graph = ctx.kept.pop(rows.start, None) or _differentiable(ctx, rows, tensors, needed)[1]
            pairs = zip(graph.parts, graph.leaves, strict=True)
            wanted = [(part, leaf) for part, leaf in pairs if leaf is not None and needed[part.source]]
            read = [(index, edge) for index in arrived if (edge := graph.outputs[index]) is not None]
            if not read:
                return [], []
            found = torch.autograd.grad(
                [edge for _, edge in read],
                [leaf for _, leaf in wanted],
                [arrived[index][rows] for index, _ in read],
                allow_unused=True,
            )
            return [part for part, _ in wanted], found

        def add(found: tuple[Sequence[Part], Sequence[Tensor | None]]) -> None:
            for part, gradient in zip(*found, strict=True):
                part.add(totals, gradient)

        if arrived:
            in_turn(differentiate, ctx.blocks, ctx.device, add)
        return None, None, None, *totals


def _differentiable(
    ctx: _Context, rows: slice, tensors: Sequence[Tensor | None], needed: Sequence[bool]
) -> tuple[tuple[Tensor, ...], _Graph]:
    """What a block computes, and its graph."""
    parts, function = ctx.reading(rows)
    leaves = [part.of(tensors) for part in parts]
    leaves = [
        leaf if leaf is None else leaf.detach().requires_grad_(needed[part.source])
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    with torch.enable_grad(), ctx.precision():
        outputs = function(*leaves)
    edges = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]
    return outputs, _Graph(parts, leaves, edges)


def rows_read(neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Of a block's neighbours [n, K], the rows that are read, each once [M], and each one's place among them [n, K]."""
    near, place = neighbors.unique(return_inverse=True)
    return near.clamp(min=0), place.to(neighbors.dtype).masked_fill(neighbors == MISSING, MISSING)


def present_precision(device: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """The autocast of the moment, to be entered in other threads and in a backward. Without its cache, which would keep
    the cast weights of every block."""
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)

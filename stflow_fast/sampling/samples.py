"""Samples: whole, or a block of spots at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..threads import blocks_of

EXPRESSION_BYTES = 2**26
"""Of a block of spots, as wide as the genes, of a sample that is drawn by blocks."""


@dataclass(frozen=True)
class Sample:
    """What :func:`sample` returns.

    Attributes:
        expression: [N, G] the sampled x_1, spots in the caller's order, on the CPU, in pinned memory where a GPU
            sampled it; with ``draws`` the mean of so many samples.
        nfe: denoiser calls made.
        trajectory: [nfe, N, G] the target predicted by each call, if asked for.
        std: [N, G] standard deviation of x_1 by the model's observation model, with ``draws``.
        draws: [R, N, G] of x_1 by the model's observation model, if asked for.
    """

    expression: Tensor
    nfe: int
    trajectory: Tensor | None = None
    std: Tensor | None = None
    draws: Tensor | None = None


@dataclass(frozen=True)
class BlockSample:
    """What :meth:`PreparedSlide.draw_blocks` returns: a sample whose expression is made as it is read.

    Attributes:
        shape: (N, G).
        nfe: denoiser calls made.
    """

    shape: tuple[int, int]
    nfe: int
    _read: Tensor  # [N, .] what the expression is made of
    _leave: Callable[[Tensor], Tensor]

    @property
    def expression(self) -> Tensor:
        """[N, G] on the CPU."""
        return torch.cat([part for _, part in self.blocks()]) if self.shape[0] else torch.empty(self.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of spots in the caller's order, and their expression [n, G] on the CPU. Each begins at a multiple of
        :data:`.ops.ROW_BLOCK`. Any thread may read them."""
        for rows in expression_blocks(self.shape):
            [part] = to_host(self._leave(self._read[rows]))
            yield rows, part


def expression_blocks(shape: tuple[int, int]) -> list[slice]:
    """Blocks of spots of an expression [N, G]: as many whole blocks of rows as :data:`EXPRESSION_BYTES` hold, at least
    one, so that each row is in the product that it would be in among all spots."""
    n, width = shape
    return blocks_of(n, max(1, EXPRESSION_BYTES // (4 * width * ops.ROW_BLOCK)) * ops.ROW_BLOCK)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """What is on the CPU itself; from a GPU in pinned memory, to which the driver copies at once, and which the next
    draw finds again where its result is not kept."""
    if not tensors[0].is_cuda:
        return [x.cpu() for x in tensors]
    staged = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
    torch.cuda.current_stream(tensors[0].device).record_event().synchronize()
    return staged

"""Patch features to the network's width, by blocks of spots: of a memory, of a disk, or streamed to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..graph import SpotGraph
from ..model import Denoiser
from ..threads import blocks_of, in_turn
from .inputs import Features

FEATURE_CHUNK = 16_384
"""Spots whose features are on the model's device at once."""


def embed_features(model: Denoiser, graph: SpotGraph, features: Features, where: str) -> Tensor:
    """``image_transform`` of the rows of the graph [N, d], some of them on the device at a time.

    Features are read in the order that they have, which a disk and a cache like, and what is made of them, a tenth as
    wide, goes to the graph's rows.

    Raises:
        InputError: features that are NaN or infinite in the model's type.
    """
    weight = model.image_transform.weight
    image = torch.empty(graph.n_spots, model.config.hidden_dim, dtype=weight.dtype, device=weight.device)
    row_of = torch.empty_like(graph.order)
    row_of[graph.order] = torch.arange(graph.n_spots, device=row_of.device)
    broken = []

    def embed(rows: slice, part: Tensor) -> None:
        part = part.to(weight)
        if not part.sum().isfinite():  # a finite sum, an eighth of the time, has nothing in it that is not
            broken.append(int((~part.isfinite()).any(dim=1).sum()))
        image[row_of[rows]] = model.image_transform(part).to(image.dtype)

    if weight.is_cuda and not (isinstance(features, Tensor) and features.is_cuda):
        for rows, part in _streamed(features, weight.device):
            embed(rows, part)
    else:
        _embed_in_turn(embed, features, weight.device)
    if sum(broken):
        found = f"{sum(broken)} of {graph.n_spots} spots are NaN or infinite"
        raise InputError(f"{where}features: {found}; remove them or embed them again")
    return image


def _embed_in_turn(embed: Callable[[slice, Tensor], None], features: Features, device: torch.device) -> None:
    """``embed`` of blocks with the same bounds, wherever the features lie. Those on a disk are read by larger pieces of
    whole chunks."""
    size = ops.ROW_BLOCK if device.type == "cpu" else FEATURE_CHUNK
    for first, held in _pieces(features, size):

        def embed_block(rows: slice, first: int = first, held: Tensor = held) -> None:
            embed(slice(first + rows.start, first + rows.stop), held[rows].contiguous())

        in_turn(embed_block, blocks_of(len(held), size), device)


def _pieces(features: Features, size: int) -> Iterator[tuple[int, Tensor]]:
    """Where each piece begins, and its rows until the next is asked for: all of one memory, which is then warm."""
    if isinstance(features, Tensor):
        yield 0, features
        return
    buffer = np.empty((0, features.columns), dtype=np.float32)
    for piece in features.blocks(size):
        n = piece.stop - piece.start
        buffer = buffer if len(buffer) >= n else np.empty((n, features.columns), dtype=np.float32)
        yield piece.start, torch.from_numpy(features.read_into(buffer[:n], piece.start))


def _streamed(features: Features, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of spots, and their features on a GPU: they go from the host through two pinned buffers in turn, so that
    one is filled while the other is copied."""
    n, columns = features.shape
    size = (min(FEATURE_CHUNK, n), columns)
    dtype = features.dtype if isinstance(features, Tensor) else torch.float32
    buffers = [torch.empty(size, dtype=dtype, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]
    for index, chunk in enumerate(blocks_of(n, FEATURE_CHUNK)):
        copied[index % 2].synchronize()
        staged = buffers[index % 2][: chunk.stop - chunk.start]
        if isinstance(features, Tensor):
            staged.copy_(features[chunk])
        else:
            features.read_into(staged.numpy(), chunk.start)
        part = staged.to(device, non_blocking=True)
        copied[index % 2].record()
        yield chunk, part

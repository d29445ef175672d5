"""Dropout whose mask is a function of (seed, slide, spot, stream, channel) and of nothing else.

A mask drawn from a running generator changes with packing, spot order and block size, and has to be stored for a
recomputed backward. A counter-based one (a hash, as in Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") does neither.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.conventions import GOLDEN, MULTIPLIER_1, MULTIPLIER_2, dropout_threshold

MASK_PIECE = 2**18
"""Elements of a mask that are made at a time. Milliseconds for 4 million, one thread: 5.97 by 2**15, 4.72 by 2**17,
4.11 by 2**18, 3.88 by 2**20, and 29.4 as a whole."""


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def hash32(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer (Wellons' ``lowbias32``) on int32 tensors, wrapping."""
    x = (x ^ _logical_shift(x, 16)) * MULTIPLIER_1
    x = (x ^ _logical_shift(x, 15)) * MULTIPLIER_2
    return x ^ _logical_shift(x, 16)


def combine(key: Tensor, value: Tensor) -> Tensor:
    """Key [N] int32 mixed with a value broadcastable to it (int32)."""
    return hash32(hash32(key) ^ (value * GOLDEN))


@dataclass(frozen=True)
class DropoutKeys:
    """One int32 key per spot; :meth:`stream` derives independent keys for a place in the network."""

    keys: Tensor

    @classmethod
    def for_spots(cls, slide_seed: Tensor, slide_of: Tensor, spot_id: Tensor) -> DropoutKeys:
        """Keys of spots from the seed of their slide ([S] int64), their slide [N] and their index in it [N]."""
        seed = slide_seed.to(slide_of.device)
        low, high = (seed & 0x7FFFFFFF).to(torch.int32), (seed >> 31).to(torch.int32)
        return cls(combine(combine(low, high)[slide_of], spot_id.to(torch.int32)))

    def stream(self, index: int) -> DropoutKeys:
        return DropoutKeys(combine(self.keys, torch.full_like(self.keys, index)))

    def layers(self, count: int) -> list[DropoutKeys]:
        """Keys of the network's layers, those of the streams -1, -2, ..., made together."""
        index = torch.arange(-1, -1 - count, -1, dtype=torch.int32, device=self.keys.device)
        return list(map(DropoutKeys, combine(self.keys, index.unsqueeze(1)).unbind()))

    def rows(self, start: int, stop: int) -> DropoutKeys:
        return DropoutKeys(self.keys[start:stop])

    def mask(self, shape: torch.Size, p: float, dtype: torch.dtype) -> Tensor:
        """Mask of ``shape`` [n, ...]: 0 with probability p, else 1 / (1 - p); row n depends on key n alone.

        Spots with what lies between, and channels, are mixed already, so half a mixer suffices for each element. The
        comparison reads the high bits, which the last product fills. In pieces that stay in a core's cache, in two
        buffers: tensors of the mask's size are fresh pages on a CPU, which took seven times as long. Numbers, not
        booleans: a product with booleans converts them first, which took three times as long.
        """
        between = torch.arange(math.prod(shape[1:-1]), dtype=torch.int32, device=self.keys.device)
        rows = combine(self.keys.unsqueeze(-1), between).view(-1, 1)
        column = hash32(torch.arange(shape[-1], dtype=torch.int32, device=self.keys.device) + 1)
        mask = torch.empty(len(rows), shape[-1], dtype=dtype, device=self.keys.device)
        step = max(1, MASK_PIECE // max(1, shape[-1]))
        buffers = rows.new_empty(2, min(step, len(rows)), shape[-1])
        for start in range(0, len(rows), step):
            piece = rows[start : start + step]
            mixed, shifted = buffers[:, : len(piece)]
            torch.bitwise_xor(piece, column, out=mixed).mul_(MULTIPLIER_1)
            torch.bitwise_right_shift(mixed, 15, out=shifted)
            mixed.bitwise_xor_(shifted).mul_(MULTIPLIER_2)
            torch.ge(mixed, dropout_threshold(p), out=mask[start : start + step]).mul_(1.0 / (1.0 - p))
        return mask.view(shape)


def dropout(x: Tensor, p: float, keys: DropoutKeys | None, stream: int) -> Tensor:
    """Inverted dropout of x [n, ...]: zero with probability p, else scaled by 1 / (1 - p); x itself without keys."""
    if keys is None or p == 0.0:
        return x
    return x * keys.stream(stream).mask(x.shape, p, x.dtype)

"""What one product reads of a spot: [LayerNorm(tokens) | x | 0] of ``joined_norm`` in ``stflow_fast/ops/reference.py``.

    tokens [N, d], x [N, G]  ->  [N, columns], in the type of the product; for inference, without a gradient

In plain torch that is a LayerNorm in float32 (1.5 ms of a million spots on an H200, six times what its bytes take), two
casts, and the gene terms added afterwards to what the product wrote (3.2 ms): 79 of the 361 ms of a sample.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import LAYERNORM_EPS
from .launch import Launch, architecture, check_device, check_tensors, device_scope, launch_of, precision_of
from .tiles import centre, settle_keys

PART = tl.constexpr(64)
"""Columns of x at a time."""


class JoinedShape(NamedTuple):
    """All that is known of a launch when its kernel is compiled."""

    rows: int
    d: int
    d_pad: int
    genes: int
    columns: int
    eps: float = LAYERNORM_EPS


@functools.cache
def joined_shape(arch: int, precision: str, d: int, genes: int, columns: int) -> tuple[JoinedShape, Launch]:
    """What the kernel is compiled for, and how it is launched on an architecture."""
    d_pad = triton.next_power_of_2(d)
    launch = launch_of("joined_norm", arch, precision, d_pad)
    return JoinedShape(launch.rows, d, d_pad, genes, columns), launch


@triton.jit(do_not_specialize=["n"])
def joined_norm_kernel(tokens, gain, shift, x, joined, n, S: tl.constexpr):
    i_row = (tl.program_id(0) * S.rows + tl.arange(0, S.rows)).to(tl.int64)
    i_d = tl.arange(0, S.d_pad)
    m_row, m_d = i_row < n, i_d < S.d
    m_tokens = m_row[:, None] & m_d[None, :]
    b_tokens = tl.load(tokens + i_row[:, None] * S.d + i_d[None, :], mask=m_tokens, other=0.0).to(tl.float32)
    b_centred, b_rstd = centre(b_tokens, m_d, tl.constexpr(S.d), tl.constexpr(S.eps))
    b_gain = tl.load(gain + i_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(shift + i_d, mask=m_d, other=0.0).to(tl.float32)
    b_normed = b_centred * b_rstd[:, None] * b_gain[None, :] + b_shift[None, :]
    row = joined + i_row[:, None] * S.columns
    tl.store(row + i_d[None, :], b_normed, mask=m_tokens)
    for i_part in range(0, S.columns - S.d, PART):
        i_x = i_part + tl.arange(0, PART)
        m_x = m_row[:, None] & (i_x < S.genes)[None, :]
        b_x = tl.load(x + i_row[:, None] * S.genes + i_x[None, :], mask=m_x, other=0.0)
        tl.store(row + S.d + i_x[None, :], b_x, mask=m_row[:, None] & (i_x < S.columns - S.d)[None, :])


def joined_norm(tokens: Tensor, affine: tuple[Tensor, Tensor], x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[N, columns] in ``dtype``: tokens [N, d] behind their LayerNorm, x [N, G], zeros.

    Args:
        affine: gain [d] and shift [d] of the LayerNorm.
        columns: d + G at least.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    check_device("tokens", tokens)
    if tokens.ndim != 2 or x.ndim != 2 or columns < tokens.shape[1] + x.shape[1]:
        raise InputError(
            f"tokens and x: must be matrices of at most {columns} columns together, "
            f"not {list(tokens.shape)} and {list(x.shape)}"
        )
    (n, d), genes = tokens.shape, x.shape[1]
    gain, shift = affine
    check_tensors({"tokens": (tokens, (n, d)), "gain": (gain, (d,)), "shift": (shift, (d,)), "x": (x, (n, genes))})
    joined = tokens.new_empty(n, columns, dtype=dtype)
    if n:
        shape, launch = joined_shape(architecture(tokens.device), precision_of(dtype), d, genes, columns)
        with device_scope(tokens):
            joined_norm_kernel[(triton.cdiv(n, shape.rows),)](
                tokens, gain, shift, x, joined, n, shape, **launch.options
            )
    return joined


settle_keys(globals())

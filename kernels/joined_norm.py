"""What one product reads of a spot: [LayerNorm(tokens) | x | 0] of ``joined_norm`` in ``stflow_fast/ops/reference.py``.

    tokens [N, d], x [N, G]  ->  [N, columns], in the type of the product

In plain torch that is a LayerNorm in float32 (1.5 ms of a million spots on an H200, six times what its bytes take), two
casts, and the gene terms added afterwards to what the product wrote (3.2 ms): 79 of the 361 ms of a sample. Gain and
shift of the LayerNorm are folded into the weights of the product. The backward makes the LayerNorm again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import LAYERNORM_EPS
from .launch import Launch, architecture, check_device, check_tensors, device_scope, launch_of, precision_of
from .tiles import centre, centre_backward, settle_keys

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


def joined_shape(arch: int, precision: str, d: int, genes: int, columns: int) -> tuple[JoinedShape, Launch]:
    """What the kernels are compiled for, and how they are launched on an architecture."""
    d_pad = triton.next_power_of_2(d)
    launch = launch_of("joined_norm", arch, precision, d_pad)
    return JoinedShape(launch.rows, d, d_pad, genes, columns), launch


@triton.jit
def token_tile(tokens, n, S: tl.constexpr):
    """Rows of a tile and places [rows, d] of their tokens, which exist, the centred tokens and their 1 / deviation."""
    i_row = (tl.program_id(0) * S.rows + tl.arange(0, S.rows)).to(tl.int64)
    i_d = tl.arange(0, S.d_pad)
    m_row, m_d = i_row < n, i_d < S.d
    m_tokens = m_row[:, None] & m_d[None, :]
    i_tokens = i_row[:, None] * S.d + i_d[None, :]
    b_tokens = tl.load(tokens + i_tokens, mask=m_tokens, other=0.0).to(tl.float32)
    b_centred, b_rstd = centre(b_tokens, m_d, tl.constexpr(S.d), tl.constexpr(S.eps))
    return i_row, m_row, i_d, i_tokens, m_tokens, b_centred, b_rstd


@triton.jit(do_not_specialize=["n"])
def joined_norm_fwd_kernel(tokens, x, joined, n, S: tl.constexpr):
    i_row, m_row, i_d, _, m_tokens, b_centred, b_rstd = token_tile(tokens, n, S)
    row = joined + i_row[:, None] * S.columns
    tl.store(row + i_d[None, :], b_centred * b_rstd[:, None], mask=m_tokens)
    for i_part in range(0, S.columns - S.d, PART):
        i_x = i_part + tl.arange(0, PART)
        m_x = m_row[:, None] & (i_x < S.genes)[None, :]
        b_x = tl.load(x + i_row[:, None] * S.genes + i_x[None, :], mask=m_x, other=0.0)
        tl.store(row + S.d + i_x[None, :], b_x, mask=m_row[:, None] & (i_x < S.columns - S.d)[None, :])


@triton.jit(do_not_specialize=["n"])
def joined_norm_bwd_kernel(grad_joined, tokens, grad_tokens, grad_x, n, S: tl.constexpr):
    i_row, m_row, i_d, i_tokens, m_tokens, b_centred, b_rstd = token_tile(tokens, n, S)
    row = grad_joined + i_row[:, None] * S.columns
    b_grad = tl.load(row + i_d[None, :], mask=m_tokens, other=0.0).to(tl.float32)
    b_grad = centre_backward(b_centred, b_rstd, b_grad, tl.constexpr(S.d))
    tl.store(grad_tokens + i_tokens, b_grad, mask=m_tokens)
    for i_part in range(0, S.genes, PART):
        i_x = i_part + tl.arange(0, PART)
        m_x = m_row[:, None] & (i_x < S.genes)[None, :]
        b_x = tl.load(row + S.d + i_x[None, :], mask=m_x, other=0.0)
        tl.store(grad_x + i_row[:, None] * S.genes + i_x[None, :], b_x, mask=m_x)


def joined_norm(tokens: Tensor, x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[N, columns] in ``dtype``: tokens [N, d] behind their LayerNorm, x [N, G], zeros; differentiable in both.

    Args:
        columns: d + G at least.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    joined: Tensor = torch.ops.stflow_fast.joined_norm(tokens, x, columns, dtype)
    return joined


def _forward(tokens: Tensor, x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    check_device("tokens", tokens)
    joined = _fake(tokens, x, columns, dtype)
    if len(tokens):
        shape, launch = _shape_of(joined, tokens, x.shape[1])
        with device_scope(tokens):
            joined_norm_fwd_kernel[(triton.cdiv(len(tokens), shape.rows),)](
                tokens, x, joined, len(tokens), shape, **launch.options
            )
    return joined


def _shape_of(joined: Tensor, tokens: Tensor, genes: int) -> tuple[JoinedShape, Launch]:
    sizes = tokens.shape[1], genes, joined.shape[1]
    return joined_shape(architecture(tokens.device), precision_of(joined.dtype), *sizes)


def _fake(tokens: Tensor, x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    if tokens.ndim != 2 or x.ndim != 2 or columns < tokens.shape[1] + x.shape[1]:
        raise InputError(
            f"tokens and x: must be matrices of at most {columns} columns together, "
            f"not {list(tokens.shape)} and {list(x.shape)}"
        )
    n = tokens.shape[0]  # len() would compile for one N alone
    check_tensors({"tokens": (tokens, tuple(tokens.shape)), "x": (x, (n, x.shape[1]))})
    precision_of(dtype)
    return tokens.new_empty(n, columns, dtype=dtype)


def _backward(grad_joined: Tensor, tokens: Tensor, genes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of tokens, and of x, which has ``genes`` columns and is of type ``dtype``."""
    grad_joined = grad_joined.contiguous()
    grad_tokens, grad_x = _backward_fake(grad_joined, tokens, genes, dtype)
    if len(tokens):
        shape, launch = _shape_of(grad_joined, tokens, genes)
        with device_scope(tokens):
            joined_norm_bwd_kernel[(triton.cdiv(len(tokens), shape.rows),)](
                grad_joined, tokens, grad_tokens, grad_x, len(tokens), shape, **launch.options
            )
    return grad_tokens, grad_x


def _backward_fake(grad_joined: Tensor, tokens: Tensor, genes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), tokens.new_empty(tokens.shape[0], genes, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, x, *_ = inputs
    ctx.save_for_backward(tokens)
    ctx.of_x = (x.shape[1], x.dtype)


def _differentiate(ctx: Any, grad_joined: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.stflow_fast.joined_norm_backward(grad_joined, *ctx.saved_tensors, *ctx.of_x), None, None


_LIBRARY = torch.library.Library("stflow_fast", "FRAGMENT")
_LIBRARY.define("joined_norm(Tensor tokens, Tensor x, int columns, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "joined_norm_backward(Tensor grad_joined, Tensor tokens, int genes, ScalarType dtype) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("joined_norm", _forward, _device)
    _LIBRARY.impl("joined_norm_backward", _backward, _device)
torch.library.register_fake("stflow_fast::joined_norm", _fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::joined_norm_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("stflow_fast::joined_norm", _differentiate, setup_context=_setup_context, lib=_LIBRARY)

settle_keys(globals())

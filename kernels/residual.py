"""tokens + dropout(update), with the same in the type of the product that reads it next.

    tokens [N, d], update [N, d], keys [N] int32  ->  sum [N, d] in the type of the tokens, and cast to another one

What it computes is ``residual`` of ``stflow_fast/ops/reference.py``. In plain torch the addition, the cast and, in
training, the dropout are passes of their own: 25 of the 192 ms of a sample of a million spots on an H200. The gradient
of a sum is no kernel: that of the tokens is what arrives, and that of the update the dropout of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import dropout_threshold
from .dropout import dropout
from .launch import (
    Launch,
    architecture,
    check_device,
    check_probability,
    check_tensors,
    device_scope,
    launch_of,
    precision_of,
)
from .tiles import combine, dropout_factor, settle_keys

COLUMNS = 128
"""Of a tile."""


class ResidualShape(NamedTuple):
    """All that is known of a launch when its kernel is compiled."""

    rows: int
    d: int
    casts: bool
    dropout: float
    threshold: int
    scale: float
    columns: int = COLUMNS


def residual_shape(arch: int, precision: str, d: int, casts: bool, p: float) -> tuple[ResidualShape, Launch]:
    """What the kernel is compiled for, and how it is launched on an architecture; ``precision`` of the cast."""
    launch = launch_of("residual", arch, precision)
    return ResidualShape(launch.rows, d, casts, p, dropout_threshold(p), 1.0 / (1.0 - p)), launch


@triton.jit(do_not_specialize=["n", "stream"])
def residual_kernel(tokens, update, keys, total, cast, n, stream, S: tl.constexpr):
    i_row = (tl.program_id(0) * S.rows + tl.arange(0, S.rows)).to(tl.int64)
    i_d = tl.program_id(1) * S.columns + tl.arange(0, S.columns)
    m_row = i_row < n
    i_place, m_place = i_row[:, None] * S.d + i_d[None, :], m_row[:, None] & (i_d < S.d)[None, :]
    b_update = tl.load(update + i_place, mask=m_place, other=0.0).to(tl.float32)
    if S.dropout > 0:
        i_key = combine(combine(tl.load(keys + i_row, mask=m_row, other=0), stream), 0)
        b_update = b_update * dropout_factor(
            i_key[:, None], i_d[None, :], tl.constexpr(S.threshold), tl.constexpr(S.scale)
        )
    b_sum = tl.load(tokens + i_place, mask=m_place, other=0.0).to(tl.float32) + b_update
    tl.store(total + i_place, b_sum, mask=m_place)
    if S.casts:
        tl.store(cast + i_place, b_sum, mask=m_place)


def residual(
    tokens: Tensor, update: Tensor, keys: Tensor | None, dtype: torch.dtype, p: float, stream: int
) -> tuple[Tensor, Tensor]:
    """tokens [N, d] + dropout(update [N, d]), and that in ``dtype``; differentiable in both.

    Args:
        keys: [N] int32 of the spots; None for no dropout.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    if keys is None or p == 0:  # either of both is no dropout, and one kernel is compiled for it
        keys, p = None, 0.0
    total, cast = torch.ops.stflow_fast.residual(tokens, update, keys, dtype, p, stream)
    return total, total if dtype == tokens.dtype else cast


def residual_(tokens: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`residual` without dropout or gradient, written over ``tokens``; returns the cast."""
    cast = _add(tokens, update, None, tokens, dtype, 0.0, 0)
    if not tokens.is_inference():  # of which torch counts no versions
        torch.autograd.graph.increment_version(tokens)
    return cast


def _add(
    tokens: Tensor, update: Tensor, keys: Tensor | None, total: Tensor, dtype: torch.dtype, p: float, stream: int
) -> Tensor:
    """Writes the sum to ``total``, and returns it in ``dtype``."""
    check_device("tokens", tokens)
    _check(tokens, update, keys, p)
    casts, (n, d) = dtype != tokens.dtype, tokens.shape
    cast = torch.empty_like(tokens, dtype=dtype) if casts else total
    if n and d:
        shape, launch = residual_shape(architecture(tokens.device), precision_of(dtype), d, casts, p)
        with device_scope(tokens):
            residual_kernel[(triton.cdiv(n, shape.rows), triton.cdiv(d, COLUMNS))](
                tokens, update, keys, total, cast, n, stream, shape, **launch.options
            )
    return cast


def _check(tokens: Tensor, update: Tensor, keys: Tensor | None, p: float) -> None:
    if tokens.ndim != 2:
        raise InputError(f"tokens: must have shape [N, d], not {list(tokens.shape)}")
    check_probability("p", p)
    expected = {"tokens": (tokens, tuple(tokens.shape)), "update": (update, tuple(tokens.shape))}
    if p > 0:
        if keys is None:
            raise InputError("keys: are needed with dropout")
        expected["keys"] = (keys, tuple(tokens.shape[:1]))
    check_tensors(expected, keys=torch.int32)


def _forward(
    tokens: Tensor, update: Tensor, keys: Tensor | None, dtype: torch.dtype, p: float, stream: int
) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(tokens)
    cast = _add(tokens, update, keys, total, dtype, p, stream)
    return total, tokens.new_empty(0) if cast is total else cast  # an operator may not return one memory twice


def _fake(
    tokens: Tensor, update: Tensor, keys: Tensor | None, dtype: torch.dtype, p: float, stream: int
) -> tuple[Tensor, Tensor]:
    _check(tokens, update, keys, p)
    cast = tokens.new_empty(0) if dtype == tokens.dtype else torch.empty_like(tokens, dtype=dtype)
    return torch.empty_like(tokens), cast


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, update, keys, dtype, p, stream = inputs
    ctx.save_for_backward(keys)
    ctx.settings = (dtype != tokens.dtype, update.dtype, p, stream)


def _differentiate(ctx: Any, grad_total: Tensor, grad_cast: Tensor) -> tuple[Tensor | None, ...]:
    (keys,), (casts, update, p, stream) = ctx.saved_tensors, ctx.settings
    grad = grad_total + grad_cast if casts else grad_total
    dropped = dropout(grad, keys, p, stream) if p > 0 else grad
    return grad, dropped.to(update), None, None, None, None


_LIBRARY = torch.library.Library("stflow_fast", "FRAGMENT")
_LIBRARY.define(
    "residual(Tensor tokens, Tensor update, Tensor? keys, ScalarType dtype, float p, int stream) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("residual", _forward, _device)
torch.library.register_fake("stflow_fast::residual", _fake, lib=_LIBRARY)
torch.library.register_autograd("stflow_fast::residual", _differentiate, setup_context=_setup_context, lib=_LIBRARY)

settle_keys(globals())

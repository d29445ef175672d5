"""Dropout whose mask is a hash of spot, stream and channel: ``dropout`` of ``stflow_fast/ops/dropout.py``.

    x [N, .], keys [N] int32  ->  [N, .], zero with probability p, else scaled by 1 / (1 - p)

In plain torch the hash alone is a dozen passes over int32 tensors of the size of x; here it is none. The gradient is
the same function of the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import dropout_threshold
from .launch import check_device, check_probability, check_tensors, device_scope, launch_of, on_device
from .tiles import combine, dropout_factor, settle_keys


@triton.jit(do_not_specialize=["n", "stream"])
def dropout_kernel(
    x, keys, out, n, stream, COLUMNS: tl.constexpr, ROWS: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr
):
    i_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    i_column = tl.program_id(1) * 128 + tl.arange(0, 128)
    m_row = i_row < n
    m_x = m_row[:, None] & (i_column < COLUMNS)[None, :]
    i_key = combine(combine(tl.load(keys + i_row, mask=m_row, other=0), stream), 0)
    b_factor = dropout_factor(i_key[:, None], i_column[None, :], THRESHOLD, SCALE)  # [ROWS, 128]
    i_x = i_row[:, None] * COLUMNS + i_column[None, :]
    b_x = tl.load(x + i_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(out + i_x, b_x * b_factor, mask=m_x)


def dropout(x: Tensor, keys: Tensor, p: float, stream: int) -> Tensor:
    """Inverted dropout of x [N, .] in its type, by keys [N] int32; differentiable in x.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    dropped: Tensor = torch.ops.stflow_fast.dropout(x.contiguous(), keys, p, stream)
    return dropped


def _forward(x: Tensor, keys: Tensor, p: float, stream: int) -> Tensor:
    check_device("x", x)
    out = _fake(x, keys, p, stream)
    if x.numel():
        n, columns = x.shape
        launch = launch_of("dropout", *on_device(x))
        grid = (triton.cdiv(n, launch.rows), triton.cdiv(columns, 128))
        with device_scope(x):
            dropout_kernel[grid](
                x, keys, out, n, stream, columns, launch.rows, dropout_threshold(p), 1.0 / (1.0 - p), **launch.options
            )
    return out


def _fake(x: Tensor, keys: Tensor, p: float, stream: int) -> Tensor:
    if x.ndim != 2:
        raise InputError(f"x: must have shape [N, C], not {list(x.shape)}")
    check_probability("p", p)
    check_tensors({"x": (x, tuple(x.shape)), "keys": (keys, tuple(x.shape[:1]))}, keys=torch.int32)
    return torch.empty_like(x)


_LIBRARY = torch.library.Library("stflow_fast", "FRAGMENT")
_LIBRARY.define("dropout(Tensor x, Tensor keys, float p, int stream) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("dropout", _forward, _device)
torch.library.register_fake("stflow_fast::dropout", _fake, lib=_LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.drawn = inputs[2:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (keys,) = ctx.saved_tensors
    return torch.ops.stflow_fast.dropout(grad.contiguous(), keys, *ctx.drawn), None, None, None


torch.library.register_autograd("stflow_fast::dropout", _differentiate, setup_context=_setup_context, lib=_LIBRARY)

settle_keys(globals())

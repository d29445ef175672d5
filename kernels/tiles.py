"""Tile helpers that kernels share: gates, LayerNorm, dropout, matrix products.

Their constants are given as ``tl.constexpr(S.z)``: Triton 3.6 takes a bare attribute of a constant for a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import conventions
from .launch import INTERPRETED, WIDEST
from .versions import wgmma_from_registers_is_safe

MULTIPLIER_1 = tl.constexpr(conventions.MULTIPLIER_1)
MULTIPLIER_2 = tl.constexpr(conventions.MULTIPLIER_2)
GOLDEN = tl.constexpr(conventions.GOLDEN)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


def settle_keys(names: dict[str, object]) -> None:
    """The keys in Triton's cache of a file's kernels, ``names`` being its globals, in one order in every process.

    Triton up to 3.7 makes a kernel's key from what it knows by then of the functions that it calls: where another one
    was launched first, the same kernel has another key, and is compiled again.
    """
    for function in names.values():
        if isinstance(function, triton.JITFunction):
            hash(function)


def rounded_rows(arch: int, precision: str) -> int:
    """Left sides of fewer rows are rounded to tf32 before a product; 0 where nothing is. Of 64 rows and more on Hopper
    wgmma would read what was rounded from registers (``launch.py``)."""
    if precision != "tf32" or INTERPRETED:
        return 0
    return 64 if 90 <= arch < 100 and not wgmma_from_registers_is_safe() else WIDEST


@triton.jit
def matmul(b_x, b_y, b_acc, S: tl.constexpr, EXACT: tl.constexpr = False):
    """acc + x @ y in the launch's precision, accumulated in float32; in two halves where x has S.halved columns.

    EXACT: what plain torch does not multiply in tf32 either, sums over neighbours and products of four columns.
    """
    if b_x.shape[1] == S.halved:
        b_x0, b_x1 = halves_of_columns(b_x)
        b_y0, b_y1 = halves_of_columns(tl.trans(b_y))
        b_acc = matmul(b_x0, tl.trans(b_y0), b_acc, S, EXACT)
        return matmul(b_x1, tl.trans(b_y1), b_acc, S, EXACT)
    PRECISION: tl.constexpr = S.exact_precision if EXACT else S.dot_precision
    return dot(b_x.to(S.operand), b_y.to(S.operand), b_acc, PRECISION, S)


@triton.jit
def dot(b_x, b_y, b_acc, PRECISION: tl.constexpr, S: tl.constexpr):
    """acc + x @ y, by 16 rows each where x has S.batched rows: batches are what Triton has no wgmma for."""
    if PRECISION == "tf32" and S.rounds > 0 and b_x.dtype == tl.float32:
        b_y = nearest_tf32(b_y)
        if b_x.shape[0] < S.rounds or b_x.shape[0] == S.batched:
            b_x = nearest_tf32(b_x)
    if b_x.shape[0] == S.batched:
        BATCHES: tl.constexpr = b_x.shape[0] // 16
        b_x = tl.reshape(b_x, [BATCHES, 16, b_x.shape[1]])
        b_y = tl.broadcast_to(b_y[None, :, :], [BATCHES, b_y.shape[0], b_y.shape[1]])
        b_sum = tl.dot(b_x, b_y, tl.reshape(b_acc, [BATCHES, 16, b_acc.shape[1]]), input_precision=PRECISION)
        b_acc = tl.reshape(b_sum, [b_acc.shape[0], b_acc.shape[1]])
    else:
        b_acc = tl.dot(b_x, b_y, b_acc, input_precision=PRECISION)
    return b_acc


@triton.jit
def nearest_tf32(b_x):
    """Tensor cores cut float32 off to tf32: all of a product's terms are then too small, by 2^-11 on average, and their
    sum is (7e-4 in the forward on an H200, and up to 14 times plain torch's error in gradients)."""
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,f", [b_x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def halves_of_columns(b_x):
    """Even and odd columns."""
    return tl.split(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 2, 2]))


@triton.jit
def fast_tanh(b_x):
    """tanh.approx.f32: one special-function operation, absolute error 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [b_x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(b_x, FAST: tl.constexpr):
    if FAST:
        b_s = 0.5 * fast_tanh(0.5 * b_x) + 0.5
    else:
        b_s = 1.0 / (1.0 + tl.exp(-b_x))
    return b_s


@triton.jit
def gate(b_a, b_b, GATE: tl.constexpr, FAST: tl.constexpr):
    """silu(a) * b (SwiGLU); gelu and relu read a alone.

    FAST silu is h tanh(h) + h with h = a / 2: one special-function operation for two (ex2, rcp), and four
    instructions for five.
    """
    if GATE == "swiglu" and FAST:
        b_h = 0.5 * b_a
        b_z = (b_h * fast_tanh(b_h) + b_h) * b_b
    elif GATE == "swiglu":
        b_z = b_a * sigmoid(b_a, FAST) * b_b
    elif GATE == "gelu":
        b_z = 0.5 * b_a * (1.0 + tl.erf(b_a * SQRT_HALF))
    else:
        b_z = tl.maximum(b_a, 0.0)
    return b_z


@triton.jit
def gate_backward(b_a, b_b, b_dz, GATE: tl.constexpr, FAST: tl.constexpr):
    """Gradients of a and b from that of the gate; the second is of no meaning where b is not read."""
    if GATE == "swiglu":
        b_s = sigmoid(b_a, FAST)
        b_da = b_dz * b_b * b_s * (1.0 + b_a * (1.0 - b_s))
        b_db = b_dz * b_a * b_s
    elif GATE == "gelu":
        b_density = INVERSE_SQRT_2PI * tl.exp(-0.5 * b_a * b_a)
        b_da = b_dz * (0.5 * (1.0 + tl.erf(b_a * SQRT_HALF)) + b_a * b_density)
        b_db = b_da
    else:
        b_da = tl.where(b_a > 0.0, b_dz, 0.0)
        b_db = b_da
    return b_da, b_db


@triton.jit
def centre(b_z, m_z, COUNT: tl.constexpr, EPS: tl.constexpr):
    """LayerNorm of rows without its affine part, in two factors: z - mean, zero where not m_z, and 1 / deviation.

    The mean is taken off before the squares are summed: one subtraction more than the sum of squares, and no
    cancellation.
    """
    b_mean = tl.sum(b_z, 1) / COUNT
    b_centred = tl.where(m_z[None, :], b_z - b_mean[:, None], 0.0)
    return b_centred, tl.rsqrt(tl.sum(b_centred * b_centred, 1) / COUNT + EPS)


@triton.jit
def centre_backward(b_centred, b_rstd, b_dy, COUNT: tl.constexpr):
    """Gradient of what :func:`centre` read, from that of centred * rstd; dy is zero outside of the COUNT columns, the
    result is not."""
    b_mean = tl.sum(b_dy, 1) / COUNT
    b_along = tl.sum(b_dy * b_centred, 1) / COUNT * b_rstd * b_rstd
    return (b_dy - b_mean[:, None] - b_centred * b_along[:, None]) * b_rstd[:, None]


@triton.jit
def hash32(i_x):
    """``stflow_fast.ops.dropout.hash32``: a bijective mixer of int32, wrapping."""
    i_x = (i_x ^ ((i_x >> 16) & 0xFFFF)) * MULTIPLIER_1
    i_x = (i_x ^ ((i_x >> 15) & 0x1FFFF)) * MULTIPLIER_2
    return i_x ^ ((i_x >> 16) & 0xFFFF)


@triton.jit
def combine(i_key, i_value):
    """``stflow_fast.ops.dropout.combine``: the key of a place from the key of what holds it.

    Zero times the key makes an int32 tensor of a constant, whose product would not wrap.
    """
    return hash32(hash32(i_key) ^ ((i_value + 0 * i_key) * GOLDEN))


@triton.jit
def dropout_factor(i_row, i_column, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """SCALE where kept, 0 where dropped (``DropoutKeys.mask``). Row keys and column numbers broadcast."""
    i_mixed = (i_row ^ hash32(i_column + 1)) * MULTIPLIER_1
    i_mixed = (i_mixed ^ (i_mixed >> 15)) * MULTIPLIER_2
    return tl.where(i_mixed >= THRESHOLD, SCALE, 0.0)


settle_keys(globals())

"""The gene head of a layer behind its first product, for sampling: gelu, LayerNorm, the product with the weights of the
genes, and the sum over layers.

    pre [N, d], total [N, G]  ->  x = LayerNorm(gelu(pre)) @ weight^T + bias [N, G], and total + x in place

What it computes is ``gene_head`` of ``stflow_fast/ops/reference.py``. The sum over layers alone, in float32, moves five
times what x does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import LAYERNORM_EPS, MOST_HEAD_COLUMNS
from .gated_mlp import gate_tile
from .launch import (
    INTERPRETED,
    Launch,
    check_device,
    check_tensors,
    device_scope,
    element_size,
    launch_of,
    on_device,
)
from .tiles import matmul, rounded_rows, settle_keys

WEIGHT_BYTES = 32 * 1024
"""Of the genes' weights in a program at a time."""


@dataclass(frozen=True)
class HeadShape:
    """All that is known of a launch when its kernel is compiled; ``gate_tile`` and ``matmul`` name most of it."""

    rows: int
    z: int
    p: int
    z_pad: int
    genes: int
    part: int
    relu: bool
    operand: tl.dtype
    dot_precision: str
    exact_precision: str
    rounds: int
    fast: bool
    gate: str = "gelu"
    dropout: float = 0.0
    batched: int = 0
    halved: int = 0
    eps: float = LAYERNORM_EPS


def head_shape(arch: int, precision: str, d: int, genes: int, relu: bool) -> tuple[HeadShape, Launch]:
    """What the kernel is compiled for, and how it is launched on an architecture."""
    launch = launch_of("gene_head", arch, precision, _padded(d))
    return _head_shape(launch.rows, rounded_rows(arch, precision), precision, d, genes, relu), launch


@functools.cache
def _head_shape(rows: int, rounds: int, precision: str, d: int, genes: int, relu: bool) -> HeadShape:
    d_pad = _padded(d)
    part = max(16, min(triton.next_power_of_2(genes), 64, WEIGHT_BYTES // (element_size(precision) * d_pad)))
    operands = {} if INTERPRETED else {"bf16": tl.bfloat16, "fp16": tl.float16}
    of_products = "ieee" if precision == "ieee" else "tf32"
    return HeadShape(
        rows=rows,
        z=d,
        p=d,
        z_pad=d_pad,
        genes=genes,
        part=part,
        relu=relu,
        operand=operands.get(precision, tl.float32),
        dot_precision=of_products,
        exact_precision=of_products,
        rounds=rounds,
        fast=precision != "ieee" and not INTERPRETED,
    )


def _padded(d: int) -> int:
    return int(max(16, triton.next_power_of_2(d)))  # products want 16 columns at least


@triton.jit(do_not_specialize=["n"])
def gene_head_kernel(pre, gain, shift, weight, bias, x, total, n, S: tl.constexpr):
    i_row = (tl.program_id(0) * S.rows + tl.arange(0, S.rows)).to(tl.int64)
    i_z = tl.arange(0, S.z_pad)
    m_row, m_z = i_row < n, i_z < S.z
    _, _, b_centred, b_rstd, _ = gate_tile(pre, None, i_row, m_row, 0, S)
    b_gain = tl.load(gain + i_z, mask=m_z, other=0.0).to(tl.float32)
    b_shift = tl.load(shift + i_z, mask=m_z, other=0.0).to(tl.float32)
    b_hidden = b_centred * b_rstd[:, None] * b_gain[None, :] + b_shift[None, :]  # [rows, d]
    for i_part in range(0, S.genes, S.part):
        i_g = i_part + tl.arange(0, S.part)
        m_g = i_g < S.genes
        b_w = tl.load(weight + i_g[None, :] * S.z + i_z[:, None], mask=m_g[None, :] & m_z[:, None], other=0.0)
        b_x = matmul(b_hidden, b_w, tl.full([S.rows, S.part], 0.0, tl.float32), S)  # [rows, part]
        b_x += tl.load(bias + i_g, mask=m_g, other=0.0).to(tl.float32)[None, :]
        if S.relu:
            b_x = tl.maximum(b_x, 0.0)
        i_x, m_x = i_row[:, None] * S.genes + i_g[None, :], m_row[:, None] & m_g[None, :]
        tl.store(x + i_x, b_x, mask=m_x)
        tl.store(total + i_x, tl.load(total + i_x, mask=m_x, other=0.0).to(tl.float32) + b_x, mask=m_x)


def gene_head(
    pre: Tensor, affine: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor], total: Tensor, relu: bool
) -> Tensor:
    """x [N, G] of pre [N, d], in its type; added to ``total`` [N, G] in place. Without gradients.

    Args:
        affine: gain [d] and shift [d] of the LayerNorm.
        head: weight [G, d] and bias [G], in the type of pre.
        relu: whether negative expression is set to zero.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    check_device("pre", pre)
    (weight, bias), (gain, shift) = head, affine
    if pre.ndim != 2 or weight.ndim != 2 or pre.shape[1] > MOST_HEAD_COLUMNS:
        raise InputError(
            f"pre and weight: must be matrices of at most {MOST_HEAD_COLUMNS} columns, "
            f"not {list(pre.shape)} and {list(weight.shape)}"
        )
    (n, d), genes = pre.shape, len(weight)
    check_tensors(
        {
            "pre": (pre, (n, d)),
            "gain": (gain, (d,)),
            "shift": (shift, (d,)),
            "weight": (weight, (genes, d)),
            "bias": (bias, (genes,)),
            "total": (total, (n, genes)),
        },
        weight=pre.dtype,
        bias=pre.dtype,
    )
    x = pre.new_empty(n, genes)
    if n and genes:
        shape, launch = head_shape(*on_device(pre), d, genes, relu)
        with device_scope(pre):
            gene_head_kernel[(triton.cdiv(n, shape.rows),)](
                pre, gain, shift, weight, bias, x, total, n, shape, **launch.options
            )
    return x


settle_keys(globals())

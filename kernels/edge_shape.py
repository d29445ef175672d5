"""What an edge kernel is compiled for: sizes, precision, dropout and tile, in one constant argument."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from .conventions import LAYERNORM_EPS, Settings, Sizes, context_padding, dropout_threshold
from .launch import (
    INTERPRETED,
    SHARED_MEMORY,
    Launch,
    element_size,
    halves_of,
    launch_of,
)
from .tiles import rounded_rows
from .versions import wgmma_from_registers_is_safe


@dataclass(frozen=True)
class EdgeShape:
    """The constant. Fields, not properties: Triton's cache on disk tells two constants apart by their text.

    Attributes:
        rows: M, edges in a tile; ``spots`` whole spots fit into it where they must, ``keys`` keys are taken at a time
            by the key-owned backward, at least 16, else those whose arriving edges fill two tiles, and at most 32: the
            members of 64 would be the left side of a wgmma, in registers.
        z_parts: parts of the attention MLP's hidden vector, of ``z_pad`` columns, taken one after another.
        e_parts, e_part: programs of the key-owned backward that share the columns of a message, and columns of each.
        k, n_heads, e, z, p, pe, hp, d, dh: as in ``stflow_fast/ops/reference.py``; dh = d / H.
        width, used, context: columns of the terms, of the context without and with its padding.
        e_pad, z_pad, dh_pad, spots_pad: sides of tiles, powers of two.
        operand, dot_precision: how matrices multiply; ``exact_precision`` where one of them is of zeros and ones, and
            the other must come through as it is (in tf32 but for 2^-22); ``edge_operand`` those of the edge MLP,
            ``split`` in parts.
        batched: a left side of so many rows is multiplied in batches of 16, see :func:`batched_rows`. 0 elsewhere.
        halved: a product of this depth is taken in two halves: 64 in the backward of exact float32, whose kernels spill
            40 and 16 bytes less so at hidden_dim 128; at other depths they spill more. 0 elsewhere.
        rounds: operands in tf32 are rounded before a product; left sides only of fewer rows than these, or in batches.
            See ``tiles.rounded_rows``.
        fast: gates by tanh.approx.
        kept: edges are messages.
    """

    rows: int
    spots: int
    keys: int
    z_parts: int
    e_parts: int
    e_part: int
    k: int
    n_heads: int
    e: int
    z: int
    p: int
    pe: int
    hp: int
    d: int
    dh: int
    width: int
    used: int
    context: int
    e_pad: int
    z_pad: int
    dh_pad: int
    spots_pad: int
    edge_gate: str
    logit_gate: str
    operand: tl.dtype
    edge_operand: tl.dtype
    split: bool
    dot_precision: str
    exact_precision: str
    batched: int
    halved: int
    rounds: int
    fast: bool
    kept: bool
    dropout: bool
    p_mlp: float
    mlp_threshold: int
    mlp_scale: float
    p_attention: float
    attention_threshold: int
    attention_scale: float
    eps: float = LAYERNORM_EPS


def _padded(size: int) -> int:
    """Tiles have powers of two for sides, and matrix products at least 16."""
    side: int = max(16, triton.next_power_of_2(size))
    return side


WHOLE_SPOTS = ("edge_attention_fwd", "edge_attention_bwd_query")
"""Kernels whose tiles hold all edges of a spot."""


def part_of_z(kernel: str, arch: int, precision: str, rows: int, e_pad: int, z_pad: int) -> int:
    """Columns of the attention MLP's hidden vector that are taken at a time: a product holds so many of a head's matrix
    E x Z in shared memory, and the key-owned backward has accumulators of that size besides.

    Exact float32 multiplies without tensor cores: a thread has rows and columns of whole depth in its registers, and
    both sides are in shared memory. Parts of 16 columns are an eighth more instructions in the forward and a third more
    in the query-owned backward (16 edges, hidden_dim 128); whole vectors spill there 8 to 90 bytes, and kilobytes with
    more edges or columns. Of the key-owned backward, where every part is a program that makes its terms again, they
    spill nothing up to 128 columns of a message, but need 85 KiB then.
    """
    roomy = _is_roomy(arch)
    if precision == "ieee" and arch:  # the interpreter takes whole vectors, as most precisions do
        whole_up_to = {  # numbers of a tile of messages
            "edge_attention_fwd": 16 * 64,
            "edge_attention_bwd_query": 0,
            "edge_attention_bwd_key": 16 * (128 if roomy else 64),
            "edge_messages": 0,
        }
        return min(z_pad, 64 if rows * e_pad <= whole_up_to[kernel] else 16)
    most_bytes = (32 if roomy else 16) * 1024
    most = 64 if kernel == "edge_attention_bwd_key" else 128
    return max(16, min(z_pad, most, most_bytes // (element_size(precision) * e_pad)))


def _is_roomy(arch: int) -> bool:
    """Whether a multiprocessor of the newest listed architecture up to this has more than 128 KiB; the interpreter has
    no limit."""
    known = [listed for listed in SHARED_MEMORY if listed <= arch]
    return not known or SHARED_MEMORY[max(known)] > 128 * 1024


def part_of_e(arch: int, e_pad: int, z_part: int) -> int:
    """Columns of a message in a program of the key-owned backward, whose weight gradient stays in registers: 64 x 64 of
    it, and half as much before Hopper, or 100 to 350 bytes a thread spill (bf16, hidden_dim 256)."""
    if 80 <= arch < 90:
        return max(16, min(e_pad // 2, 2048 // z_part))
    return min(e_pad, 4096 // z_part)


def batched_rows(arch: int, precision: str, launch: Launch) -> int:
    """``EdgeShape.batched``: 64 rows and more on Hopper, whose wgmma would take them, may read them from registers, and
    is reported to reuse those too early (``launch.py``).

    From Triton 3.9 on 64 rows are taken whole by 4 warps: by counts with 5 to 40 % fewer instructions, fewer barriers
    and nothing more spilled in any kernel. Of other tiles one of these is more: 8 warps repeat accumulators, 2 have no
    wgmma, 128 rows spill (``benchmarks/results/triton_versions.md``). Nothing of this was timed.
    """
    if launch.rows < 64 or not 90 <= arch < 100 or precision == "ieee":
        return 0
    whole = launch.rows == 64 and launch.warps == 4 and wgmma_from_registers_is_safe()
    return 0 if whole else launch.rows


def columns_of(sizes: Sizes, settings: Settings) -> int:
    """Of the widest tile, by which the launch table tells launches apart."""
    z = sizes.hp // settings.n_heads // halves_of("logit_activation", settings.logit_activation)
    return _padded(max(sizes.e, z))


def edge_shape(
    kernel: str, arch: int, precision: str, sizes: Sizes, settings: Settings, launch: Launch | None = None
) -> tuple[EdgeShape, Launch]:
    """What a kernel is compiled for, and how it is launched on an architecture; by the table unless told."""
    launch = launch or launch_of(kernel, arch, precision, columns_of(sizes, settings))
    rows = triton.next_power_of_2(sizes.k) if kernel in WHOLE_SPOTS else 0
    if rows > launch.rows:
        few = launch.warps < 4  # of which a larger tile would spill kilobytes
        launch = launch._replace(rows=rows, warps=launch.warps * (rows // launch.rows if few else 1))
    return _edge_shape(kernel, arch, precision, sizes, settings, launch), launch


@functools.cache
def _edge_shape(kernel: str, arch: int, precision: str, sizes: Sizes, settings: Settings, launch: Launch) -> EdgeShape:
    k, e, hp, d = sizes
    n_heads, edge_gate, logit_gate, p_mlp, p_attention, kept = settings
    p = hp // n_heads
    z = p // halves_of("logit_activation", logit_gate)
    rows = launch.rows
    # The interpreter's bf16 arithmetic is wrong (triton #11584); there, every tile is float32.
    operands = {} if INTERPRETED else {"bf16": tl.bfloat16, "fp16": tl.float16}
    split = precision != "ieee" and not INTERPRETED
    z_pad = part_of_z(kernel, arch, precision, rows, _padded(e), _padded(z))
    e_part = part_of_e(arch, _padded(e), z_pad)
    z_parts, e_parts = triton.cdiv(z, z_pad), triton.cdiv(e, e_part)
    used = d + n_heads * (e + 1)
    return EdgeShape(
        rows=rows,
        spots=rows // k,
        keys=min(32, max(16, triton.next_power_of_2(max(1, 2 * rows // k)))),
        z_parts=z_parts,
        e_parts=e_parts,
        e_part=e_part,
        k=k,
        n_heads=n_heads,
        e=e,
        z=z,
        p=p,
        pe=e * halves_of("edge_activation", edge_gate),
        hp=hp,
        d=d,
        dh=d // n_heads,
        width=2 * hp + d,
        used=used,
        context=used + context_padding(used),
        e_pad=_padded(e),
        z_pad=z_pad,
        dh_pad=_padded(d // n_heads),
        spots_pad=_padded(rows // k),
        edge_gate=edge_gate,
        logit_gate=logit_gate,
        operand=operands.get(precision, tl.float32),
        edge_operand=tl.bfloat16 if split else tl.float32,
        split=split,
        dot_precision="ieee" if precision == "ieee" else "tf32",
        batched=batched_rows(arch, precision, launch),
        halved=64 if precision == "ieee" and "bwd" in kernel and not INTERPRETED else 0,
        exact_precision="tf32x3" if precision == "tf32" else "ieee",
        rounds=rounded_rows(arch, precision),
        fast=precision != "ieee" and not INTERPRETED,
        kept=kept,
        dropout=p_mlp > 0 or p_attention > 0,
        p_mlp=p_mlp,
        mlp_threshold=dropout_threshold(p_mlp),
        mlp_scale=1.0 / (1.0 - p_mlp),
        p_attention=p_attention,
        attention_threshold=dropout_threshold(p_attention),
        attention_scale=1.0 / (1.0 - p_attention),
    )


def shared_bytes(kernel: str, arch: int, precision: str, sizes: Sizes, settings: Settings) -> int:
    """Shared memory of a program, at most: an estimate from the tiles that its products read, which ``aot`` holds
    against what the compiler says."""
    shape, _ = edge_shape(kernel, arch, precision, sizes, settings)
    m, q, keys = shape.rows, shape.spots_pad, shape.keys
    e, z, dh = shape.e_pad, shape.z_pad, shape.dh_pad
    # Without tensor cores both sides of a product are read from there, and of wgmma in tf32 some are copied.
    wgmma = precision == "tf32" and arch >= 90
    of_query = m * max(z, e // 2) if precision == "ieee" or wgmma else 0
    of_forward = m * (e + dh) // 2 if wgmma else 0
    numbers = {
        "edge_attention_fwd": m * (e + z + dh) + e * z + of_forward,
        "edge_attention_bwd_query": (m + q) * (e + dh) + e * z + of_query,
        "edge_attention_bwd_key": 3 * e * z + m * (e + dh) // 2 + keys * (z + dh),
        "edge_messages": 16 * (2 * e + m),
    }
    return element_size(precision) * (numbers[kernel] + 4096)

"""What an edge kernel is compiled for: sizes, precision, dropout and tile, in one constant argument."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from .conventions import LAYERNORM_EPS, Settings, Sizes, context_padding, dropout_threshold
from .launch import INTERPRETED, Launch, launch_of


@dataclass(frozen=True)
class EdgeShape:
    """The constant. Fields, not properties: Triton's cache on disk tells two constants apart by their text.

    Attributes:
        rows: M, edges in a tile; ``spots`` whole spots fit into it where they must, ``keys`` keys are taken at a time
            by the key-owned backward, at least 16 and else those whose arriving edges fill two tiles.
        z_parts: parts of the attention MLP's hidden vector, of ``z_pad`` columns, taken one after another.
        e_parts, e_part: programs of the key-owned backward that share the columns of a message, and columns of each;
            ``key_programs`` is their number for a block of keys, by head, part of Z and part of E.
        k, n_heads, e, z, p, pe, hp, d, dh: as in ``stflow_fast/ops/reference.py``; dh = d / H.
        width, used, context: columns of the terms, of the context without and with its padding.
        e_pad, z_pad, dh_pad, spots_pad: sides of tiles, powers of two.
        operand, dot_precision: how matrices multiply; ``exact_precision`` where one of them is of zeros and ones, and
            the other must come through as it is; ``edge_operand`` those of the edge MLP, ``split`` in parts.
        fast: gates by tanh.approx.
        kept: edges are messages.
    """

    rows: int
    spots: int
    keys: int
    z_parts: int
    e_parts: int
    e_part: int
    key_programs: int
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
    return max(16, triton.next_power_of_2(size))


WHOLE_SPOTS = ("edge_attention_fwd", "edge_attention_bwd_query")
"""Kernels whose tiles hold all edges of a spot."""

LITTLE_SHARED_MEMORY = (86, 89, 120, 121)
"""Architectures with 99 KiB for a program; others have 163 or more."""


def part_of_z(kernel: str, arch: int, e_pad: int, z_pad: int, size: int) -> int:
    """Columns of the attention MLP's hidden vector that are taken at a time: a product holds so many of a head's matrix
    E x Z in shared memory, and the key-owned backward has accumulators of that size besides."""
    most_bytes = (16 if arch in LITTLE_SHARED_MEMORY else 32) * 1024
    most = 64 if kernel == "edge_attention_bwd_key" else 128
    return max(16, min(z_pad, most, most_bytes // (size * e_pad)))


def part_of_e(arch: int, e_pad: int, z_part: int) -> int:
    """Columns of a message in a program of the key-owned backward, whose weight gradient stays in registers: 64 x 64 of
    it, and half as much before Hopper, or 100 to 350 bytes a thread spill (bf16, hidden_dim 256)."""
    if 80 <= arch < 90:
        return max(16, min(e_pad // 2, 2048 // z_part))
    return min(e_pad, 4096 // z_part)


def edge_shape(
    kernel: str, arch: int, precision: str, sizes: Sizes, settings: Settings, launch: Launch | None = None
) -> tuple[EdgeShape, Launch]:
    """What a kernel is compiled for, and how it is launched on an architecture; by the table unless told."""
    z = sizes.hp // settings.n_heads // (2 if settings.logit_activation == "swiglu" else 1)
    launch = launch or launch_of(kernel, arch, precision, _padded(max(sizes.e, z)))
    return _edge_shape(kernel, arch, precision, sizes, settings, launch), launch


@functools.cache
def _edge_shape(kernel: str, arch: int, precision: str, sizes: Sizes, settings: Settings, launch: Launch) -> EdgeShape:
    k, e, hp, d = sizes
    n_heads, edge_gate, logit_gate, p_mlp, p_attention, kept = settings
    p = hp // n_heads
    edge_halves, logit_halves = (2 if gate == "swiglu" else 1 for gate in (edge_gate, logit_gate))
    z = p // logit_halves
    rows = max(launch.rows, triton.next_power_of_2(k)) if kernel in WHOLE_SPOTS else launch.rows
    # The interpreter's bf16 arithmetic is wrong (triton #11584); there, every tile is float32.
    operands = {} if INTERPRETED else {"bf16": tl.bfloat16, "fp16": tl.float16}
    split = precision != "ieee" and not INTERPRETED
    size = 2 if precision in ("bf16", "fp16") else 4
    z_pad = part_of_z(kernel, arch, _padded(e), _padded(z), size)
    e_part = part_of_e(arch, _padded(e), z_pad)
    z_parts, e_parts = triton.cdiv(z, z_pad), _padded(e) // e_part
    used = d + n_heads * (e + 1)
    return EdgeShape(
        rows=rows,
        spots=rows // k,
        keys=max(16, triton.next_power_of_2(max(1, 2 * rows // k))),
        z_parts=z_parts,
        e_parts=e_parts,
        e_part=e_part,
        key_programs=n_heads * z_parts * e_parts,
        k=k,
        n_heads=n_heads,
        e=e,
        z=z,
        p=p,
        pe=e * edge_halves,
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
        exact_precision="tf32x3" if precision == "tf32" else "ieee",
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


def most_shared_bytes(arch: int, precision: str, sizes: Sizes, settings: Settings) -> int:
    """Shared memory of a program of any edge kernel, at most: an estimate from the tiles that its products read, which
    ``aot`` holds against what the compiler says."""
    query, key = (
        edge_shape(kernel, arch, precision, sizes, settings)[0]
        for kernel in ("edge_attention_bwd_query", "edge_attention_bwd_key")
    )
    size = 2 if precision in ("bf16", "fp16") else 4
    of_query = (query.rows + query.spots_pad) * (query.e_pad + query.dh_pad) + query.e_pad * query.z_pad
    if precision == "ieee":  # without tensor cores, both sides of every product are read from there
        of_query += query.rows * max(query.z_pad, query.e_pad // 2)
    of_key = 3 * key.e_pad * key.z_pad + key.rows * (key.e_pad + key.dh_pad) // 2
    return size * max(of_query, of_key) + 8192

"""What an edge kernel is compiled for: sizes, precision, dropout and tile, in one constant argument."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from .conventions import LAYERNORM_EPS, context_padding, dropout_threshold
from .launch import INTERPRETED, Launch, launch_of


class Settings(NamedTuple):
    """What is not a tensor of the operation: the spec of its reference, dropout, and what ``edges`` holds."""

    n_heads: int
    edge_activation: str
    logit_activation: str
    p_mlp: float = 0.0
    p_attention: float = 0.0
    edges_are_messages: bool = False


class Sizes(NamedTuple):
    """Of the tensors: K, E, H * P and d."""

    k: int
    e: int
    hp: int
    d: int


@dataclass(frozen=True)
class EdgeShape:
    """The constant. Fields, not properties: Triton's cache on disk tells two constants apart by their text.

    Attributes:
        rows: M, edges in a tile; ``spots`` whole spots fit into it, ``keys`` keys are taken at a time by the
            key-owned backward, at least 16 and else those whose arriving edges fill two tiles.
        parts, e_part: programs of the key-owned backward that share the columns of a message, and columns of each.
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
    parts: int
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


def edge_shape(
    kernel: str, arch: int, precision: str, sizes: Sizes, settings: Settings, launch: Launch | None = None
) -> tuple[EdgeShape, Launch]:
    """What a kernel is compiled for, and how it is launched on an architecture; by the table unless told."""
    z = sizes.hp // settings.n_heads // (2 if settings.logit_activation == "swiglu" else 1)
    launch = launch or launch_of(kernel, arch, precision, _padded(max(sizes.e, z)))
    return _edge_shape(arch, precision, sizes, settings, launch), launch


@functools.cache
def _edge_shape(arch: int, precision: str, sizes: Sizes, settings: Settings, launch: Launch) -> EdgeShape:
    k, e, hp, d = sizes
    n_heads, edge_gate, logit_gate, p_mlp, p_attention, kept = settings
    p = hp // n_heads
    edge_halves, logit_halves = (2 if gate == "swiglu" else 1 for gate in (edge_gate, logit_gate))
    z = p // logit_halves
    rows = max(launch.rows, triton.next_power_of_2(k))
    # The interpreter's bf16 arithmetic is wrong (triton #11584); there, every tile is float32.
    operands = {} if INTERPRETED else {"bf16": tl.bfloat16, "fp16": tl.float16}
    split = precision != "ieee" and not INTERPRETED
    parts = 2 if 80 <= arch < 90 and _padded(e) > 16 else 1
    used = d + n_heads * (e + 1)
    return EdgeShape(
        rows=rows,
        spots=rows // k,
        keys=max(16, triton.next_power_of_2(2 * rows // k)),
        parts=parts,
        e_part=_padded(e) // parts,
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
        z_pad=_padded(z),
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

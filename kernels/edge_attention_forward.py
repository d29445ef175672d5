"""The forward of edge attention: context of every spot, and messages that are kept.

A program takes as many whole spots as fit into a tile of M edges, so K need not be a power of two. The edges are the
rows of its matrix products; what belongs together of a spot is one row of a segment matrix [Q, M], by which the softmax
is taken and with which both aggregations are matrix products. No tensor with an edge axis leaves the program.

The offsets of a neighbourhood enter projected (12 bytes an edge): frames hang on coordinates alone, need float64 for
their tie rules, and are made once per slide by ``edge_geometry``, not in every layer and flow step.

Letters and shapes as in ``edge_attention.py``, which launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import conventions
from .edge_tiles import (
    edge_factors,
    edge_mlp,
    load_rows,
    logit_part,
    logit_statistics,
    make_message,
    part_weights,
    segment_softmax,
    store_rows,
    tile_edges,
    tile_spots,
)
from .tiles import matmul, settle_keys

CONTEXT_ALIGNMENT = tl.constexpr(conventions.CONTEXT_ALIGNMENT)


@triton.jit(do_not_specialize=["n"])
def edge_attention_fwd_kernel(
    terms, neighbors, edges, edge, message_to_logit, logit, dropout_keys, context, n, S: tl.constexpr
):
    i_tile = tl.program_id(0)
    i_spot, i_edge, i_slot, i_near, m_e = tile_edges(neighbors, i_tile, n, S)
    i_c, i_d = tl.arange(0, S.e_pad), tl.arange(0, S.dh_pad)
    i_key = i_slot
    if S.dropout:
        i_key = tl.load(dropout_keys + i_spot)
    if S.kept:
        b_message = load_rows(edges, i_edge, tl.constexpr(S.e), i_c, i_c < S.e)
    else:
        b_inputs, b_wa, b_wb = edge_mlp(edges, edge, i_edge, m_e, S)
        b_message = make_message(b_inputs, b_wa, b_wb, i_key, i_slot, S)
    b_message = b_message.to(S.operand)  # [M, E]
    b_w = part_weights(logit, 0, S)
    b_bias = tl.load(logit + S.z).to(tl.float32)

    i_row, m_q, i_own, m_segment, m_members = tile_spots(i_tile, m_e, n, S)
    row = context + i_row * S.context
    for i_head in range(S.n_heads):
        _, _, b_z, _ = logit_part(
            terms, terms + S.hp, message_to_logit, b_message, i_own, m_members, i_near, i_key, i_slot, i_head, 0, S
        )
        _, _, b_along = logit_statistics(
            terms, terms + S.hp, message_to_logit, logit, b_message, b_z, b_w,
            i_own, m_members, i_near, i_key, i_slot, i_head, S,
        )  # fmt: skip
        b_logit_factor, b_attention_factor = edge_factors(i_key, i_slot, i_head, S)
        b_attention = segment_softmax((b_along + b_bias) * b_logit_factor, m_segment)
        b_attention = b_attention * b_attention_factor[None, :]
        b_values = load_rows(
            terms + 2 * S.hp, i_near, tl.constexpr(S.width), i_head * S.dh + i_d, i_d < S.dh
        )  # [M, d / H]
        b_values = matmul(b_attention, b_values, tl.full([S.spots_pad, S.dh_pad], 0.0, tl.float32), S, True)
        b_messages = matmul(b_attention, b_message, tl.full([S.spots_pad, S.e_pad], 0.0, tl.float32), S, True)
        store_rows(row + i_head * S.dh, i_d, b_values, m_q[:, None] & (i_d < S.dh)[None, :])
        store_rows(row + S.d + i_head * S.e, i_c, b_messages, m_q[:, None] & (i_c < S.e)[None, :])
        tl.store(row + S.d + S.n_heads * S.e + i_head, tl.sum(b_attention, 1), mask=m_q)
    i_pad = S.used + tl.arange(0, CONTEXT_ALIGNMENT)
    b_zero = tl.full([S.spots_pad, CONTEXT_ALIGNMENT], 0.0, tl.float32)
    store_rows(row, i_pad, b_zero, m_q[:, None] & (i_pad < S.context)[None, :])


@triton.jit(do_not_specialize=["n_edges"])
def edge_messages_kernel(geometry, edge, messages, n_edges, S: tl.constexpr):
    """Messages [N * K, E] of a layer, to be kept; without dropout."""
    i_edge = tl.program_id(0).to(tl.int64) * S.rows + tl.arange(0, S.rows)
    m_e = i_edge < n_edges
    i_c = tl.arange(0, S.e_pad)
    b_inputs, b_wa, b_wb = edge_mlp(geometry, edge, i_edge, m_e, S)
    b_message = make_message(b_inputs, b_wa, b_wb, i_edge, i_edge, S)
    store_rows(messages + i_edge * S.e, i_c, b_message, m_e[:, None] & (i_c < S.e)[None, :])


settle_keys(globals())

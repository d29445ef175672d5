"""Frame-averaged local attention from spots to context, forward and backward, in one kernel over edges.

What it computes is ``attend_block`` of ``stflow_fast/ops/reference.py``, whose header has the formulas; the shapes:

    terms [N, 2 * H * P + d] = [A | B | V], neighbors [N, K], edges [N, K, 3] or kept messages [N, K, E],
    edge [4, Pe], message_to_logit [E, H * P], logit [Z + 1]  ->  context [N, C]

A program takes as many whole spots as fit into a tile of M edges, so K need not be a power of two. The edges are the
rows of its matrix products; what belongs together of a spot is one row of a segment matrix [Q, M], by which the softmax
is taken and with which both aggregations are matrix products. No tensor with an edge axis leaves the program.

The offsets of a neighbourhood enter projected (12 bytes an edge): frames hang on coordinates alone, need float64 for
their tie rules, and are made once per slide by ``edge_geometry``, not in every layer and flow step.

Backward, in two kernels and without atomics, so that every run gives the same bits:

* query-owned: recomputes the forward of a tile, writes dA, the edge MLP's gradients, and for the second kernel the
  messages (as many bytes as A at K = 8) and five numbers per edge and head, freed with it.
* key-owned: a program of one head walks the edges that arrive at a block of keys (the transposed neighbour table),
  recomputes their pre-activations, and writes dB and dV; its part of the gradient of message_to_logit_h stays in its
  registers, for which an accumulator of all heads would be too large.

The attention MLP's hidden vector [M, Z] of a head may be taken in parts of z_pad columns (``edge_shape.py``), for
models wider than the default.

Row offsets are int64 throughout: N * K * E passes 2^31 at 4.2M spots. Rows themselves are int32.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError
from stflow_fast.graph import transpose_neighbors

from . import conventions
from .conventions import MOST_COLUMNS, MOST_NEIGHBORS, Settings, Sizes, context_padding
from .edge_shape import EdgeShape, edge_shape
from .edge_tiles import (
    edge_factors,
    edge_frame,
    edge_inputs,
    edge_mlp,
    frame_signs,
    load_rows,
    load_spots,
    logit_backward,
    logit_part,
    logit_statistics,
    make_message,
    mean_weight,
    part_columns,
    part_weights,
    segment_softmax,
    store_rows,
    tile_edges,
    tile_spots,
)
from .launch import (
    Launch,
    check_device,
    check_probability,
    check_tensors,
    device_scope,
    halves_of,
    n_processors,
    on_device,
)
from .tiles import centre_backward, gate_backward, matmul, nearest_tf32, settle_keys

CONTEXT_ALIGNMENT = tl.constexpr(conventions.CONTEXT_ALIGNMENT)

EDGE_NUMBERS = tl.constexpr(5)
"""Of an edge and head, from one kernel of the backward to the other."""


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


@triton.jit(do_not_specialize=["n"])
def edge_attention_bwd_query_kernel(
    grad_context,
    terms,
    neighbors,
    geometry,
    edge,
    message_to_logit,
    logit,
    dropout_keys,
    grad_terms,
    messages,
    edge_gradients,
    grad_edge,
    n,
    S: tl.constexpr,
):
    """dA, the messages, the numbers of :func:`store_edge` [N * K, H, 5], partial gradients of the edge MLP.

    A fixed number of programs walks over the tiles, each with a partial sum of its own.
    """
    i_c, i_r = tl.arange(0, S.e_pad), tl.arange(0, 16)
    m_c = i_c < S.e
    b_w, b_mean_w = part_weights(logit, 0, S), mean_weight(logit, S)
    b_bias = tl.load(logit + S.z).to(tl.float32)
    b_dedge_a = tl.full([16, S.e_pad], 0.0, tl.float32)
    b_dedge_b = tl.full([16, S.e_pad], 0.0, tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(n, S.spots), tl.num_programs(0)):
        i_spot, i_edge, i_slot, i_near, m_e = tile_edges(neighbors, i_tile, n, S)
        i_key = i_slot
        if S.dropout:
            i_key = tl.load(dropout_keys + i_spot)
        b_inputs, b_wa, b_wb = edge_mlp(geometry, edge, i_edge, m_e, S)
        b_message = make_message(b_inputs, b_wa, b_wb, i_key, i_slot, S).to(S.operand)
        if S.rounds > 0:  # as every product that reads them wants them
            b_message = nearest_tf32(b_message)
        store_rows(messages + i_edge * S.e, i_c, b_message, m_e[:, None] & m_c[None, :])
        i_row, m_q, i_own, m_segment, m_members = tile_spots(i_tile, m_e, n, S)
        b_dmessage = tl.full([S.rows, S.e_pad], 0.0, tl.float32)
        for i_head in range(S.n_heads):
            b_a, b_b, b_z, b_factor = logit_part(
                terms, terms + S.hp, message_to_logit, b_message, i_own, m_members, i_near, i_key, i_slot, i_head, 0, S
            )
            b_mean, b_rstd, b_along = logit_statistics(
                terms, terms + S.hp, message_to_logit, logit, b_message, b_z, b_w,
                i_own, m_members, i_near, i_key, i_slot, i_head, S,
            )  # fmt: skip
            b_logit_factor, b_attention_factor = edge_factors(i_key, i_slot, i_head, S)
            b_softmax = segment_softmax((b_along + b_bias) * b_logit_factor, m_segment)
            b_dcontext = load_spots(grad_context + S.d + i_head * S.e, i_row, m_q, i_c, m_c, S)  # [Q, E]
            b_dattention = attention_gradient(grad_context, terms, b_dcontext, b_message, i_row, m_q, i_near, i_head, S)
            b_dattention = b_dattention * b_attention_factor[None, :]
            b_mean_d = tl.sum(b_softmax * b_dattention, 1)
            b_dlogit = tl.sum(b_softmax * (b_dattention - b_mean_d[:, None]), 0) * b_logit_factor  # [M]
            b_attention = tl.sum(b_softmax, 0) * b_attention_factor
            store_edge(edge_gradients, i_edge, i_head, b_attention, b_dlogit, b_mean, b_rstd, b_along, m_e, S)
            b_dmessage = matmul(tl.where(m_members, b_attention[:, None], 0.0), b_dcontext, b_dmessage, S, True)
            b_da, b_db, _ = logit_backward(
                b_a, b_b, b_z, b_factor, b_mean, b_rstd, b_along, b_dlogit, b_w, b_mean_w, 0, S
            )
            b_dmessage = query_gradient(
                grad_terms, message_to_logit, b_da, b_db, b_dmessage, m_segment, i_row, m_q, i_head, 0, S
            )
            for i_part in range(1, S.z_parts):
                b_a, b_b, b_z, b_factor = logit_part(
                    terms, terms + S.hp, message_to_logit, b_message,
                    i_own, m_members, i_near, i_key, i_slot, i_head, i_part, S,
                )  # fmt: skip
                b_next_w = part_weights(logit, i_part, S)
                b_da, b_db, _ = logit_backward(
                    b_a, b_b, b_z, b_factor, b_mean, b_rstd, b_along, b_dlogit, b_next_w, b_mean_w, i_part, S
                )
                b_dmessage = query_gradient(
                    grad_terms, message_to_logit, b_da, b_db, b_dmessage, m_segment, i_row, m_q, i_head, i_part, S
                )
        b_inputs, b_wa, b_wb = edge_mlp(geometry, edge, i_edge, m_e, S)  # read again, not held over all heads
        b_columns = edge_inputs(geometry, i_edge[None, :], i_r[:, None], m_e[None, :], S)  # [16, M]
        for i_frame in range(4):
            b_a, b_b, b_centred, b_rstd, b_before, b_behind = edge_frame(
                b_inputs, b_wa, b_wb, i_key, i_slot, i_frame, S
            )
            b_dy = tl.where(m_c[None, :], 0.25 * b_behind * b_dmessage, 0.0)
            b_dz = centre_backward(b_centred, b_rstd, b_dy, tl.constexpr(S.e)) * b_before
            b_da, b_db = gate_backward(b_a, b_b, b_dz, tl.constexpr(S.edge_gate), tl.constexpr(S.fast))
            b_signed = b_columns * frame_signs(i_r, i_frame)[:, None]
            b_dedge_a = matmul(b_signed, b_da, b_dedge_a, S, True)
            if S.edge_gate == "swiglu":
                b_dedge_b = matmul(b_signed, b_db, b_dedge_b, S, True)
    # The first two parts of the inputs, high and low, are the whole of them.
    row = grad_edge + (tl.program_id(0) * 8 + i_r) * S.pe
    m_r = (i_r < 8)[:, None] & m_c[None, :]
    store_rows(row, i_c, b_dedge_a, m_r)
    if S.edge_gate == "swiglu":
        store_rows(row + S.e, i_c, b_dedge_b, m_r)


@triton.jit
def attention_gradient(grad_context, terms, b_dcontext, b_message, i_row, m_q, i_near, i_head, S: tl.constexpr):
    """Gradient [Q, M] of the attention weights behind their dropout; of meaning where the edge is of the spot."""
    i_d = tl.arange(0, S.dh_pad)
    i_column, m_d = i_head * S.dh + i_d, i_d < S.dh
    b_dweight = tl.load(grad_context + i_row * S.context + S.d + S.n_heads * S.e + i_head, mask=m_q, other=0.0)
    b_dattention = tl.full([S.spots_pad, S.rows], 0.0, tl.float32) + b_dweight.to(tl.float32)[:, None]
    # A transposed tile, but on the right of 16 or 32 rows: never wgmma, where Triton up to 3.7 goes wrong (fla #984).
    b_dattention = matmul(b_dcontext, tl.trans(b_message), b_dattention, S)
    b_dvalues = load_spots(grad_context, i_row, m_q, i_column, m_d, S)  # [Q, d / H]
    value = terms + 2 * S.hp + i_near[None, :] * S.width + i_column[:, None]
    return matmul(b_dvalues, tl.load(value, mask=m_d[:, None], other=0.0), b_dattention, S)


@triton.jit
def query_gradient(
    grad_terms, message_to_logit, b_da, b_db, b_dmessage, m_segment, i_row, m_q, i_head, i_part, S: tl.constexpr
):
    """Store a part of dA, summed over the edges of a spot; add what it gives to the gradient of the messages."""
    b_dmessage = query_half(grad_terms, message_to_logit, b_da, b_dmessage, m_segment, i_row, m_q, i_head, i_part, 0, S)
    if S.logit_gate == "swiglu":
        b_dmessage = query_half(
            grad_terms, message_to_logit, b_db, b_dmessage, m_segment, i_row, m_q, i_head, i_part, 1, S
        )
    return b_dmessage


@triton.jit
def query_half(
    grad_terms, message_to_logit, b_dpre, b_dmessage, m_segment, i_row, m_q, i_head, i_part,
    HALF: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """:func:`query_gradient` of one half of the pre-activation."""
    i_c, i_z = tl.arange(0, S.e_pad), part_columns(i_part, S)
    i_column, m_z = i_head * S.p + HALF * S.z + i_z, i_z < S.z
    b_sum = matmul(m_segment.to(tl.float32), b_dpre, tl.full([S.spots_pad, S.z_pad], 0.0, tl.float32), S, True)
    store_rows(grad_terms + i_row * S.width, i_column, b_sum, m_q[:, None] & m_z[None, :])
    m_w = m_z[:, None] & (i_c < S.e)[None, :]
    b_w = tl.load(message_to_logit + i_c[None, :] * S.hp + i_column[:, None], mask=m_w, other=0.0)  # [z_pad, E]
    return matmul(tl.where(m_z[None, :], b_dpre, 0.0), b_w, b_dmessage, S)


@triton.jit
def store_edge(edge_gradients, i_edge, i_head, b_attention, b_dlogit, b_mean, b_rstd, b_along, m_e, S: tl.constexpr):
    """What the key-owned backward needs of an edge and head, and would have to take over all of Z again."""
    number = edge_gradients + (i_edge * S.n_heads + i_head) * EDGE_NUMBERS
    tl.store(number, b_attention, mask=m_e)
    tl.store(number + 1, b_dlogit, mask=m_e)
    tl.store(number + 2, b_mean, mask=m_e)
    tl.store(number + 3, b_rstd, mask=m_e)
    tl.store(number + 4, b_along, mask=m_e)


@triton.jit
def load_edge(edge_gradients, i_edge, i_head, m_e, S: tl.constexpr):
    """What :func:`store_edge` stored."""
    number = edge_gradients + (i_edge * S.n_heads + i_head) * EDGE_NUMBERS
    b_attention = tl.load(number, mask=m_e, other=0.0)
    b_dlogit = tl.load(number + 1, mask=m_e, other=0.0)
    b_mean = tl.load(number + 2, mask=m_e, other=0.0)
    b_rstd = tl.load(number + 3, mask=m_e, other=0.0)
    b_along = tl.load(number + 4, mask=m_e, other=0.0)
    return b_attention, b_dlogit, b_mean, b_rstd, b_along


@triton.jit(do_not_specialize=["n"])
def edge_attention_bwd_key_kernel(
    grad_context,
    terms,
    neighbors,
    messages,
    arriving,
    arriving_ptr,
    message_to_logit,
    logit,
    dropout_keys,
    edge_gradients,
    grad_terms,
    grad_weight,
    grad_logit,
    n,
    S: tl.constexpr,
):
    """dB and dV of the keys, partial gradients of message_to_logit [., E, H * P] and of logit [., H, Z + 1].

    ``arriving`` [edges] lists the edges by their neighbour, ``arriving_ptr`` [N + 1] where each neighbour's begin. A
    program takes one head, one of S.z_parts parts of the hidden vector and one of S.e_parts of the message's columns;
    of the latter, each recomputes the pre-activation. On sm_80 there are two: a square gradient of the weight makes
    Triton 3.7 spread the warps over the rows of every product in the kernel, where short products repeat in every warp,
    and 700 bytes of registers spill.
    """
    i_split, i_head = tl.program_id(0), tl.program_id(1)
    i_part, i_e_part = tl.program_id(2) // S.e_parts, tl.program_id(2) % S.e_parts
    i_c, i_z, i_d = tl.arange(0, S.e_pad), part_columns(i_part, S), tl.arange(0, S.dh_pad)
    i_q, i_e = tl.arange(0, S.keys), i_e_part * S.e_part + tl.arange(0, S.e_part)
    m_c, m_z, m_d = i_c < S.e, i_z < S.z, i_d < S.dh
    m_once, m_first = i_e_part == 0, (i_e_part == 0) & (i_part == 0)
    b_w, b_mean_w = part_weights(logit, i_part, S), mean_weight(logit, S)
    b_dweight_a = tl.full([S.e_part, S.z_pad], 0.0, tl.float32)
    b_dweight_b = tl.full([S.e_part, S.z_pad], 0.0, tl.float32)
    b_dw = tl.full([S.z_pad], 0.0, tl.float32)
    b_dbias = tl.full([S.rows], 0.0, tl.float32)
    for i_block in range(i_split, tl.cdiv(n, S.keys), tl.num_programs(0)):
        i_row = (i_block * S.keys + i_q).to(tl.int64)
        m_q = i_row < n
        start = tl.load(arriving_ptr + i_block * S.keys)
        stop = tl.load(arriving_ptr + tl.minimum((i_block + 1) * S.keys, n))
        i_own = tl.minimum(i_row, n - 1)
        b_da_sum = tl.full([S.keys, S.z_pad], 0.0, tl.float32)
        b_db_sum = tl.full([S.keys, S.z_pad], 0.0, tl.float32)
        b_dvalues_sum = tl.full([S.keys, S.dh_pad], 0.0, tl.float32)
        for i_start in range(start, stop, S.rows):
            i_arriving = i_start + tl.arange(0, S.rows)
            m_e = i_arriving < stop
            # Behind the last edge comes the last again, not edge 0, whose message nobody wrote if it is missing.
            i_edge = tl.load(arriving + tl.minimum(i_arriving, stop - 1))
            i_spot, i_slot = i_edge // S.k, (i_edge % S.k).to(tl.int32)
            i_near = tl.load(neighbors + i_edge)
            i_key = i_slot
            if S.dropout:
                i_key = tl.load(dropout_keys + i_spot)
            m_segment = (i_near[None, :] == i_row[:, None]) & m_e[None, :]  # [keys, M]
            m_members = i_near[:, None] == i_row[None, :]  # [M, keys]
            b_message = load_rows(messages, i_edge, tl.constexpr(S.e), i_c, m_c)
            b_a, b_b, b_z, b_factor = logit_part(
                terms + S.hp, terms, message_to_logit, b_message,
                i_own, m_members, i_spot, i_key, i_slot, i_head, i_part, S,
            )  # fmt: skip
            b_attention, b_dlogit, b_mean, b_rstd, b_along = load_edge(edge_gradients, i_edge, i_head, m_e, S)
            b_dvalues = load_rows(grad_context, i_spot, tl.constexpr(S.context), i_head * S.dh + i_d, m_d)
            b_dvalues_sum = matmul(tl.where(m_segment, b_attention[None, :], 0.0), b_dvalues, b_dvalues_sum, S, True)
            b_da, b_db, b_dweights = logit_backward(
                b_a, b_b, b_z, b_factor, b_mean, b_rstd, b_along, b_dlogit, b_w, b_mean_w, i_part, S
            )
            b_dw += b_dweights
            b_dbias += b_dlogit
            b_arrived = m_segment.to(tl.float32)
            # Loaded once more, for Triton up to 3.7 miscompiles products of transposed tiles on Hopper (fla #984).
            i_column = i_edge[None, :] * S.e + i_e[:, None]
            b_columns = tl.load(messages + i_column, mask=(i_e < S.e)[:, None], other=0.0)  # [e_part, M]
            b_da_sum = matmul(b_arrived, b_da, b_da_sum, S, True)
            b_dweight_a = matmul(b_columns, b_da, b_dweight_a, S)
            if S.logit_gate == "swiglu":
                b_db_sum = matmul(b_arrived, b_db, b_db_sum, S, True)
                b_dweight_b = matmul(b_columns, b_db, b_dweight_b, S)
        row = grad_terms + i_row * S.width
        store_rows(row + S.hp + i_head * S.p, i_z, b_da_sum, m_once & m_q[:, None] & m_z[None, :])
        if S.logit_gate == "swiglu":
            store_rows(row + S.hp + i_head * S.p + S.z, i_z, b_db_sum, m_once & m_q[:, None] & m_z[None, :])
        store_rows(row + 2 * S.hp + i_head * S.dh, i_d, b_dvalues_sum, m_first & m_q[:, None] & m_d[None, :])
    m_weight = (i_e < S.e)[:, None] & m_z[None, :]
    row = grad_weight + (i_split * S.e + i_e) * S.hp + i_head * S.p
    store_rows(row, i_z, b_dweight_a, m_weight)
    if S.logit_gate == "swiglu":
        store_rows(row + S.z, i_z, b_dweight_b, m_weight)
    partial = grad_logit + (i_split * S.n_heads + i_head) * (S.z + 1)
    tl.store(partial + i_z, b_dw, mask=m_z & m_once)
    tl.store(partial + S.z, tl.sum(b_dbias, 0), mask=m_first)


def edge_attention(
    terms: Tensor,
    neighbors: Tensor,
    edges: Tensor,
    edge: Tensor,
    message_to_logit: Tensor,
    logit: Tensor,
    settings: Settings,
    dropout_keys: Tensor | None = None,
    arriving: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Context of every spot; differentiable in ``terms`` and the three weights (arXiv 2506.05361, section 4.2).

    Under autocast ``terms`` are brought to its type; geometry and weights stay as they are. Float32 terms multiply as
    ``torch.set_float32_matmul_precision`` says: "highest", torch's default, is ieee, anything else tf32.

    Args:
        terms: [N, 2 * H * P + d], float32, bfloat16 or float16.
        neighbors: [N, K] int64 rows of ``terms``, negative where there is none; K from 1 to 64.
        edges: [N, K, 3] geometry, or with ``edges_are_messages`` [N, K, E] (then without gradients).
        edge: [4, Pe].
        message_to_logit: [E, H * P].
        logit: [Z + 1].
        dropout_keys: [N] int32 of the spots, in this layer; with dropout only.
        arriving: of ``stflow_fast.graph.transpose_neighbors``, made once for several layers, or in the backward.

    Returns:
        context [N, C] in the type of ``terms``.

    Raises:
        InputError: a shape, type, device or layout that the kernels do not take, named; with STFLOW_DEBUG=1 also
            neighbours out of range.
    """
    device_type = terms.device.type
    if torch.is_autocast_enabled(device_type):
        terms = terms.to(torch.get_autocast_dtype(device_type))
    message_to_logit = message_to_logit.to(terms.dtype)
    order, ptr = arriving or (None, None)
    return torch.ops.stflow_fast.edge_attention(
        terms, neighbors, edges, edge, message_to_logit, logit, dropout_keys, order, ptr, *settings
    )


def edge_messages(
    geometry: Tensor, edge: Tensor, message_to_logit: Tensor, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """Messages [N, K, E] of geometry [N, K, 3] in ``dtype``, to be kept over several flow steps.

    Without gradients or dropout. Other arguments and errors as :func:`edge_attention`.
    """
    with torch.no_grad():
        return torch.ops.stflow_fast.edge_messages(geometry, edge, message_to_logit, *settings[:3], dtype)


def _compiled_for(kernel: str, typed: Tensor, sizes: Sizes, settings: Settings) -> tuple[EdgeShape, Launch]:
    return edge_shape(kernel, *on_device(typed), sizes, settings)


class _Inputs(NamedTuple):
    """The tensors of the operators, in the order of their schema."""

    terms: Tensor
    neighbors: Tensor
    edges: Tensor
    edge: Tensor
    message_to_logit: Tensor
    logit: Tensor
    dropout_keys: Tensor | None
    arriving: Tensor | None
    arriving_ptr: Tensor | None

    @property
    def sizes(self) -> Sizes:
        e, hp = self.message_to_logit.shape
        return Sizes(self.neighbors.shape[1], e, hp, self.terms.shape[1] - 2 * hp)


def _split(arguments: tuple) -> tuple[_Inputs, Settings]:
    """An operator's flat arguments."""
    count = len(_Inputs._fields)
    return _Inputs(*arguments[:count]), Settings(*arguments[count:])


def _check(inputs: _Inputs, settings: Settings) -> None:
    """Refuse by name what the kernels would misread."""
    terms, neighbors = inputs.terms, inputs.neighbors
    if neighbors.ndim != 2 or not 1 <= neighbors.shape[1] <= MOST_NEIGHBORS:
        raise InputError(f"neighbors: must have 1 to {MOST_NEIGHBORS} columns, not shape {list(neighbors.shape)}")
    n, k = neighbors.shape
    e, hp = _check_width(inputs.message_to_logit)
    n_heads = settings.n_heads
    if (
        n_heads < 1
        or hp % n_heads
        or terms.ndim != 2
        or terms.shape[1] <= 2 * hp
        or (terms.shape[1] - 2 * hp) % n_heads
    ):
        raise InputError(
            f"terms: must have shape [N, 2 * H * P + d] with H * P = {hp} and d a multiple of H = {n_heads}, "
            f"not {list(terms.shape)}"
        )
    edge_halves = halves_of("edge_activation", settings.edge_activation)
    logit_halves = halves_of("logit_activation", settings.logit_activation)
    z = hp // n_heads // logit_halves
    if hp // n_heads % logit_halves:
        raise InputError(
            f"message_to_logit: must have an even number of columns a head for swiglu, not {hp // n_heads}"
        )
    if settings.edges_are_messages and settings.p_mlp > 0:
        raise InputError("edges: kept messages are without dropout; give geometry, or p_mlp 0")
    n_edge = e if settings.edges_are_messages else 3
    shapes = {
        "terms": (n, terms.shape[1]),
        "neighbors": (n, k),
        "edges": (n, k, n_edge),
        "edge": (4, e * edge_halves),
        "message_to_logit": (e, hp),
        "logit": (z + 1,),
        "dropout_keys": (n,),
        "arriving": (n * k,),
        "arriving_ptr": (n + 1,),
    }
    check_probability("p_mlp", settings.p_mlp)
    check_probability("p_attention", settings.p_attention)
    drops = settings.p_mlp > 0 or settings.p_attention > 0
    if drops and inputs.dropout_keys is None:
        raise InputError("dropout_keys: are needed with dropout")
    given = {name: tensor for name, tensor in inputs._asdict().items() if tensor is not None}
    integers = dict.fromkeys(("neighbors", "arriving", "arriving_ptr"), torch.int64)
    check_tensors(
        {name: (tensor, shapes[name]) for name, tensor in given.items()}, **integers, dropout_keys=torch.int32
    )


def _check_width(message_to_logit: Tensor) -> tuple[int, int]:
    """E and H * P."""
    if message_to_logit.ndim != 2 or not 1 <= message_to_logit.shape[0] <= MOST_COLUMNS:
        raise InputError(
            f"message_to_logit: must have shape [E, H * P] with E from 1 to {MOST_COLUMNS}, "
            f"not {list(message_to_logit.shape)}"
        )
    return message_to_logit.shape


def _check_rows(neighbors: Tensor) -> None:
    """With STFLOW_DEBUG=1, which waits for the device: no neighbour may be out of range."""
    if os.environ.get("STFLOW_DEBUG") != "1" or (neighbors.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if len(neighbors) and int(neighbors.max()) >= len(neighbors):
        raise InputError(f"neighbors: {int(neighbors.max())} is no row of the {len(neighbors)} terms")


_INPUTS = (
    "Tensor terms, Tensor neighbors, Tensor edges, Tensor edge, Tensor message_to_logit, Tensor logit, "
    "Tensor? dropout_keys, Tensor? arriving, Tensor? arriving_ptr, int n_heads, str edge_activation, "
    "str logit_activation, float p_mlp, float p_attention, bool edges_are_messages"
)
_LIBRARY = torch.library.Library("stflow_fast", "FRAGMENT")
_LIBRARY.define(f"edge_attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"edge_attention_backward(Tensor grad_context, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")


def _forward(*arguments: Any) -> Tensor:
    context = _forward_fake(*arguments)
    inputs, settings = _split(arguments)
    terms = inputs.terms
    check_device("terms", terms)
    _check_rows(inputs.neighbors)
    if len(terms):
        shape, launch = _compiled_for("edge_attention_fwd", terms, inputs.sizes, settings)
        keys = inputs.dropout_keys if shape.dropout else None
        with device_scope(terms):
            edge_attention_fwd_kernel[(triton.cdiv(len(terms), shape.spots),)](
                *inputs[:6], keys, context, len(terms), shape, **launch.options
            )
    return context


def _forward_fake(*arguments: Any) -> Tensor:
    inputs, settings = _split(arguments)
    _check(inputs, settings)
    used = inputs.sizes.d + settings.n_heads * (inputs.sizes.e + 1)
    return inputs.terms.new_empty(inputs.terms.shape[0], used + context_padding(used))  # len() would fix N


def _backward(grad_context: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, settings = _split(arguments)
    terms, neighbors, _, edge, message_to_logit, logit, keys, arriving, arriving_ptr = inputs
    check_device("terms", terms)
    n, sizes = len(terms), inputs.sizes
    if not n:
        return terms.new_empty(terms.shape), *(torch.zeros_like(weight) for weight in (edge, message_to_logit, logit))
    if arriving is None or arriving_ptr is None:
        arriving, arriving_ptr = transpose_neighbors(neighbors)
    grad_context = grad_context.to(terms.dtype).contiguous()
    keys = keys if settings.p_mlp > 0 or settings.p_attention > 0 else None
    grad_terms = torch.empty_like(terms)
    messages = terms.new_empty(n * sizes.k, sizes.e)
    shape, launch = _compiled_for("edge_attention_bwd_query", terms, sizes, settings)
    programs = min(triton.cdiv(n, shape.spots), launch.programs * n_processors(terms.device))
    edge_gradients = terms.new_empty(n * sizes.k, settings.n_heads, EDGE_NUMBERS.value, dtype=torch.float32)
    grad_edge = terms.new_empty(programs, 2, *edge.shape, dtype=torch.float32)
    with device_scope(terms):
        edge_attention_bwd_query_kernel[(programs,)](
            grad_context,
            *inputs[:6],
            keys,
            grad_terms,
            messages,
            edge_gradients,
            grad_edge,
            n,
            shape,
            **launch.options,
        )
        shape, launch = _compiled_for("edge_attention_bwd_key", terms, sizes, settings)
        grid = (settings.n_heads, shape.z_parts * shape.e_parts)
        splits = triton.cdiv(launch.programs * n_processors(terms.device), grid[0] * grid[1])
        splits = min(triton.cdiv(n, shape.keys), splits)
        grad_weight = terms.new_empty(splits, *message_to_logit.shape, dtype=torch.float32)
        grad_logit = terms.new_empty(splits * settings.n_heads, len(logit), dtype=torch.float32)
        edge_attention_bwd_key_kernel[(splits, *grid)](
            grad_context,
            terms,
            neighbors,
            messages,
            arriving,
            arriving_ptr,
            message_to_logit,
            logit,
            keys,
            edge_gradients,
            grad_terms,
            grad_weight,
            grad_logit,
            n,
            shape,
            **launch.options,
        )
    weights = zip((grad_edge.flatten(0, 1), grad_weight, grad_logit), (edge, message_to_logit, logit), strict=True)
    return grad_terms, *(partial.sum(0).to(weight.dtype) for partial, weight in weights)


def _backward_fake(grad_context: Tensor, terms: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in (terms, *rest[2:5]))


def _messages(
    geometry: Tensor,
    edge: Tensor,
    message_to_logit: Tensor,
    n_heads: int,
    edge_activation: str,
    logit_activation: str,
    dtype: torch.dtype,
) -> Tensor:
    check_device("geometry", geometry)
    settings = n_heads, edge_activation, logit_activation
    messages = _messages_fake(geometry, edge, message_to_logit, *settings, dtype)
    if messages.numel():
        n, k, e = messages.shape
        sizes = Sizes(k, e, message_to_logit.shape[1], n_heads)  # d does not matter
        shape, launch = _compiled_for("edge_messages", messages, sizes, Settings(*settings))
        with device_scope(geometry):
            edge_messages_kernel[(triton.cdiv(n * k, shape.rows),)](
                geometry, edge, messages, n * k, shape, **launch.options
            )
    return messages


def _messages_fake(
    geometry: Tensor,
    edge: Tensor,
    message_to_logit: Tensor,
    n_heads: int,
    edge_activation: str,
    logit_activation: str,
    dtype: torch.dtype,
) -> Tensor:
    if geometry.ndim != 3 or not 1 <= geometry.shape[1] <= MOST_NEIGHBORS:
        raise InputError(f"geometry: must have shape [N, 1 to {MOST_NEIGHBORS}, 3], not {list(geometry.shape)}")
    (n, k, _), (e, hp) = geometry.shape, _check_width(message_to_logit)
    if n_heads < 1 or hp % n_heads:
        raise InputError(f"n_heads: must divide H * P = {hp}, not {n_heads}")
    halves = halves_of("edge_activation", edge_activation)
    check_tensors({"geometry": (geometry, (n, k, 3)), "edge": (edge, (4, e * halves))})
    return geometry.new_empty(n, k, e, dtype=dtype)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    tensors, ctx.settings = _split(inputs)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad_context: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.settings.edges_are_messages:
        raise InputError("edges: kept messages are for inference; give geometry to differentiate")
    terms, edge, weight, logit = torch.ops.stflow_fast.edge_attention_backward(
        grad_context, *ctx.saved_tensors, *ctx.settings
    )
    return terms, None, None, edge, weight, logit, None, None, None, *(None for _ in ctx.settings)


_LIBRARY.define(
    "edge_messages(Tensor geometry, Tensor edge, Tensor message_to_logit, int n_heads, str edge_activation, "
    "str logit_activation, ScalarType dtype) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("edge_messages", _messages, _device)
    _LIBRARY.impl("edge_attention", _forward, _device)
    _LIBRARY.impl("edge_attention_backward", _backward, _device)
torch.library.register_fake("stflow_fast::edge_messages", _messages_fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::edge_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::edge_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "stflow_fast::edge_attention", _differentiate, setup_context=_setup_context, lib=_LIBRARY
)

settle_keys(globals())

"""The backward of edge attention, in two kernels and without atomics, so that every run gives the same bits.

* query-owned: recomputes the forward of a tile, writes dA, the edge MLP's gradients, and for the second kernel the
  messages (as many bytes as A at K = 8) and five numbers per edge and head, freed with it.
* key-owned: a program of one head walks the edges that arrive at a block of keys (the transposed neighbour table),
  recomputes their pre-activations, and writes dB and dV; its part of the gradient of message_to_logit_h stays in its
  registers, for which an accumulator of all heads would be too large.

Letters and shapes as in ``edge_attention.py``, which launches these kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
from .tiles import centre_backward, gate_backward, matmul, nearest_tf32, settle_keys

EDGE_NUMBERS = tl.constexpr(5)
"""Of an edge and head, from one kernel of the backward to the other."""


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


settle_keys(globals())

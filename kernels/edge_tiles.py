"""Tiles of the edge kernels: the edges of a tile, the edge MLP in its sign frames, the attention MLP, the softmax.

M edges, Q spots (or keys) of a tile; other letters as in ``edge_attention.py``. S is the launch's EdgeShape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import conventions
from .tiles import centre, combine, dot, dropout_factor, gate, gate_backward, matmul, settle_keys

EDGE_HIDDEN = tl.constexpr(conventions.STREAM_EDGE_HIDDEN)
EDGE_OUT = tl.constexpr(conventions.STREAM_EDGE_OUT)
LOGIT_HIDDEN = tl.constexpr(conventions.STREAM_LOGIT_HIDDEN)
LOGIT = tl.constexpr(conventions.STREAM_LOGIT)
ATTENTION = tl.constexpr(conventions.STREAM_ATTENTION)


@triton.jit
def load_rows(base, i_row, STRIDE: tl.constexpr, i_column, m_column):
    """Rows [M, columns] of a matrix, in its own type; every row index must be valid."""
    return tl.load(base + i_row[:, None] * STRIDE + i_column[None, :], mask=m_column[None, :], other=0.0)


@triton.jit
def store_rows(row, i_column, b_value, m_value):
    """Store [Q, columns] behind row pointers [Q]."""
    tl.store(row[:, None] + i_column[None, :], b_value, mask=m_value)


@triton.jit
def load_spots(base, i_row, m_q, i_column, m_column, S: tl.constexpr):
    """Rows [Q, columns] of the gradient of the context."""
    column = base + i_row[:, None] * S.context + i_column[None, :]
    return tl.load(column, mask=m_q[:, None] & m_column[None, :], other=0.0)


@triton.jit
def tile_edges(neighbors, i_tile, n, S: tl.constexpr):
    """The edges of a tile of spots: spot, edge, slot and neighbour [M], and which exist.

    Those that do not have rows of the tile, their neighbour is the spot itself: a product of zero with what they load
    is NaN where that is, and must not carry it to other tiles.
    """
    i_e = tl.arange(0, S.rows)
    i_spot = (i_tile * S.spots + tl.minimum(i_e // S.k, S.spots - 1)).to(tl.int64)
    m_e = (i_e < S.spots * S.k) & (i_spot < n)
    i_spot = tl.minimum(i_spot, n - 1)
    i_slot = i_e % S.k
    i_edge = i_spot * S.k + i_slot
    i_near = tl.load(neighbors + i_edge, mask=m_e, other=-1)
    m_e = m_e & (i_near >= 0)
    return i_spot, i_edge, i_slot, tl.where(m_e, i_near, i_spot), m_e


@triton.jit
def tile_spots(i_tile, m_e, n, S: tl.constexpr):
    """The spots of a tile: row [Q], which exist, and a row of the tile for each; which edges are of a spot [Q, M]; of
    which spot an edge is [M, Q], existing or not."""
    i_q, i_of = tl.arange(0, S.spots_pad), tl.arange(0, S.rows) // S.k
    i_row = (i_tile * S.spots + i_q).to(tl.int64)
    m_q = (i_q < S.spots) & (i_row < n)
    i_own = tl.minimum((i_tile * S.spots + tl.minimum(i_q, S.spots - 1)).to(tl.int64), n - 1)
    return i_row, m_q, i_own, (i_of[None, :] == i_q[:, None]) & m_e[None, :], i_q[None, :] == i_of[:, None]


@triton.jit
def split(b_x, i_part, LOW: tl.constexpr):
    """The bf16 part of x or, where i_part is LOW, what is missing from it; zero in the part behind the last.

    Matrix products have 16 columns where the edge MLP has 4 inputs (p_x, p_y, r, 1). Three groups of them multiply
    high * high + low * high + high * low, which is float32 but for 2^-16 at the price of one bf16 product, and leaves
    the hidden vectors in the layout of an accumulator, where a row belongs to four threads.
    """
    b_high = b_x.to(tl.bfloat16).to(tl.float32)
    return tl.where(i_part == LOW, b_x - b_high, tl.where(i_part == 3, 0.0, b_high))


@triton.jit
def edge_inputs(geometry, i_edge, i_input, m_e, S: tl.constexpr):
    """Inputs of the edge MLP, in as many axes as edges and inputs broadcast to."""
    i_kind, i_part = i_input % 4, i_input // 4
    b_inputs = tl.load(geometry + 3 * i_edge + i_kind, mask=m_e & (i_kind < 3), other=0.0).to(tl.float32)
    b_inputs = tl.where(m_e & (i_kind == 3), 1.0, b_inputs)
    return split(b_inputs, i_part, 1) if S.split else tl.where(i_part == 0, b_inputs, 0.0)


@triton.jit
def edge_weights(edge, i_input, HALF: tl.constexpr, S: tl.constexpr):
    """Weights [16, E] of one half of the edge MLP."""
    i_c = tl.arange(0, S.e_pad)
    i_kind, i_part = (i_input % 4)[:, None], (i_input // 4)[:, None]
    column = edge + i_kind * S.pe + HALF * S.e + i_c[None, :]
    b_w = tl.load(column, mask=(i_c < S.e)[None, :], other=0.0).to(tl.float32)
    return split(b_w, i_part, 2) if S.split else tl.where(i_part == 0, b_w, 0.0)


@triton.jit
def edge_mlp(geometry, edge, i_edge, m_e, S: tl.constexpr):
    """Inputs [M, 16] of a tile's edges and weights [16, E] of both halves."""
    i_input = tl.arange(0, 16)
    b_wa = edge_weights(edge, i_input, 0, S)
    b_wb = b_wa
    if S.edge_gate == "swiglu":
        b_wb = edge_weights(edge, i_input, 1, S)
    return edge_inputs(geometry, i_edge[:, None], i_input[None, :], m_e[:, None], S), b_wa, b_wb


@triton.jit
def frame_signs(i_input, i_frame):
    """What the frame multiplies the inputs with: the signs of p_x and p_y."""
    i_kind = i_input % 4
    flipped = ((i_kind == 0) & (i_frame >= 2)) | ((i_kind == 1) & (i_frame % 2 == 1))
    return tl.where(flipped, -1.0, 1.0)


@triton.jit
def edge_half(b_inputs, b_w, S: tl.constexpr):
    """Pre-activation [M, E] of one half of the edge MLP."""
    b_zero = tl.full([S.rows, S.e_pad], 0.0, tl.float32)
    return dot(b_inputs.to(S.edge_operand), b_w.to(S.edge_operand), b_zero, tl.constexpr(S.dot_precision), S)


@triton.jit
def edge_frame(b_inputs, b_wa, b_wb, i_key, i_slot, i_frame, S: tl.constexpr):
    """One sign frame of the edge MLP: both halves before the gate, the centred hidden vector, its reciprocal
    deviation, and the dropout factors before and behind the LayerNorm."""
    i_c = tl.arange(0, S.e_pad)
    b_signed = b_inputs * frame_signs(tl.arange(0, 16), i_frame)[None, :]
    b_a = edge_half(b_signed, b_wa, S)
    b_b = b_a
    if S.edge_gate == "swiglu":
        b_b = edge_half(b_signed, b_wb, S)
    b_z = gate(b_a, b_b, tl.constexpr(S.edge_gate), tl.constexpr(S.fast))
    b_before = 1.0
    b_behind = 1.0
    if S.p_mlp > 0:
        i_row = i_frame * S.k + i_slot
        i_hidden = combine(combine(i_key, EDGE_HIDDEN), i_row)
        i_out = combine(combine(i_key, EDGE_OUT), i_row)
        b_before = dropout_factor(
            i_hidden[:, None], i_c[None, :], tl.constexpr(S.mlp_threshold), tl.constexpr(S.mlp_scale)
        )
        b_behind = dropout_factor(
            i_out[:, None], i_c[None, :], tl.constexpr(S.mlp_threshold), tl.constexpr(S.mlp_scale)
        )
        b_z = b_z * b_before
    b_centred, b_rstd = centre(b_z, i_c < S.e, tl.constexpr(S.e), tl.constexpr(S.eps))
    return b_a, b_b, b_centred, b_rstd, b_before, b_behind


@triton.jit
def make_message(b_inputs, b_wa, b_wb, i_key, i_slot, S: tl.constexpr):
    """m_ij [M, E]: the mean of the frames."""
    b_message = tl.full([S.rows, S.e_pad], 0.0, tl.float32)
    for i_frame in range(4):
        _, _, b_centred, b_rstd, _, b_behind = edge_frame(b_inputs, b_wa, b_wb, i_key, i_slot, i_frame, S)
        b_message += b_centred * (0.25 * b_rstd)[:, None] * b_behind
    return b_message


@triton.jit
def part_columns(i_part, S: tl.constexpr):
    """Columns of a part of the attention MLP's hidden vector; those from Z on do not exist."""
    return i_part * S.z_pad + tl.arange(0, S.z_pad)


@triton.jit
def part_weights(logit, i_part, S: tl.constexpr):
    """A part of the logit's weights [z_pad]."""
    i_z = part_columns(i_part, S)
    return tl.load(logit + i_z, mask=i_z < S.z, other=0.0).to(tl.float32)


@triton.jit
def mean_weight(logit, S: tl.constexpr):
    """Mean of the logit's weights, which the LayerNorm before them does not let through."""
    b_sum = 0.0
    for i_part in range(S.z_parts):
        b_sum += tl.sum(part_weights(logit, i_part, S), 0)
    return b_sum / S.z


@triton.jit
def logit_pre(
    own,
    other,
    message_to_logit,
    b_message,
    i_row,
    m_members,
    i_other,
    i_head,
    i_part,
    HALF: tl.constexpr,
    S: tl.constexpr,
):
    """A part [M, z_pad] of one half of the attention MLP's pre-activation: A_ih + B_jh + (We W2_h) m_ij.

    The side that a tile owns (A of its spots, B of its keys) comes as a product of the members [M, Q] with rows [Q, Z],
    which is exact (in tf32 but for 2^-22): 11.9k instructions an edge (M = 64, bf16, sm_90), where loading, converting
    and adding a row for every edge took 13.3k.
    """
    i_c, i_z = tl.arange(0, S.e_pad), part_columns(i_part, S)
    i_column, m_z = i_head * S.p + HALF * S.z + i_z, i_z < S.z
    b_own = load_rows(own, i_row, tl.constexpr(S.width), i_column, m_z)
    b_other = load_rows(other, i_other, tl.constexpr(S.width), i_column, m_z).to(tl.float32)
    m_w = (i_c < S.e)[:, None] & m_z[None, :]
    b_w = tl.load(message_to_logit + i_c[:, None] * S.hp + i_column[None, :], mask=m_w, other=0.0)
    b_members, b_own = m_members.to(S.operand), b_own.to(S.operand)
    b_sum = dot(b_members, b_own, b_other, tl.constexpr(S.exact_precision), S)
    return matmul(b_message, b_w, b_sum, S)


@triton.jit
def logit_part(
    own, other, message_to_logit, b_message, i_row, m_members, i_other, i_key, i_slot, i_head, i_part, S: tl.constexpr
):
    """A part of both halves of the pre-activation, of the hidden vector behind the gate, and its dropout factor."""
    b_a = logit_pre(own, other, message_to_logit, b_message, i_row, m_members, i_other, i_head, i_part, 0, S)
    b_b = b_a
    if S.logit_gate == "swiglu":
        b_b = logit_pre(own, other, message_to_logit, b_message, i_row, m_members, i_other, i_head, i_part, 1, S)
    b_z = gate(b_a, b_b, tl.constexpr(S.logit_gate), tl.constexpr(S.fast))
    b_factor = 1.0
    if S.p_mlp > 0:
        i_hidden = combine(combine(i_key, LOGIT_HIDDEN), i_slot * S.n_heads + i_head)
        i_z = part_columns(i_part, S)
        b_factor = dropout_factor(
            i_hidden[:, None], i_z[None, :], tl.constexpr(S.mlp_threshold), tl.constexpr(S.mlp_scale)
        )
        b_z = b_z * b_factor
    return b_a, b_b, b_z, b_factor


@triton.jit
def logit_statistics(
    own, other, message_to_logit, logit, b_message, b_z, b_w, i_row, m_members, i_other, i_key, i_slot, i_head,
    S: tl.constexpr,
):  # fmt: skip
    """Of the hidden vector: mean, 1 / deviation, and its normalised form along the weights, each [M].

    The first part is given, with its weights. Others are made and join by Chan's form of the sum of squares, which does
    not cancel.
    """
    b_mean, b_square, b_along = part_statistics(b_z, b_w, 0, S)
    if S.z_parts > 1:
        b_weight = tl.sum(b_w, 0)
        b_along += b_mean * b_weight
        for i_part in range(1, S.z_parts):
            _, _, b_next, _ = logit_part(
                own, other, message_to_logit, b_message, i_row, m_members, i_other, i_key, i_slot, i_head, i_part, S
            )
            b_next_w = part_weights(logit, i_part, S)
            b_next_mean, b_next_square, b_next_along = part_statistics(b_next, b_next_w, i_part, S)
            before = i_part * S.z_pad
            count = tl.minimum(S.z_pad, S.z - before)
            b_apart = b_next_mean - b_mean
            b_square += b_next_square + b_apart * b_apart * (before * count / (before + count))
            b_mean += b_apart * (count / (before + count))
            b_along += b_next_along + b_next_mean * tl.sum(b_next_w, 0)
            b_weight += tl.sum(b_next_w, 0)
        b_along -= b_mean * b_weight
    b_rstd = tl.rsqrt(b_square / S.z + S.eps)
    return b_mean, b_rstd, b_along * b_rstd


@triton.jit
def part_statistics(b_z, b_w, i_part, S: tl.constexpr):
    """Of a part [M, z_pad] of the hidden vector: its mean, and of what is apart from it the sum of squares and that
    along the weights."""
    i_z = part_columns(i_part, S)
    b_mean = tl.sum(b_z, 1) / tl.minimum(S.z_pad, S.z - i_part * S.z_pad)
    b_centred = tl.where((i_z < S.z)[None, :], b_z - b_mean[:, None], 0.0)
    return b_mean, tl.sum(b_centred * b_centred, 1), tl.sum(b_centred * b_w[None, :], 1)


@triton.jit
def logit_backward(b_a, b_b, b_z, b_factor, b_mean, b_rstd, b_along, b_dlogit, b_w, b_mean_w, i_part, S: tl.constexpr):
    """Gradients of both halves of a part of the pre-activation, and of its weights [z_pad], from that of the logit [M].

    The gradient of the normalised vector is dlogit * w, so the two means of the LayerNorm's backward are known: that of
    w, and of w * normalised, which is the logit before its bias.
    """
    b_centred = tl.where((part_columns(i_part, S) < S.z)[None, :], b_z - b_mean[:, None], 0.0)
    b_scaled = b_dlogit * b_rstd
    b_dz = b_scaled[:, None] * (b_w - b_mean_w)[None, :] - b_centred * (b_scaled * b_rstd * b_along / S.z)[:, None]
    b_da, b_db = gate_backward(b_a, b_b, b_dz * b_factor, tl.constexpr(S.logit_gate), tl.constexpr(S.fast))
    return b_da, b_db, tl.sum(b_centred * b_scaled[:, None], 0)


@triton.jit
def edge_factors(i_key, i_slot, i_head, S: tl.constexpr):
    """Dropout factors [M] of the logits and of the attention weights."""
    b_logit = tl.full([S.rows], 1.0, tl.float32)
    b_attention = tl.full([S.rows], 1.0, tl.float32)
    i_column = i_head + 0 * i_slot
    if S.p_mlp > 0:
        b_logit = dropout_factor(
            combine(combine(i_key, LOGIT), i_slot), i_column, tl.constexpr(S.mlp_threshold), tl.constexpr(S.mlp_scale)
        )
    if S.p_attention > 0:
        i_row = combine(combine(i_key, ATTENTION), i_slot)
        b_attention = dropout_factor(
            i_row, i_column, tl.constexpr(S.attention_threshold), tl.constexpr(S.attention_scale)
        )
    return b_logit, b_attention


@triton.jit
def segment_softmax(b_logit, m_segment):
    """Attention [Q, M] of each spot (row) over its edges, zero elsewhere."""
    b_logits = tl.where(m_segment, b_logit[None, :], float("-inf"))
    b_most = tl.max(b_logits, 1)
    b_most = tl.where(b_most == float("-inf"), 0.0, b_most)  # a spot without neighbours
    b_exp = tl.exp(b_logits - b_most[:, None])
    b_sum = tl.sum(b_exp, 1)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    return b_exp * (1.0 / b_sum)[:, None]


settle_keys(globals())

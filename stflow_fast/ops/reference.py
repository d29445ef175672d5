"""The operations of a STFlow layer in plain torch: the specification that every kernel must equal.

The published layer (arXiv 2506.05361, section 4.2) materialises the inputs of its attention MLP for every edge and
head. Here its linear parts are folded, so that per edge only the message ``m_ij`` and the pre-activation of the
attention MLP remain, and those only for a block of spots at a time. For the edge from spot i to its neighbour j and
head h, with W1 = [Wq | Wk | We | Wg] the first matrix of ``mlp_attn`` (query, key, edge, genes) and W2_h, b2_h the last
of ``edge_trans`` with the gain and bias of its LayerNorm:

    m_ij            = mean over the 4 sign frames of LayerNorm(gate(fc1([+-p_x, +-p_y, r])))
    pre-activation  = A_ih + B_jh + (We W2_h) m_ij,  A_ih = Wq q_ih - Wg g_i + b1 + We b2_h,  B_jh = Wk k_jh + Wg g_j
    sum_j a_ijh e_ijh = W2_h (sum_j a_ijh m_ij) + b2_h (sum_j a_ijh)

The gene panel touches spots only, and the frame mean stands before the last matrix, which is applied after the sum.

A layer's spots enter as ``terms`` [N, 2 * H * P + d] = [A | B | V], V the values, and leave as ``context`` [N, C] =
[sum_j a v_j (d) | sum_j a m_ij (H * E) | sum_j a (H) | zeros up to a multiple of CONTEXT_ALIGNMENT]. The attention
weights a sum to 1 unless there is dropout or no neighbour.

Sizes, in the shapes of all docstrings of the package and its kernels:

    N       spots of a graph, of one slide or of several packed; n: of a block of them
    S       slides of a graph
    B       slides of a padded call, images of a batch
    K       neighbours of a spot (n_neighbors)
    G       genes (n_genes)
    F       numbers of an embedding (feature_dim)
    L       layers (n_layers)
    H       heads (n_heads)
    d       hidden_dim, and de: pairwise_hidden_dim
    P       width of an MLP's pre-activation, before its gate; where no MLP is named, of mlp_attn for one head
    Z       width behind the gate: P / 2 with SwiGLU, else P
    Pe, E   these two of edge_trans; E is the width of an edge message
    C       width of a context
    R       draws
    M, Q    rows of what is said there; in the kernels of attention, edges and spots of a tile
    .       anything

A, B and V name tensors, as above, and are no sizes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..graph import MISSING
from ..kernels.conventions import (
    LAYERNORM_EPS,
    STREAM_ATTENTION,
    STREAM_EDGE_HIDDEN,
    STREAM_EDGE_OUT,
    STREAM_LOGIT,
    STREAM_LOGIT_HIDDEN,
    context_padding,
)
from .dropout import DropoutKeys, dropout


class MLPWeights(NamedTuple):
    """fc1 -> gate -> LayerNorm -> fc2, in torch.nn.Linear's layout."""

    fc1_weight: Tensor  # [P, in]
    fc1_bias: Tensor  # [P]
    norm_weight: Tensor  # [Z]
    norm_bias: Tensor  # [Z]
    fc2_weight: Tensor  # [out, Z]
    fc2_bias: Tensor  # [out]


class EdgeWeights(NamedTuple):
    """The folded weights of the edge side of one layer's attention (see :func:`fold_edge_weights`)."""

    edge: Tensor  # [4, Pe] fc1 of edge_trans: what p_x, p_y and r multiply, and the bias
    message_to_logit: Tensor  # [E, H * P] We W2_h for every head
    logit: Tensor  # [Z + 1] LayerNorm gain times fc2 of mlp_attn, and the rest of them in one number


class AttentionSpec(NamedTuple):
    n_heads: int
    edge_activation: str  # of edge_trans
    logit_activation: str  # of mlp_attn


class Dropouts(NamedTuple):
    """Dropout inside the attention of one layer; ``keys`` [N] of the spots, already of this layer."""

    keys: DropoutKeys | None
    mlp: float
    attention: float

    def rows(self, start: int, stop: int) -> Dropouts:
        return self if self.keys is None else self._replace(keys=self.keys.rows(start, stop))


def gate(pre: Tensor, activation: str) -> Tensor:
    """[..., P] -> [..., Z]: silu(a) * b of the two halves (SwiGLU), or gelu or relu."""
    if activation == "swiglu":
        first, second = pre.chunk(2, dim=-1)
        return F.silu(first).mul_(second)
    return F.gelu(pre) if activation == "gelu" else F.relu(pre)


def gated_mlp(
    x: Tensor, weights: MLPWeights, activation: str, p: float, keys: DropoutKeys | None, stream: int
) -> Tensor:
    """fc2(LayerNorm(dropout(gate(fc1(x))))), [N, in] -> [N, out]: timm's GluMlp / Mlp without the dropout of its
    output, which :func:`residual` has."""
    hidden = dropout(gate(F.linear(x, weights.fc1_weight, weights.fc1_bias), activation), p, keys, stream)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], weights.norm_weight, weights.norm_bias, LAYERNORM_EPS)
    return F.linear(hidden, weights.fc2_weight, weights.fc2_bias)


def residual(tokens: Tensor, update: Tensor, p: float, keys: DropoutKeys | None, stream: int) -> Tensor:
    """tokens + dropout(update), both [N, d]."""
    return tokens + dropout(update, p, keys, stream)


def gelu_norm(pre: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
    """LayerNorm(gelu(pre)) of pre [N, d], behind its gain and shift [d]."""
    return F.layer_norm(F.gelu(pre), pre.shape[-1:], *affine, LAYERNORM_EPS)


def gene_head(
    pre: Tensor, affine: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor], total: Tensor, relu: bool
) -> Tensor:
    """Expression [N, G] of :func:`gelu_norm` of pre [N, d] by weight [G, d] and bias [G], behind a ReLU or not; it is
    added to ``total`` [N, G] in place."""
    x = F.linear(gelu_norm(pre, affine), *head)
    x = x.relu_() if relu else x
    total += x
    return x


def joined_norm(tokens: Tensor, x: Tensor, columns: int) -> Tensor:
    """[LayerNorm(tokens) | x | 0] [N, columns] of tokens [N, d], without gain and shift, and x [N, G]."""
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=LAYERNORM_EPS)
    return F.pad(torch.cat([normed, x.to(normed.dtype)], dim=1), (0, columns - tokens.shape[1] - x.shape[1]))


def edge_messages(geometry: Tensor, weights: EdgeWeights, spec: AttentionSpec, dropouts: Dropouts) -> Tensor:
    """m_ij: the mean over the four sign frames of LayerNorm(gate(fc1([+-p_x, +-p_y, r]))), without its affine part.

    The frames differ by signs only: two products and four sums. The published dropout after fc2 stands before it
    here, where it still acts on each frame alone and lets fc2 move behind the mean.

    Args:
        geometry: [n, K, 3] projections and distance.

    Returns:
        [n, K, E].
    """
    along_x, along_y, along_r = (geometry[..., i : i + 1] * weights.edge[i] for i in range(3))
    base, plus, minus = along_r + weights.edge[3], along_x + along_y, along_x - along_y
    frames = torch.stack([base + plus, base + minus, base - minus, base - plus], dim=1)  # [n, 4, K, Pe]
    hidden = dropout(gate(frames, spec.edge_activation), dropouts.mlp, dropouts.keys, STREAM_EDGE_HIDDEN)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=LAYERNORM_EPS)
    messages = dropout(hidden, dropouts.mlp, dropouts.keys, STREAM_EDGE_OUT).mean(dim=1)
    return messages.to(weights.message_to_logit.dtype)


def attend(
    query: Tensor,
    terms: Tensor,
    neighbors: Tensor,
    messages: Tensor,
    weights: EdgeWeights,
    spec: AttentionSpec,
    dropouts: Dropouts,
) -> Tensor:
    """Attention of n spots over their neighbours.

    Args:
        query: [n, H * P] the terms A of the spots.
        terms: [N, 2 * H * P + d] of all spots.
        neighbors: [n, K] rows of ``terms``, MISSING where there is none.
        messages: [n, K, E].

    Returns:
        context [n, C].
    """
    n, k = neighbors.shape
    n_heads, width = spec.n_heads, query.shape[1]
    key, value = terms[:, width : 2 * width], terms[:, 2 * width :]
    present, near = neighbors != MISSING, neighbors.clamp(min=0).flatten()
    pre = key.index_select(0, near)
    # In place, so that the widest tensor is written once; autocast leaves such a product alone.
    pre.addmm_(messages.reshape(n * k, -1).to(pre.dtype), weights.message_to_logit.to(pre.dtype))
    pre = pre.view(n, k, n_heads, -1).add_(query.reshape(n, 1, n_heads, -1))
    hidden = dropout(gate(pre, spec.logit_activation), dropouts.mlp, dropouts.keys, STREAM_LOGIT_HIDDEN)
    logits = normed_product(hidden, weights.logit[:-1]) + weights.logit[-1]
    logits = dropout(logits, dropouts.mlp, dropouts.keys, STREAM_LOGIT)
    # A finite floor, not -inf: a spot without neighbours must give zeros and zero gradients, not NaN.
    logits = logits.masked_fill(~present.unsqueeze(-1), torch.finfo(logits.dtype).min)
    attention = logits.softmax(dim=1) * present.unsqueeze(-1)
    attention = dropout(attention, dropouts.attention, dropouts.keys, STREAM_ATTENTION)  # [n, K, H]
    near_values = value.index_select(0, near).view(n, k, n_heads, -1)
    # A sum of products: as a batch of products of 1 x K with K x d / H matrices it took nine times as long on a CPU.
    from_values = (near_values * attention.unsqueeze(-1)).sum(dim=1).view(n, -1)
    from_messages = (attention.transpose(1, 2) @ messages).view(n, -1)
    padding = context_padding(from_values.shape[1] + from_messages.shape[1] + n_heads)
    return torch.cat([from_values, from_messages, attention.sum(dim=1), attention.new_zeros(n, padding)], dim=1)


def normed_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """LayerNorm(hidden) @ weight over the last dimension, without gain and bias."""
    if hidden.device.type != "cpu" or hidden.element_size() < 4:
        return F.layer_norm(hidden, hidden.shape[-1:], eps=LAYERNORM_EPS) @ weight
    # On a CPU a LayerNorm of so short rows takes twice as long as these three passes.
    centred = hidden - hidden.mean(dim=-1, keepdim=True)
    variance = torch.linalg.vector_norm(centred, dim=-1).square() / hidden.shape[-1]
    product: Tensor = (centred @ weight) * (variance + LAYERNORM_EPS).rsqrt()
    return product


def attend_block(
    query: Tensor,
    terms: Tensor,
    neighbors: Tensor,
    geometry: Tensor,
    weights: EdgeWeights,
    spec: AttentionSpec,
    dropouts: Dropouts,
) -> Tensor:
    """:func:`attend` with the messages made on the way, for when they are not kept."""
    messages = edge_messages(geometry, weights, spec, dropouts)
    return attend(query, terms, neighbors, messages, weights, spec, dropouts)


def fold_edge_weights(
    edge: MLPWeights, logit: MLPWeights, logit_edge_weight: Tensor, n_heads: int
) -> tuple[EdgeWeights, Tensor, Tensor, Tensor]:
    """Fold what is linear between the edge MLP and the attention MLP (see the top of this file), of one layer or of
    several, stacked along the first axis.

    Args:
        edge: ``edge_trans``; out = H * (edge head width).
        logit: ``mlp_attn``; out = 1.
        logit_edge_weight: [P, edge head width] the columns of ``mlp_attn.fc1`` that read e_ij.

    Returns:
        The edge weights; the constant [H * P] that the pre-activation of every edge shares; and the affine map from
        a message to e_ij: [H, edge head width, E] and [H, edge head width].
    """
    to_edge = (edge.fc2_weight * edge.norm_weight.unsqueeze(-2)).unflatten(-2, (n_heads, -1))
    shifted = (edge.fc2_weight @ edge.norm_bias.unsqueeze(-1)).squeeze(-1)
    to_edge_bias = (shifted + edge.fc2_bias).unflatten(-1, (n_heads, -1))
    message_to_logit = (logit_edge_weight.unsqueeze(-3) @ to_edge).flatten(-3, -2).mT.contiguous()
    constant = (to_edge_bias @ logit_edge_weight.mT).flatten(-2)
    by_norm = logit.norm_weight * logit.fc2_weight.squeeze(-2)
    rest = (logit.fc2_weight @ logit.norm_bias.unsqueeze(-1)).squeeze(-1) + logit.fc2_bias
    weights = EdgeWeights(
        torch.cat([edge.fc1_weight.mT, edge.fc1_bias.unsqueeze(-2)], dim=-2),
        message_to_logit,
        torch.cat([by_norm, rest], dim=-1),
    )
    return weights, constant, to_edge, to_edge_bias

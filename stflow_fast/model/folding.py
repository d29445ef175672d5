"""A network's weights folded for a run: what spots and edges are multiplied with, small matrices all of them.

What is linear in a row is folded into one matrix: see ``ops/reference.py``. Autograd goes through it. The layers are
folded together, stacked, so that a training step launches for its weights what one layer needs: 333 times, not 739.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .. import ops
from ..config import DenoiserConfig
from ..kernels.conventions import context_padding
from ..ops.reference import EdgeWeights, MLPWeights, fold_edge_weights

Tree = TypeVar("Tree")


class Affine(NamedTuple):
    """Weight [out, in] and bias [out] of a product that several of the model's own may be folded into."""

    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Affine:
        return Affine(self.weight.to(dtype), self.bias.to(dtype))


class Linear(NamedTuple):
    """Weight [out, in] of a product without a bias."""

    weight: Tensor
    bias: None = None

    def to(self, dtype: torch.dtype) -> Linear:
        return Linear(self.weight.to(dtype))


class AttentionWeights(NamedTuple):
    """Parameters of an attention, but for what its MLP reads of the genes."""

    norm: Affine  # [d] and [d]
    qkv: Affine  # [3 * d, d]
    logit: MLPWeights  # mlp_attn, its first matrix [P, 2 * d / H + de / H] without the columns of genes
    edge: MLPWeights  # edge_trans
    output: MLPWeights  # W_output


class LayerWeights(NamedTuple):
    """Parameters of a layer; those of the genes, which may be many, are never stacked or copied."""

    attention: AttentionWeights
    mlp: MLPWeights
    hidden: Affine  # [d, d] the first product of the gene head


class FoldedAttention(NamedTuple):
    """Everything of an attention's weights that an edge or a spot multiplies with."""

    project: Affine  # [2 * H * P + d, d] of the tokens, normalised without gain: query terms, key terms, values
    edges: EdgeWeights
    output: MLPWeights  # W_output, its first matrix reading the context

    def of_autocast(self, dtype: torch.dtype) -> FoldedAttention:
        """With the weights in the type that the present autocast, of ``dtype``, brings them to."""
        edges = self.edges._replace(message_to_logit=self.edges.message_to_logit.to(dtype))
        return FoldedAttention(self.project.to(dtype), edges, ops.weights_of_autocast(self.output, dtype))


def fold_attention(weights: AttentionWeights, config: DenoiserConfig) -> FoldedAttention:
    """Of one layer or of several, stacked along the first axis."""
    n_heads, d, de = config.n_heads, config.hidden_dim, config.pairwise_hidden_dim
    head, edge_head = d // n_heads, de // n_heads
    by_query, by_key, by_edge = weights.logit.fc1_weight.split([head, head, edge_head], dim=-1)
    edges, constant, to_edge, to_edge_bias = fold_edge_weights(weights.edge, weights.logit, by_edge, n_heads)
    norm, qkv = weights.norm, weights.qkv
    query, key, value = (qkv.weight * norm.weight.unsqueeze(-2)).chunk(3, dim=-2)
    shifted = (qkv.weight @ norm.bias.unsqueeze(-1)).squeeze(-1)
    query_bias, key_bias, value_bias = (qkv.bias + shifted).chunk(3, dim=-1)

    def project(by: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = weight.unflatten(-2, (n_heads, head)), bias.unflatten(-1, (n_heads, head))
        return (by.unsqueeze(-3) @ weight).flatten(-3, -2), (bias @ by.mT).flatten(-2)

    query, query_bias = project(by_query, query, query_bias)
    key, key_bias = project(by_key, key, key_bias)
    on_values, on_edges = weights.output.fc1_weight.split([d, de], dim=-1)
    on_edges = on_edges.unflatten(-1, (n_heads, edge_head)).transpose(-3, -2)  # [H, d, edge head]
    on_messages = (on_edges @ to_edge).transpose(-3, -2).flatten(-2)  # [d, H * E]
    on_weight = (on_edges @ to_edge_bias.unsqueeze(-1)).squeeze(-1).mT  # [d, H]
    on_context = torch.cat([on_values, on_messages, on_weight], dim=-1)
    output = weights.output._replace(fc1_weight=F.pad(on_context, (0, context_padding(on_context.shape[-1]))))
    of_heads = torch.cat([weights.logit.fc1_bias] * n_heads, dim=-1)
    bias = torch.cat([query_bias + of_heads + constant, key_bias, value_bias], dim=-1)
    return FoldedAttention(Affine(torch.cat([query, key, value], dim=-2), bias), edges, output)


def join(project: Affine, gene: Affine | Linear, n_heads: int) -> Affine:
    """One product [2 * H * P + d, d + G + padding] that reads tokens and expression: A less the gene terms of every
    head, B and these, values. ``gene`` [P, G] brings the expression to these terms. Of one layer or of several.

    More than twice the work for each head of a product with the expression alone, and two passes over the terms less.
    """
    by_head = torch.cat([gene.weight] * n_heads, dim=-2)
    values = project.weight.shape[-2] - 2 * by_head.shape[-2]
    by_x = F.pad(torch.cat([-by_head, by_head], dim=-2), (0, 0, 0, values))
    weight, bias = torch.cat([project.weight, by_x], dim=-1), project.bias
    if gene.bias is not None:
        of_gene = torch.cat([gene.bias] * n_heads, dim=-1)
        bias = bias + F.pad(torch.cat([-of_gene, of_gene], dim=-1), (0, values))
    return Affine(F.pad(weight, (0, context_padding(weight.shape[-1]))), bias)


class LayerState(NamedTuple):
    """What a layer needs beside its inputs."""

    attention: FoldedAttention
    mlp: MLPWeights
    hidden: Affine  # [d, d] the first product of the gene head
    head: Affine  # [G, d] the last
    gene: Affine | Linear | None  # [P, G] of the expression to the gene terms; None of an x which is such terms
    joined: Affine | None  # :func:`join`, for the kernels
    messages: Tensor | None = None  # [N, K, E], kept where memory allows

    def of_autocast(self, dtype: torch.dtype) -> LayerState:
        """As :meth:`FoldedAttention.of_autocast`."""
        return LayerState(
            self.attention.of_autocast(dtype),
            ops.weights_of_autocast(self.mlp, dtype),
            self.hidden.to(dtype),
            self.head.to(dtype),
            self.gene and self.gene.to(dtype),
            self.joined and self.joined.to(dtype),
            self.messages,
        )


class LinearHeads(NamedTuple):
    """The gene heads of all layers, folded into what reads their expression; no ReLU or dropout may be behind one.

    With them nothing as wide as the genes is made between the first layer's gene terms and the mean; and as gene terms
    and Euler's steps are linear too, nothing between the first terms and the last mean of a sample.
    """

    read: list[tuple[Affine | None, Affine | None]]  # gene and joined of every layer, of what the head before it reads
    to_mean: Affine  # [G, L * d] what all heads read, to the mean of their expression
    to_first: Affine  # [P, L * d] the same, to that mean's gene terms in the first layer

    def to(self, dtype: torch.dtype) -> LinearHeads:
        read = [(gene and gene.to(dtype), joined and joined.to(dtype)) for gene, joined in self.read]
        return LinearHeads(read, self.to_mean.to(dtype), self.to_first.to(dtype))


class EncoderState(NamedTuple):
    """What an encoder's run needs of the weights, made once for several flow steps."""

    layers: list[LayerState]
    heads: LinearHeads | None  # where the L * d numbers of a spot that heads read are fewer than its genes

    @property
    def folded_heads(self) -> LinearHeads:
        """Of a network whose heads are folded."""
        assert self.heads is not None
        return self.heads

    def of_autocast(self) -> EncoderState:
        """These weights as the present autocast casts them in every call: for several calls under it, without
        gradients, which are the parameters'. The same without autocast."""
        weight = self.layers[0].mlp.fc1_weight
        dtype = ops.autocast_dtype(weight.device)
        if dtype is None or weight.dtype == torch.float64:  # which autocast leaves alone
            return self
        return EncoderState([layer.of_autocast(dtype) for layer in self.layers], self.heads and self.heads.to(dtype))

    def with_messages(self, messages: list[Tensor | None]) -> EncoderState:
        layers = zip(self.layers, messages, strict=True)
        return self._replace(layers=[layer._replace(messages=kept) for layer, kept in layers])

    def linear_layers(self) -> list[LayerState]:
        """The layers: the first of its gene terms, the others of what the gene head before them reads."""
        layers = zip(self.layers, self.folded_heads.read, strict=True)
        return [layer._replace(gene=gene, joined=joined) for layer, (gene, joined) in layers]


def fold_network(
    weights: Sequence[LayerWeights],
    genes: Sequence[Tensor],
    heads: Sequence[Affine],
    config: DenoiserConfig,
    dtype: torch.dtype | None,
    linear: bool,
) -> EncoderState:
    """All layers of a network.

    Args:
        weights: of every layer.
        genes: [P, G] of every layer, the columns of mlp_attn's first matrix that read the expression.
        heads: [G, d] of every layer.
        dtype: of the caller's autocast. With gradients the kernels' weights are cast to it here, together, as each
            product would; without, see :meth:`EncoderState.of_autocast`.
        linear: whether nothing behind a gene head keeps it from being folded.
    """
    parameters, mlp, hidden = _stacked(weights)
    attention = fold_attention(parameters, config)
    folded, joined = None, None
    if config.heads_are_narrow and linear:
        folded = fold_heads(_unstacked(attention.project), genes, heads, config.n_heads)
    elif _is_joined(mlp.fc1_weight):
        # Of more genes their terms are read, or the product would be larger than what it saves.
        read = [_identity(gene) for gene in genes] if config.heads_are_narrow else list(genes)
        joined = join(attention.project, Linear(torch.stack(read)), config.n_heads)
    if dtype is not None and torch.is_grad_enabled() and ops.on_triton(mlp.fc1_weight):
        attention, mlp, hidden = attention.of_autocast(dtype), ops.weights_of_autocast(mlp, dtype), hidden.to(dtype)
        folded, joined = folded and folded.to(dtype), joined and joined.to(dtype)
    of_layers = _unstacked((attention, mlp, hidden))
    joined_of_layers = _unstacked(joined) if joined else [None] * len(weights)
    layers = [
        LayerState(*folded_layer, head, Linear(gene), together)
        for folded_layer, together, gene, head in zip(of_layers, joined_of_layers, genes, heads, strict=True)
    ]
    return EncoderState(layers, folded)


def fold_heads(
    projects: Sequence[Affine], genes: Sequence[Tensor], heads: Sequence[Affine], n_heads: int
) -> LinearHeads:
    """The gene heads of all layers, which must be linear. ``projects`` are those of :class:`FoldedAttention`."""
    reading: list[Affine | None] = [None]
    reading += [_behind(by, head) for by, head in zip(genes[1:], heads[:-1], strict=True)]
    weight = torch.cat([head.weight for head in heads], dim=1) / len(heads)
    of_mean = Affine(weight, torch.stack([head.bias for head in heads]).mean(dim=0))
    joined: list[Affine | None] = [None] * len(heads)
    if _is_joined(weight):
        read = [gene or Linear(_identity(genes[0])) for gene in reading]
        joined = [join(project, gene, n_heads) for project, gene in zip(projects, read, strict=True)]
    return LinearHeads(list(zip(reading, joined, strict=True)), of_mean, _behind(genes[0], of_mean))


def _behind(by: Tensor, product: Affine) -> Affine:
    return Affine(by @ product.weight, by @ product.bias)


def _identity(by_gene: Tensor) -> Tensor:
    """[P, P] what brings gene terms to gene terms."""
    return torch.eye(len(by_gene), dtype=by_gene.dtype, device=by_gene.device)


def _is_joined(weight: Tensor) -> bool:
    """Whether a joined product is made: with gradients not where plain torch is known to run, which reads none."""
    return not torch.is_grad_enabled() or ops.on_triton(weight)


def _stacked(layers: Sequence[Tree]) -> Tree:
    """Tensors of every layer to tensors [L, ...]."""
    leaves, (kind, *_) = zip(*map(tree_flatten, layers), strict=True)
    stacked: Tree = tree_unflatten([torch.stack(each) for each in zip(*leaves, strict=True)], kind)
    return stacked


def _unstacked(stacked: Tree) -> list[Tree]:
    """Tensors [L, ...] to those of every layer, by one operation each: its gradient is one too."""
    leaves, kind = tree_flatten(stacked)
    return [tree_unflatten(list(each), kind) for each in zip(*(leaf.unbind() for leaf in leaves), strict=True)]

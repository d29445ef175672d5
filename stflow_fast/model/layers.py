"""The modules of a layer, with the published parameters under the published names.

What they compute is the rearranged mathematics of ops/reference.py, on a SpotGraph.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DenoiserConfig
from ..graph import SpotGraph
from ..kernels.conventions import LAYERNORM_EPS
from ..ops.dropout import DropoutKeys
from ..ops.reference import AttentionSpec, Dropouts, MLPWeights
from .folding import Affine, AttentionWeights, LayerState, LayerWeights

# Streams of randomness: an attention uses 0..4 (ops.reference), the rest of a layer these.
STREAM_OUTPUT, STREAM_MLP, STREAM_GENE_HIDDEN, STREAM_GENE = 8, 10, 12, 13


class GatedMLP(nn.Module):
    """Parameters of a gated MLP under timm's names (``SwiGLUPacked`` or ``Mlp`` with a LayerNorm)."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, activation: str) -> None:
        super().__init__()
        gated = hidden_features // 2 if activation == "swiglu" else hidden_features
        self.activation = activation
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.norm = nn.LayerNorm(gated)
        self.fc2 = nn.Linear(gated, out_features)

    @property
    def weights(self) -> MLPWeights:
        return MLPWeights(
            self.fc1.weight, self.fc1.bias, self.norm.weight, self.norm.bias, self.fc2.weight, self.fc2.bias
        )


class EdgeAttention(nn.Module):
    """Frame-averaged local attention (published: ``MLPAttnEdgeAggregation``)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        d, de = config.hidden_dim, config.pairwise_hidden_dim
        head, edge_head = d // config.n_heads, de // config.n_heads
        # The published code leaves mlp_attn at timm's default activation, gelu, in its relu variant too.
        logit_activation = "swiglu" if config.activation == "swiglu" else "gelu"
        self.config = config
        self.spec = AttentionSpec(config.n_heads, config.activation, logit_activation)
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d))
        self.mlp_attn = GatedMLP(2 * head + edge_head + config.n_genes, d, 1, logit_activation)
        self.edge_trans = GatedMLP(3, de, de, config.activation)
        self.W_output = GatedMLP(d + de, d, d, config.activation)

    @property
    def weights(self) -> AttentionWeights:
        """But for what :attr:`by_gene` is of."""
        norm, qkv = cast("tuple[nn.LayerNorm, nn.Linear]", tuple(self.layernorm_qkv))
        logit = self.mlp_attn.weights
        logit = logit._replace(fc1_weight=logit.fc1_weight[:, : -self.config.n_genes])
        output = self.W_output.weights
        return AttentionWeights(affine(norm), affine(qkv), logit, self.edge_trans.weights, output)

    @property
    def by_gene(self) -> Tensor:
        """[P, G] what the attention MLP reads of the genes."""
        return self.mlp_attn.fc1.weight[:, -self.config.n_genes :]

    def project(
        self,
        x: Tensor,
        tokens: Tensor,
        weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        out: Tensor | None = None,
    ) -> Tensor:
        """x and tokens [n, d] to the terms [A | B | V] [n, 2 * H * P + d], in the memory ``out`` where it is given.

        ``weights``: weight and bias of the product with tokens, and of the one that brings x to the gene terms; None
        where x is them.
        """
        weight, bias, to_gene, gene_bias = weights
        d = self.config.hidden_dim
        normed = F.layer_norm(tokens, (d,), eps=LAYERNORM_EPS)
        if out is None:
            terms = F.linear(normed, weight, bias)
        else:  # autocast leaves such a product alone
            rounded = (part.to(out.dtype) for part in (bias, normed, weight.T))
            terms = torch.addmm(*rounded, out=out)
        gene = x if to_gene is None else F.linear(x, to_gene, gene_bias)
        by_head = terms[:, : terms.shape[1] - d].unflatten(1, (2, self.spec.n_heads, -1))
        by_head[:, 0].sub_(gene.unsqueeze(1))
        by_head[:, 1].add_(gene.unsqueeze(1))
        return terms


class GeneUpdate(nn.Module):
    """The gene head of a layer; its parameters are those of the published Sequential (0, 2 and 4)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        d = config.hidden_dim
        self.config = config
        self.output = nn.Sequential(
            nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d), nn.Identity(), nn.Linear(d, config.n_genes)
        )

    @property
    def hidden(self) -> nn.Linear:
        return cast(nn.Linear, self.output[0])

    @property
    def norm(self) -> nn.LayerNorm:
        return cast(nn.LayerNorm, self.output[2])

    @property
    def head(self) -> nn.Linear:
        return cast(nn.Linear, self.output[4])

    def read(self, pre: Tensor, keys: DropoutKeys | None) -> Tensor:
        """What the head reads, [N, d], of the first product ``pre`` [N, d]."""

        def read(pre: Tensor, norm: tuple[Tensor, Tensor], keys: DropoutKeys | None) -> tuple[Tensor]:
            return (self._hidden(pre, norm, keys),)

        return ops.by_rows(read, (pre,), affine(self.norm), keys)[0]

    def _hidden(self, pre: Tensor, norm: tuple[Tensor, Tensor], keys: DropoutKeys | None) -> Tensor:
        return ops.apply_dropout(ops.gelu_norm(pre, norm), self.config.dropout, keys, STREAM_GENE_HIDDEN)

    def genes(self, pre: Tensor, layer: LayerState, keys: DropoutKeys | None, total: Tensor) -> Tensor:
        """The head's expression [N, G] of the first product ``pre`` [N, d], added to ``total`` [N, G] in place; under a
        ReLU in place, as it is the widest tensor of all."""
        config, weights = self.config, (*affine(self.norm), *layer.head)

        def at_once(
            pre: Tensor, total: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], keys: DropoutKeys | None
        ) -> tuple[Tensor]:
            return (ops.gene_head(pre, weights[:2], weights[2:], total, config.non_negative),)

        def genes(
            pre: Tensor, weights: tuple[Tensor, Tensor, Tensor, Tensor], keys: DropoutKeys | None
        ) -> tuple[Tensor]:
            genes = F.linear(self._hidden(pre, weights[:2], keys), *weights[2:])
            genes = ops.apply_dropout(genes, config.dropout, keys, STREAM_GENE)
            return (genes.relu_() if config.non_negative else genes,)

        if (keys is None or config.dropout == 0) and not torch.is_grad_enabled():
            return ops.by_rows(at_once, (pre, total), weights, None)[0]
        (x,) = ops.by_rows(genes, (pre,), weights, keys)
        total += x
        return x


class TransformerBlock(nn.Module):
    """Attention, MLP and gene head of one layer."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.attn = EdgeAttention(config)
        self.mlp = GatedMLP(config.hidden_dim, 4 * config.hidden_dim, config.hidden_dim, config.activation)
        self.gene_updater = GeneUpdate(config)

    @property
    def weights(self) -> LayerWeights:
        return LayerWeights(self.attn.weights, self.mlp.weights, affine(self.gene_updater.hidden))

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        layer: LayerState,
        graph: SpotGraph,
        keys: DropoutKeys | None,
        terms: ops.Gathered,
    ) -> tuple[Tensor, Tensor]:
        """x [N, .] of :meth:`EdgeAttention.project` and tokens [N, d] to the first product of the gene head [N, d] and
        the next layer's tokens, on a GPU without gradients in the memory of ``tokens``. ``terms`` is memory that the
        layers share: nine times the tokens, in pages that the system would else make anew for every layer (a tenth of a
        sample)."""
        attn, folded = self.attn, layer.attention
        p = attn.config.dropout

        def project(
            x: Tensor,
            tokens: Tensor,
            weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
            keys: DropoutKeys | None,
            out: tuple[Tensor] | None = None,
        ) -> tuple[Tensor]:
            return (attn.project(x, tokens, weights, *(out or ())),)

        def finish(
            tokens: Tensor, context: Tensor, weights: tuple[Tensor, ...], keys: DropoutKeys | None
        ) -> tuple[Tensor, Tensor]:
            output, mlp, hidden = MLPWeights(*weights[:6]), MLPWeights(*weights[6:12]), weights[12:]
            update = ops.gated_mlp(context, output, attn.W_output.activation, p, keys, STREAM_OUTPUT)
            tokens, read = ops.residual(tokens, update, p, keys, STREAM_OUTPUT + 1)
            update = ops.gated_mlp(read, mlp, self.mlp.activation, p, keys, STREAM_MLP)
            tokens, read = ops.residual(tokens, update, p, keys, STREAM_MLP + 1)
            return F.linear(read, *hidden), tokens

        if layer.joined is not None and ops.on_triton(tokens):
            projected = F.linear(ops.joined_norm(tokens, x, layer.joined.weight.shape[1]), *layer.joined)
        else:
            weights = (*folded.project, *(layer.gene or (None, None)))
            (projected,) = ops.by_rows(project, (x, tokens), weights, keys, terms)
        dropouts = Dropouts(keys, p, attn.config.attn_dropout)
        context = ops.edge_attention(projected, graph, layer.messages, folded.edges, attn.spec, dropouts)
        del projected  # the largest tensor of a layer, which nothing below reads
        behind = (*folded.output, *layer.mlp, *layer.hidden)
        pre, tokens = ops.by_rows(finish, (tokens, context), behind, keys)
        return pre, tokens


def affine(module: nn.Linear | nn.LayerNorm) -> Affine:
    return Affine(module.weight, module.bias)

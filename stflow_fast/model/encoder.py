"""The encoder: a stack of layers, run on a SpotGraph, or by the published padded call, which builds one."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DenoiserConfig, parse_bytes
from ..graph import SpotGraph
from ..ops.dropout import DropoutKeys
from ..threads import spread
from .calls import CALLS_BUDGET, KnownSlides
from .folding import Affine, EncoderState, LayerState, Linear, fold_network
from .layers import TransformerBlock, affine


class SpatialTransformer(nn.Module):
    """The encoder: a stack of layers over the K nearest spots; its output is the mean of the layers' gene heads."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.blks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.known = KnownSlides(parse_bytes(CALLS_BUDGET))

    @property
    def blocks(self) -> list[TransformerBlock]:
        """The layers, as the modules that they are."""
        return cast(list[TransformerBlock], list(self.blks))

    @property
    def n_neighbors(self) -> int:
        """As the published encoder names it."""
        return self.config.n_neighbors

    def forward(self, gene_exp: Tensor, features: Tensor, coords: Tensor, padding: Tensor | None = None) -> Tensor:
        """The published padded call: ``gene_exp`` [B, N, G], ``features`` [B, N, d], which are tokens, ``coords``
        [B, N, 2] -> [B, N, G].

        ``padding`` [B, N] is true for rows to leave out; their output is zero. As in the published code, it is by
        default the rows of ``features`` that sum to zero.
        """
        with spread(features.device):
            real = features.sum(dim=-1) != 0 if padding is None else ~padding
            graph, states = self._graph_of(coords, real, features), self.layer_states()
            if not (self.training or torch.is_grad_enabled()):
                states = self._with_known_messages(states, graph)
            rows = self.run(graph, graph.to_rows(gene_exp[real]), graph.to_rows(features[real]), states)
            prediction = gene_exp.new_zeros(gene_exp.shape)
            prediction[real] = graph.to_spots(rows)
            return prediction

    def _graph_of(self, coords: Tensor, real: Tensor, features: Tensor) -> SpotGraph:
        """Of the ``real`` [B, N] spots at coordinates [B, N, 2]; that of an earlier call where they are equal."""
        k, dtype, device = self.config.n_neighbors, torch.promote_types(features.dtype, torch.float32), features.device

        def build() -> SpotGraph:
            slide_ptr = F.pad(real.sum(dim=1).cpu().cumsum(0), (1, 0))
            return ops.build_graph(coords[real], k, slide_ptr, dtype, device)

        return self.known.graph(coords, real, (k, dtype, device), build)

    def _with_known_messages(self, states: EncoderState, graph: SpotGraph) -> EncoderState:
        """With the messages of an earlier call where graph, weights and precision are the same."""

        def make(budget: int) -> list[Tensor | None]:
            return [layer.messages for layer in self.keep_messages(states, graph, budget).layers]

        weights = [layer.attention.edges.edge for layer in states.layers]
        return states.with_messages(self.known.messages(graph, weights, ops.circumstances(graph.order.device), make))

    def layer_states(self) -> EncoderState:
        """Folded weights of every layer; differentiable, and reusable while the parameters stay.

        In the parameters' precision, under autocast too: products of weights would be rounded twice. With gradients
        the kernels' are then cast, all layers together: such states are for calls under the same autocast.
        """
        device = self.blocks[0].mlp.fc1.weight.device
        dtype = ops.autocast_dtype(device)
        with spread(device), torch.autocast(device.type, enabled=False):
            return fold_network(
                [block.weights for block in self.blocks],
                [block.attn.by_gene for block in self.blocks],
                [affine(block.gene_updater.head) for block in self.blocks],
                self.config,
                dtype,
                self._heads_are_linear,
            )

    @property
    def _heads_are_linear(self) -> bool:
        return not self.config.non_negative and not (self.training and self.config.dropout)

    def keep_messages(self, states: EncoderState, graph: SpotGraph, budget: int) -> EncoderState:
        """Keep the messages of as many layers as fit into ``budget`` bytes; the others are recomputed when needed."""
        messages = []
        for block, layer in zip(self.blocks, states.layers, strict=True):
            edges = layer.attention.edges
            budget -= ops.message_bytes(graph.n_spots, self.config.n_neighbors, edges)
            messages.append(ops.make_messages(graph.geometry, edges, block.attn.spec) if budget >= 0 else None)
        return states.with_messages(messages)

    def run(
        self,
        graph: SpotGraph,
        x: Tensor,
        tokens: Tensor,
        states: EncoderState,
        slide_seed: Tensor | None = None,
    ) -> Tensor:
        """Expression x [N, G] and tokens [N, d], rows of ``graph``, to the prediction [N, G].

        On a GPU, without gradients, ``tokens`` are overwritten.

        ``slide_seed`` [S] int64 seeds dropout in training mode; drawn by the graph's device when None.
        """
        with spread(x.device):
            tokens = tokens.contiguous()
            keys = self._dropout_keys(graph, slide_seed) if self.training else None
            if states.heads is not None and self._heads_are_linear:  # states may be of the other mode
                read = self.run_folded(graph, self.gene_terms(x, states), tokens, states, keys)
                return self.mean_of_heads(read, states).to(x.dtype)
            return self._run_layers(graph, x, tokens, states, keys)

    def _run_layers(
        self, graph: SpotGraph, x: Tensor, tokens: Tensor, states: EncoderState, keys: DropoutKeys | None
    ) -> Tensor:
        total, terms = x.new_zeros(x.shape), ops.Gathered(len(x))
        by_terms = self.config.heads_are_narrow and ops.on_triton(x)  # see fold_network
        for block, layer, layer_keys in zip(self.blocks, states.layers, self._keys_of_layers(keys), strict=True):
            if by_terms:
                x, layer = _gene_terms(x, layer), layer._replace(gene=None)
            pre, tokens = block(x, tokens, layer, graph, layer_keys, terms)
            x = block.gene_updater.genes(pre, layer, layer_keys, total)
            del pre  # not held while the next layer attends
        return total.div_(len(self.blks))

    def gene_terms(self, x: Tensor, states: EncoderState) -> Tensor:
        """Expression ``x`` [N, G], rows of anything, to all that layers read of it where heads are folded: [N, P]."""
        return _gene_terms(x, states.layers[0]).to(x.dtype)

    def run_folded(
        self, graph: SpotGraph, x: Tensor, tokens: Tensor, states: EncoderState, keys: DropoutKeys | None = None
    ) -> Tensor:
        """:meth:`run` of ``tokens`` [N, d] between :meth:`gene_terms` ``x`` [N, P] and what all gene heads read,
        [N, L * d]: see :class:`LinearHeads`."""
        read, terms = [], ops.Gathered(len(x))
        layers = zip(self.blocks, states.linear_layers(), self._keys_of_layers(keys), strict=True)
        for block, layer, layer_keys in layers:
            pre, tokens = block(x, tokens, layer, graph, layer_keys, terms)
            x = block.gene_updater.read(pre, layer_keys)
            del pre
            read.append(x)
        return torch.cat(read, dim=1)

    @staticmethod
    def mean_of_heads(read: Tensor, states: EncoderState) -> Tensor:
        """What all gene heads read, [n, L * d], rows of anything, to the mean of their expression [n, G]."""
        return _product(read, states.folded_heads.to_mean)

    def _keys_of_layers(self, keys: DropoutKeys | None) -> list[DropoutKeys | None]:
        return [None] * len(self.blks) if keys is None else [*keys.layers(len(self.blks))]

    @staticmethod
    def _dropout_keys(graph: SpotGraph, slide_seed: Tensor | None) -> DropoutKeys:
        if slide_seed is None:
            slide_seed = torch.randint(2**62, (graph.n_slides,), device=graph.slide_of.device)
        return DropoutKeys.for_spots(slide_seed, graph.slide_of, graph.spot_id)


def _gene_terms(x: Tensor, layer: LayerState) -> Tensor:
    """Expression x [N, G] to the gene terms [N, P] of a layer that reads it."""
    assert layer.gene is not None
    return _product(x, layer.gene)


def _product(x: Tensor, weights: Affine | Linear) -> Tensor:
    """x [N, .] times a matrix."""
    return ops.by_rows(lambda rows, weights, keys: (F.linear(rows, *weights),), (x,), weights, None)[0]

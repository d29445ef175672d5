"""Denoiser: STFlow's network with its parameters and its call, computed in memory linear in the spots.

The modules hold the published parameters under the published names, so checkpoints go both ways. What they compute
is the rearranged mathematics of ops/reference.py, on a SpotGraph; the padded calls build one and call the same.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .calls import CALLS_BUDGET, KnownSlides
from .config import DenoiserConfig, parse_bytes
from .errors import InputError
from .folding import Affine, AttentionWeights, EncoderState, LayerState, LayerWeights, fold_network
from .graph import SpotGraph
from .kernels.conventions import LAYERNORM_EPS
from .ops.dropout import DropoutKeys
from .ops.reference import AttentionSpec, Dropouts, MLPWeights
from .pretrained import Pretrained, Provenance
from .threads import spread

TIME_FREQUENCIES = 256
ROUNDED_UP = [12, 106]  # see TimestepEmbedder.frequencies

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
        norm, qkv = self.layernorm_qkv
        logit = self.mlp_attn.weights
        logit = logit._replace(fc1_weight=logit.fc1_weight[:, : -self.config.n_genes])
        output = self.W_output.weights
        return AttentionWeights(_affine(norm), _affine(qkv), logit, self.edge_trans.weights, output)

    @property
    def by_gene(self) -> Tensor:
        """[P, G] what the attention MLP reads of the genes."""
        return self.mlp_attn.fc1.weight[:, -self.config.n_genes :]

    def project(
        self, x: Tensor, tokens: Tensor, weights: tuple[Tensor | None, ...], out: Tensor | None = None
    ) -> Tensor:
        """x and tokens [n, d] to the terms [A | B | V] [n, 2 * H * P + d], in the memory ``out`` where it is given.

        ``weights``: weight and bias of the product with tokens, and of the one that brings x to the gene terms; None
        where x is them.
        """
        weight, bias, *to_gene = weights
        d = self.config.hidden_dim
        normed = F.layer_norm(tokens, (d,), eps=LAYERNORM_EPS)
        if out is None:
            terms = F.linear(normed, weight, bias)
        else:  # autocast leaves such a product alone
            cast = (part.to(out.dtype) for part in (bias, normed, weight.T))
            terms = torch.addmm(*cast, out=out)
        gene = x if to_gene[0] is None else F.linear(x, *to_gene)
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
    def head(self) -> nn.Linear:
        return self.output[4]

    def read(self, pre: Tensor, keys: DropoutKeys | None) -> Tensor:
        """What the head reads, [N, d], of the first product ``pre`` [N, d]."""

        def read(pre: Tensor, norm: tuple[Tensor, ...], keys: DropoutKeys | None) -> tuple[Tensor]:
            return (self._hidden(pre, norm, keys),)

        return ops.by_rows(read, (pre,), _affine(self.output[2]), keys)[0]

    def _hidden(self, pre: Tensor, norm: tuple[Tensor, ...], keys: DropoutKeys | None) -> Tensor:
        return ops.apply_dropout(ops.gelu_norm(pre, norm), self.config.dropout, keys, STREAM_GENE_HIDDEN)

    def genes(self, pre: Tensor, layer: LayerState, keys: DropoutKeys | None, total: Tensor) -> Tensor:
        """The head's expression [N, G] of the first product ``pre`` [N, d], added to ``total`` [N, G] in place; under a
        ReLU in place, as it is the widest tensor of all."""
        config, weights = self.config, (*_affine(self.output[2]), *layer.head)

        def at_once(pre: Tensor, total: Tensor, weights: tuple[Tensor, ...], keys: DropoutKeys | None) -> tuple[Tensor]:
            return (ops.gene_head(pre, weights[:2], weights[2:], total, config.non_negative),)

        def genes(pre: Tensor, weights: tuple[Tensor, ...], keys: DropoutKeys | None) -> tuple[Tensor]:
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
        return LayerWeights(self.attn.weights, self.mlp.weights, _affine(self.gene_updater.output[0]))

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
            weights: tuple[Tensor | None, ...],
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
        weights = (*folded.output, *layer.mlp, *layer.hidden)
        return ops.by_rows(finish, (tokens, context), weights, keys)


def _affine(module: nn.Linear | nn.LayerNorm) -> Affine:
    return Affine(module.weight, module.bias)


def _product(x: Tensor, weights: Affine) -> Tensor:
    """x [N, .] times a matrix."""
    return ops.by_rows(lambda rows, weights, keys: (F.linear(rows, *weights),), (x,), weights, None)[0]


class SpatialTransformer(nn.Module):
    """The encoder: a stack of layers over the K nearest spots; its output is the mean of the layers' gene heads."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.blks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.known = KnownSlides(parse_bytes(CALLS_BUDGET))

    @property
    def n_neighbors(self) -> int:
        """As the published encoder names it."""
        return self.config.n_neighbors

    def forward(self, gene_exp: Tensor, features: Tensor, coords: Tensor, padding: Tensor | None = None) -> Tensor:
        """The published padded call: [B, N, G], [B, N, d] tokens, [B, N, 2] -> [B, N, G].

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
        device = self.blks[0].attn.layernorm_qkv[1].weight.device
        dtype = ops.autocast_dtype(device)
        with spread(device), torch.autocast(device.type, enabled=False):
            return fold_network(
                [block.weights for block in self.blks],
                [block.attn.by_gene for block in self.blks],
                [_affine(block.gene_updater.head) for block in self.blks],
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
        for block, layer in zip(self.blks, states.layers, strict=True):
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
        for block, layer, layer_keys in zip(self.blks, states.layers, self._keys_of_layers(keys), strict=True):
            if by_terms:
                x, layer = _product(x, layer.gene), layer._replace(gene=None)
            pre, tokens = block(x, tokens, layer, graph, layer_keys, terms)
            x = block.gene_updater.genes(pre, layer, layer_keys, total)
            del pre  # not held while the next layer attends
        return total.div_(len(self.blks))

    def gene_terms(self, x: Tensor, states: EncoderState) -> Tensor:
        """Expression [N, G], rows of anything, to all that the layers read of it where heads are folded: [N, P]."""
        return _product(x, states.layers[0].gene).to(x.dtype)

    def run_folded(
        self, graph: SpotGraph, x: Tensor, tokens: Tensor, states: EncoderState, keys: DropoutKeys | None = None
    ) -> Tensor:
        """:meth:`run` between :meth:`gene_terms` x [N, P] and what all gene heads read, [N, L * d]: see
        :class:`LinearHeads`."""
        read, terms = [], ops.Gathered(len(x))
        for block, layer, layer_keys in zip(self.blks, states.linear_layers(), self._keys_of_layers(keys), strict=True):
            pre, tokens = block(x, tokens, layer, graph, layer_keys, terms)
            x = block.gene_updater.read(pre, layer_keys)
            del pre
            read.append(x)
        return torch.cat(read, dim=1)

    @staticmethod
    def mean_of_heads(read: Tensor, states: EncoderState) -> Tensor:
        """What all gene heads read, [n, L * d], rows of anything, to the mean of their expression [n, G]."""
        return _product(read, states.heads.to_mean)

    def _keys_of_layers(self, keys: DropoutKeys | None) -> list[DropoutKeys | None]:
        return [None] * len(self.blks) if keys is None else keys.layers(len(self.blks))

    @staticmethod
    def _dropout_keys(graph: SpotGraph, slide_seed: Tensor | None) -> DropoutKeys:
        if slide_seed is None:
            slide_seed = torch.randint(2**62, (graph.n_slides,), device=graph.slide_of.device)
        return DropoutKeys.for_spots(slide_seed, graph.slide_of, graph.spot_id)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of the flow time and an MLP (Peebles & Xie 2023, DiT)."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        self._frequencies: Tensor | None = None

    @staticmethod
    def frequencies() -> Tensor:
        """The 128 frequencies 10000^(-i / 128) on the CPU, float32, with the bits of the published code.

        It takes exp in float32, whose last bit is the library's: MKL's portable path, which made the golden files,
        and torch on AMD round all of them correctly but two, which they round up. Exponentials in float64 and these
        two give the same bits everywhere; one bit moves a float64 prediction by 1e-8.
        """
        half = TIME_FREQUENCIES // 2
        exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device="cpu") / half
        frequencies = exponent.double().exp().float()
        frequencies[ROUNDED_UP] = frequencies[ROUNDED_UP].nextafter(frequencies.new_tensor(1.0))
        return frequencies

    def _frequencies_on(self, device: torch.device) -> Tensor:
        """:meth:`frequencies` on a device, made by the first call there: the copy waits for a GPU.

        No buffer: casting the model would round it, and DistributedDataParallel would send it at every step.
        """
        if self._frequencies is None or self._frequencies.device != device:
            with torch.inference_mode(False):  # or no later call could differentiate by the time
                self._frequencies = self.frequencies().to(device)
        return self._frequencies

    def forward(self, t: Tensor) -> Tensor:
        """[S] in [0, 1] -> [S, d]. Angles, cosines and sines are float32, as published, whatever the model's dtype."""
        weight = self.mlp[0].weight
        angles = t.float().to(weight.device).unsqueeze(1) * self._frequencies_on(weight.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))


class Denoiser(nn.Module, Pretrained):
    """STFlow's denoiser: predicts the expression x_1 of all spots from x_t, t and their patch embeddings.

    Parameters have the published names and shapes: ``load_state_dict(torch.load(published, weights_only=True))``
    works with ``strict=True``, and the other way round.

    Attributes:
        observation: the law of x_1 around what is predicted (:mod:`.priors.observation`); None where none was fitted.
        source: what x_0 is drawn from, where that was fitted (:mod:`.priors.sources`).
    """

    def __init__(self, config: DenoiserConfig, provenance: Provenance | None = None) -> None:
        """Random weights. Raises InputError where ``provenance`` names another number of genes than ``config``."""
        super().__init__()
        self.config = config
        self.provenance = provenance or Provenance()
        self.observation, self.source = None, None
        if self.provenance.genes and len(self.provenance.genes) != config.n_genes:
            raise InputError(f"genes: {len(self.provenance.genes)} names for {config.n_genes} predicted genes")
        self.backbone = SpatialTransformer(config)
        self.fourier_proj = TimestepEmbedder(config.hidden_dim)
        self.image_transform = nn.Linear(config.feature_dim, config.hidden_dim)

    def build_graph(self, coords: Tensor, slide_ptr: Tensor | None = None) -> SpotGraph:
        """The SpotGraph of coordinates [N, 2] with this model's K, dtype and device; raises InputError as knn_graph."""
        weight = self.image_transform.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # positions do not fit into 16 bits
        return ops.build_graph(coords, self.config.n_neighbors, slide_ptr, dtype, weight.device)

    def denoise(
        self,
        graph: SpotGraph,
        x_t: Tensor,
        image: Tensor,
        t: Tensor,
        states: EncoderState | None = None,
        slide_seed: Tensor | None = None,
    ) -> Tensor:
        """Predict x_1 of packed slides.

        Args:
            graph: N spots of S slides.
            x_t: [N, G] noisy expression, rows of the graph.
            image: [N, d] ``image_transform(features)``, rows of the graph; made once for several steps.
            t: [S] flow time of each slide in [0, 1].
            states: of ``backbone.layer_states()``, when several calls share them.
            slide_seed: [S] int64, dropout in training mode.

        Returns:
            [N, G] prediction of x_1, rows of the graph.
        """
        with spread(image.device):
            if states is None:
                states = self.backbone.layer_states()
            return self.denoise_at(graph, x_t, image, self.fourier_proj(t), states, slide_seed)

    def denoise_at(
        self,
        graph: SpotGraph,
        x_t: Tensor,
        image: Tensor,
        time: Tensor,
        states: EncoderState,
        slide_seed: Tensor | None = None,
    ) -> Tensor:
        """:meth:`denoise` behind the embedding of the flow time, ``fourier_proj(t)`` [S, d]: device work alone."""
        of_spots = time if graph.n_slides == 1 else time[graph.slide_of]
        return self.backbone.run(graph, x_t, image + of_spots, states, slide_seed)

    def inference(
        self,
        noisy_exp: Tensor,
        img_features: Tensor,
        coords: Tensor,
        t_steps: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """The published padded call: [B, N, G], [B, N, F], [B, N, 2] and [B] -> x_1 [B, N, G].

        ``padding`` [B, N] is true for rows to leave out. Without it, padded rows take part as spots at their
        coordinates, usually (0, 0): the published code looks for padding behind ``image_transform``, where a row of
        zeros no longer is one. Packing slides (:meth:`denoise`) needs no padding at all.

        Raises:
            InputError: shapes that disagree with each other or with the model.
        """
        self._check(noisy_exp, img_features, coords, t_steps)
        with spread(img_features.device):
            tokens = self.image_transform(img_features) + self.fourier_proj(t_steps).unsqueeze(1)
            return self.backbone(noisy_exp, tokens, coords, padding)

    def forward(
        self, exp: Tensor, img_features: Tensor, coords: Tensor, labels: Tensor, t_steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The published training call: prediction [B, N, G], and its mean squared error against ``labels`` over the
        spots whose features do not sum to zero. Shapes and errors as :meth:`inference`."""
        prediction = self.inference(exp, img_features, coords, t_steps)
        real = img_features.sum(dim=-1) != 0
        return prediction, F.mse_loss(prediction[real], labels[real])

    def _check(self, noisy_exp: Tensor, img_features: Tensor, coords: Tensor, t_steps: Tensor) -> None:
        batch = tuple(noisy_exp.shape[:2])
        expected = {
            "noisy_exp": (noisy_exp, (*batch, self.config.n_genes)),
            "img_features": (img_features, (*batch, self.config.feature_dim)),
            "coords": (coords, (*batch, 2)),
            "t_steps": (t_steps, batch[:1]),
        }
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise InputError(f"{name}: must have shape {list(shape)}, not {list(tensor.shape)}")

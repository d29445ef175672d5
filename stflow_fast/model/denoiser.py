"""Denoiser: STFlow's network with its parameters and its calls."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..config import DenoiserConfig
from ..errors import InputError
from ..graph import SpotGraph
from ..pretrained import Pretrained, Provenance
from ..threads import spread
from .encoder import SpatialTransformer
from .folding import EncoderState

TIME_FREQUENCIES = 256
ROUNDED_UP = [12, 106]  # see TimestepEmbedder.frequencies


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
        weight = cast(nn.Linear, self.mlp[0]).weight
        angles = t.float().to(weight.device).unsqueeze(1) * self._frequencies_on(weight.device)
        embedded: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(weight.dtype))
        return embedded


class Denoiser(nn.Module, Pretrained):
    """STFlow's denoiser: predicts the expression x_1 of all spots from x_t, t and their patch embeddings.

    Parameters have the published names and shapes: ``load_state_dict(torch.load(published, weights_only=True))``
    works with ``strict=True``, and the other way round.

    Attributes:
        observation: the law of x_1 around what is predicted (:mod:`..priors.observation`); None where none was fitted.
        source: what x_0 is drawn from, where that was fitted (:mod:`..priors.fitted`).
    """

    def __init__(self, config: DenoiserConfig, provenance: Provenance | None = None) -> None:
        """Random weights.

        Raises:
            InputError: ``provenance`` names another number of genes than ``config``.
        """
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
        """The SpotGraph of ``coords`` [N, 2] with this model's K, dtype and device; ``slide_ptr`` [S + 1] as knn_graph.

        Raises:
            InputError: as knn_graph.
        """
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
        """:meth:`denoise` of ``x_t`` [N, G] and ``image`` [N, d] behind the embedding of the flow time, ``time`` [S, d]
        by ``fourier_proj``, with ``slide_seed`` [S] as there: device work alone."""
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
        """The published padded call: ``noisy_exp`` [B, N, G], ``img_features`` [B, N, F], ``coords`` [B, N, 2] and
        ``t_steps`` [B] -> x_1 [B, N, G].

        ``padding`` [B, N] is true for rows to leave out. Without it, padded rows take part as spots at their
        coordinates, usually (0, 0): the published code looks for padding behind ``image_transform``, where a row of
        zeros no longer is one. Packing slides (:meth:`denoise`) needs no padding at all.

        Raises:
            InputError: shapes that disagree with each other or with the model.
        """
        self._check(noisy_exp, img_features, coords, t_steps)
        with spread(img_features.device):
            tokens = self.image_transform(img_features) + self.fourier_proj(t_steps).unsqueeze(1)
            prediction: Tensor = self.backbone(noisy_exp, tokens, coords, padding)
            return prediction

    def forward(
        self, exp: Tensor, img_features: Tensor, coords: Tensor, labels: Tensor, t_steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The published training call: prediction [B, N, G], and its mean squared error against ``labels`` [B, N, G]
        over the spots whose features do not sum to zero. ``exp`` [B, N, G] is noisy, ``img_features`` [B, N, F],
        ``coords`` [B, N, 2] and ``t_steps`` [B] as in :meth:`inference`.

        Raises:
            InputError: as :meth:`inference`.
        """
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

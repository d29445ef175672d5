"""A denoiser call in the parts that a loop of calls needs, with the heads folded or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..flow import Predict
from ..graph import SpotGraph
from ..model import Denoiser, EncoderState


class DenoiserCall(NamedTuple):
    """A denoiser call in parts: those as wide as the genes treat every spot alone, and a loop of calls needs neither
    between its first and its last. Spots are in the caller's order outside. With the heads folded it reads gene terms
    [., P], and what is read at its end is what all heads read, [., L * d]; else both are [., G]."""

    enter: Callable[[Tensor], Tensor]  # x_t [n, G] of some spots to all that the network reads of it, [n, .]
    target: Predict  # that of all spots [N, .], rows of the graph, and t to that of the x_1 that is predicted
    read: Predict  # that of all spots, and t, to what this x_1 is made of, [N, .], rows of the graph
    leave: Callable[[Tensor], Tensor]  # this, of some spots, to their x_1 [n, G]


States = Callable[[], EncoderState]
"""The states of a slide, as the present autocast casts them."""


def plain_call(
    model: Denoiser, embed_time: Callable[[float], Tensor], graph: SpotGraph, image: Tensor, states: States
) -> DenoiserCall:
    """The network reads and predicts the expression itself."""

    def target(x_t: Tensor, t: float) -> Tensor:
        return model.denoise_at(graph, x_t, image, embed_time(t), states())

    return DenoiserCall(_as_it_is, target, target, _as_it_is)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def folded_call(
    model: Denoiser,
    embed_time: Callable[[float], Tensor],
    graph: SpotGraph,
    image: Tensor,
    states: States,
    cast_states: States,
) -> DenoiserCall:
    """Products as wide as the genes are made before the loop and behind it, and what is ordered is as wide as the
    network. ``cast_states`` are those without messages: what leaves the loop outlives the slide's memory."""
    backbone, dtype = model.backbone, image.dtype

    def read(terms: Tensor, t: float) -> Tensor:
        return backbone.run_folded(graph, terms, image + embed_time(t), states())

    return DenoiserCall(
        lambda x_t: backbone.gene_terms(x_t, states()),
        lambda terms, t: F.linear(read(terms, t), *states().folded_heads.to_first),
        read,
        lambda read: backbone.mean_of_heads(read, cast_states()).to(dtype),
    )

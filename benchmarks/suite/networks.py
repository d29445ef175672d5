"""The networks that providers run: weights of one seed, what they need, and what keeps the kernels from them."""

from __future__ import annotations

from typing import Any

import torch
from stflow_fast.kernels.conventions import Settings, Sizes

from stflow_fast import Denoiser, DenoiserConfig, ops
from stflow_fast.ops.backend import EdgeWork, Workload, why_not_triton

from ..opponents.eager_stflow import EagerDenoiser


def our_network(config: DenoiserConfig) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(config).eval()


def published_network(config: DenoiserConfig, **attention: type) -> EagerDenoiser:
    """With our weights of seed 0."""
    settings: dict[str, Any] = {**config.to_dict(), **attention}
    model = EagerDenoiser(**settings)
    model.load_state_dict(our_network(config).state_dict())
    return model.eval()


def edge_bytes(config: DenoiserConfig) -> int:
    """Float32 bytes per edge at the peak of a published layer: input and gate of the attention MLP beside the edge."""
    d, de, heads, genes = config.hidden_dim, config.pairwise_hidden_dim, config.n_heads, config.n_genes
    message = 2 * d + de + heads * genes
    return int(4 * (message + de + genes + 2 * heads * d + 12))


def edge_sizes(config: DenoiserConfig) -> Sizes:
    """Of SwiGLU's messages."""
    return Sizes(
        config.n_neighbors, config.pairwise_hidden_dim // 2, config.n_heads * config.hidden_dim, config.hidden_dim
    )


def triton_lacks(config: DenoiserConfig, device: torch.device) -> str | None:
    """What keeps the kernels from a network, or None. Also float32's shared memory on small GPUs, as
    ops.edge_attention asks."""
    settings = Settings(config.n_heads, config.activation, config.activation)
    work = EdgeWork(ops.TRAINED_BY, edge_sizes(config), settings)
    return why_not_triton(Workload(device, k=config.n_neighbors, edges=work), interpreted=True)

"""A small model and slides that it samples, and how far a large sample is off in its last corner."""

from __future__ import annotations

import numpy as np
import torch

from stflow_fast import use_backend
from stflow_fast.config import DenoiserConfig
from stflow_fast.model import Denoiser
from stflow_fast.sampling import sample
from stflow_fast.slides import Slide


def model(n_genes: int = 5) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig(n_genes=n_genes, feature_dim=6, hidden_dim=16, pairwise_hidden_dim=16, n_layers=2))


def slide(n: int = 40, name: str = "a") -> Slide:
    rng = np.random.default_rng(n)
    features = rng.normal(size=(n, 6)).astype(np.float32)
    return Slide(name, features, rng.uniform(size=(n, 2)) * 1000, np.arange(n).astype(str))


def last_corner(side: int, width: int) -> torch.Tensor:
    """Spots of a square of so many rows, those of its last rows and columns."""
    spot = torch.arange(side * side)
    return torch.minimum(spot // side, spot % side) >= side - width


def error_in_the_last_corner(network: Denoiser, side: int, patch: int, margin: int) -> float:
    """Of a large sample of a jittered square lattice, against plain torch on a patch around the corner: a layer carries
    a spot's influence less than 2.7 rows on, in each call, and behind that margin nothing is left of the border."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    features = torch.randn(side * side, config.feature_dim, generator=generator)
    x_0 = torch.rand(side * side, config.n_genes, generator=generator)
    spot = torch.arange(side * side)
    coords = torch.stack([spot % side, spot // side], dim=1) + 0.8 * torch.rand(side * side, 2, generator=generator)
    drawn = sample(network, (features, coords), x_0=x_0, n_sample_steps=3).expression
    near = last_corner(side, patch)
    with use_backend("reference"):
        expected = sample(network, (features[near], coords[near]), x_0=x_0[near], n_sample_steps=3).expression
    corner = last_corner(patch, patch - margin)
    return ((drawn[near][corner] - expected[corner]).norm() / expected[corner].norm()).item()

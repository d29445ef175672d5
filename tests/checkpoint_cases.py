"""The settings and inputs of small models of either layout."""

from __future__ import annotations

import torch

SHAPE = {"n_genes": 6, "feature_dim": 9, "hidden_dim": 16, "pairwise_hidden_dim": 8, "n_layers": 2, "n_neighbors": 4}


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return (
        torch.rand(2, 30, 6).double(),
        torch.randn(2, 30, 9).double(),
        torch.rand(2, 30, 2).double(),
        torch.rand(2).double(),
    )

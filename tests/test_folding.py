"""Weights folded together are those of every layer folded alone; those of the genes are not copied."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from stflow_fast import Denoiser, DenoiserConfig, ops
from stflow_fast.model import SpatialTransformer
from stflow_fast.model.folding import fold_attention

from .kernel_cases import DEVICE


def encoder(n_genes: int = 7, n_layers: int = 3, **rest: object) -> SpatialTransformer:
    torch.manual_seed(0)
    return Denoiser(DenoiserConfig(n_genes, 6, hidden_dim=16, n_layers=n_layers, n_heads=2, **rest)).backbone


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_layers_are_folded_as_if_alone(activation: str) -> None:
    network = encoder(activation=activation).double()
    layers = network.layer_states().layers
    for block, layer in zip(network.blks, layers, strict=True):
        alone = fold_attention(block.attn.weights, network.config)
        for found, expected in zip(tree_leaves(layer.attention), tree_leaves(alone), strict=True):
            assert found.is_contiguous()
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(layer.mlp.fc1_weight, block.mlp.fc1.weight)


def test_a_joined_product_is_that_of_tokens_and_genes() -> None:
    network = encoder().double()
    with torch.no_grad():
        layer = network.layer_states().layers[1]
    config, project = network.config, layer.attention.project
    tokens, x = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = torch.nn.functional.linear(tokens, *project)
    terms = (x @ layer.gene.weight.T).repeat(1, config.n_heads)
    width = terms.shape[1]
    expected[:, :width] -= terms
    expected[:, width : 2 * width] += terms
    padding = torch.full((5, layer.joined.weight.shape[1] - 23), 9.0, dtype=torch.float64)
    found = torch.nn.functional.linear(torch.cat([tokens, x, padding], dim=1), *layer.joined)
    torch.testing.assert_close(found, expected)
    assert layer.joined.weight.shape[1] % 8 == 0


def test_matrices_of_the_genes_stay_where_they_are() -> None:
    network = encoder(n_genes=200)
    layers = network.layer_states().layers
    for block, layer in zip(network.blks, layers, strict=True):
        assert layer.head.weight is block.gene_updater.head.weight
        first = block.attn.mlp_attn.fc1.weight
        assert layer.gene.weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_weights_are_cast_together_for_kernels_with_gradients(backend: str, gradients: bool) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if DEVICE == "cuda":
            pytest.skip("kernels on the CPU are interpreted, and here they are compiled")
    network = encoder()
    with ops.use_backend(backend), torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16):
        layer = network.layer_states().layers[0]
    cast = torch.bfloat16 if backend == "triton" and gradients else torch.float32
    types = {layer.mlp.fc1_weight.dtype, layer.hidden.weight.dtype, layer.attention.edges.message_to_logit.dtype}
    assert types == {cast}
    assert layer.attention.edges.edge.dtype == layer.head.weight.dtype == torch.float32
    assert (layer.joined is None) == (backend == "reference" and gradients)

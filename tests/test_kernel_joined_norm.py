"""[LayerNorm(tokens) | x | 0] by the interpreted kernel against its reference, and in a sample."""

from __future__ import annotations

import pytest
import torch

from stflow_fast import Denoiser, DenoiserConfig, sample
from stflow_fast.errors import InputError
from stflow_fast.ops import reference, use_backend

from .kernel_cases import poisoned_memory

kernels = pytest.importorskip("stflow_fast.kernels.joined_norm")
nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


@pytest.mark.parametrize(
    ("n", "d", "genes", "columns"),
    [(0, 16, 5, 24), (1, 16, 5, 24), (129, 128, 50, 184), (130, 48, 65, 113), (7, 20, 200, 220), (3, 1, 1, 2)],
)
def test_it_is_the_reference(n: int, d: int, genes: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens, x = (torch.randn(n, width, generator=draw) for width in (d, genes))
    affine = torch.randn(d, generator=draw), torch.randn(d, generator=draw)
    found = kernels.joined_norm(tokens, affine, x, columns, torch.float32)
    doubles = tuple(each.double() for each in affine)
    expected = reference.joined_norm(tokens.double(), doubles, x.double(), columns)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, d : d + genes], x)
    assert not found[:, d + genes :].any()


def test_what_it_would_misread_is_refused_by_name() -> None:
    tokens, x, affine = torch.ones(3, 8), torch.ones(3, 4), (torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match="tokens and x: must be matrices of at most 11 columns"):
        kernels.joined_norm(tokens, affine, x, 11, torch.float32)
    with pytest.raises(InputError, match="x: must have shape"):
        kernels.joined_norm(tokens, affine, x[:2], 12, torch.float32)
    with pytest.raises(InputError, match="gain: must have shape"):
        kernels.joined_norm(tokens, (affine[0][:4], affine[1]), x, 12, torch.float32)
    with pytest.raises(InputError, match="x: must be contiguous"):
        kernels.joined_norm(tokens, affine, torch.ones(4, 3).T, 12, torch.float32)


@pytest.mark.parametrize("n_genes", [3, 40])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_a_sample_is_that_of_the_separate_products(n_genes: int, activation: str) -> None:
    """Fewer genes than the layers' tokens have numbers: joined; 40: the gene heads are folded instead."""
    torch.manual_seed(0)
    config = DenoiserConfig(n_genes, feature_dim=6, hidden_dim=16, n_layers=2, n_heads=2, activation=activation)
    network, slide = Denoiser(config).eval(), (torch.randn(40, 6), torch.rand(40, 2))
    with torch.no_grad():
        assert (network.backbone.layer_states().layers[0].folded.joined is not None) == (n_genes == 3)
    expected = sample(network.double(), (slide[0].double(), slide[1])).expression
    with use_backend("triton"):
        found = sample(network.float(), slide).expression
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_weights_that_are_differentiated_are_not_joined() -> None:
    network = Denoiser(DenoiserConfig(n_genes=3, feature_dim=6, hidden_dim=16, n_layers=2, n_heads=2))
    assert network.backbone.layer_states().layers[0].folded.joined is None

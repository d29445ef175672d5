"""[LayerNorm(tokens) | x | 0] by the interpreted kernels against its reference, with its gradients, and in a sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stflow_fast import Denoiser, DenoiserConfig, sample
from stflow_fast.errors import InputError
from stflow_fast.ops import reference, use_backend

from .kernel_cases import DEVICE, assert_results_agree, differentiate, error, leaves, poisoned_memory

kernels = pytest.importorskip("stflow_fast.kernels.joined_norm")
launch = pytest.importorskip("stflow_fast.kernels.launch")

if DEVICE == "cuda":
    pytest.skip("compiled kernels have other precisions: see test_kernel_gpu.py", allow_module_level=True)

nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


def drawn(n: int, d: int, genes: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=draw) for width in (d, genes)]


@pytest.mark.parametrize(
    ("n", "d", "genes", "columns"),
    [(0, 16, 5, 24), (1, 16, 5, 24), (129, 128, 50, 184), (130, 48, 65, 113), (7, 20, 200, 220), (3, 3, 1, 4)],
)
def test_output_and_gradients_are_the_references(n: int, d: int, genes: int, columns: int) -> None:
    grad = torch.randn(n, columns, generator=torch.Generator().manual_seed(1))
    tokens, x = leaves(drawn(n, d, genes), torch.float64)
    exact = differentiate(reference.joined_norm(tokens, x, columns), grad, {"tokens": tokens, "x": x})
    tokens, x = leaves(drawn(n, d, genes), torch.float32)
    found = differentiate(kernels.joined_norm(tokens, x, columns, torch.float32), grad, {"tokens": tokens, "x": x})
    assert_results_agree(found, exact, 1e-5)
    assert torch.equal(found.output[:, d : d + genes], x.detach())
    assert not found.output[:, d + genes :].any()


def test_gradients_come_back_in_the_types_of_what_was_read() -> None:
    tokens, x = drawn(40, 32, 7)
    tokens, x = tokens.requires_grad_(), x.half().requires_grad_()
    joined = kernels.joined_norm(tokens, x, 40, torch.float16)
    grad = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)).half()
    joined.backward(grad)
    assert (joined.dtype, tokens.grad.dtype, x.grad.dtype) == (torch.float16, torch.float32, torch.float16)
    exact, _ = leaves((tokens.detach(), x.detach()), torch.float64)
    reference.joined_norm(exact, x.detach().double(), 40).backward(grad.double())
    assert error(tokens.grad, exact.grad) < 1e-5
    assert torch.equal(x.grad, grad[:, 32:39])


@pytest.mark.parametrize("rows", [4, 64])
def test_the_launch_that_is_tried_is_launched(rows: int) -> None:
    """A shape that was made before is not that of another tile."""
    before = kernels.joined_shape(90, "bf16", 128, 50, 184)
    with launch.use_launch("joined_norm", launch.Launch(rows, 2)):
        shape, tried = kernels.joined_shape(90, "bf16", 128, 50, 184)
        assert (shape.rows, tried) == (rows, launch.Launch(rows, 2))
        tokens, x = drawn(70, 16, 5)
        expected = reference.joined_norm(tokens, x, 24)
        torch.testing.assert_close(kernels.joined_norm(tokens, x, 24, torch.float32), expected)
    assert kernels.joined_shape(90, "bf16", 128, 50, 184) == before


def test_the_operators_are_registered_as_torch_wants_it() -> None:
    tokens, x = (tensor.requires_grad_() for tensor in drawn(5, 6, 3))
    torch.library.opcheck(torch.ops.stflow_fast.joined_norm, (tokens, x, 16, torch.float32))
    arguments = (torch.ones(5, 16), tokens.detach(), 3, torch.float32)
    torch.library.opcheck(torch.ops.stflow_fast.joined_norm_backward, arguments)


def test_what_it_would_misread_is_refused_by_name() -> None:
    tokens, x = torch.ones(3, 8), torch.ones(3, 4)
    with pytest.raises(InputError, match="tokens and x: must be matrices of at most 11 columns"):
        kernels.joined_norm(tokens, x, 11, torch.float32)
    with pytest.raises(InputError, match="x: must have shape"):
        kernels.joined_norm(tokens, x[:2], 12, torch.float32)
    with pytest.raises(InputError, match="x: must be contiguous"):
        kernels.joined_norm(tokens, torch.ones(4, 3).T, 12, torch.float32)
    with pytest.raises(InputError, match="dtype: the Triton kernels take"):
        kernels.joined_norm(tokens, x, 12, torch.float64)


def small(n_genes: int, **rest: object) -> Denoiser:
    """With a LayerNorm before the terms that does something: its gain and shift are folded into what follows."""
    torch.manual_seed(0)
    network = Denoiser(DenoiserConfig(n_genes, feature_dim=6, hidden_dim=16, n_layers=2, n_heads=2, **rest))
    with torch.no_grad():
        for block in network.backbone.blks:
            for norm in (block.attn.layernorm_qkv[0], block.gene_updater.output[2]):
                norm.weight.uniform_(0.5, 2)
                norm.bias.uniform_(-1, 1)
    return network


@pytest.mark.parametrize("n_genes", [3, 40])
@pytest.mark.parametrize("rest", [{}, {"activation": "relu"}, {"non_negative": True}])
def test_a_sample_is_that_of_the_separate_products(n_genes: int, rest: dict[str, object]) -> None:
    """40 genes are more than the heads of both layers read: heads are folded where no ReLU is behind them."""
    network, slide = small(n_genes, **rest).eval(), (torch.randn(40, 6), torch.rand(40, 2))
    expected = sample(network.double(), (slide[0].double(), slide[1])).expression
    with use_backend("triton"):
        found = sample(network.float(), slide).expression
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_genes", [3, 40])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_a_call_are_those_of_plain_torch(n_genes: int, training: bool) -> None:
    network = small(n_genes, dropout=0.3, attn_dropout=0.2).train(training)
    draw = torch.Generator().manual_seed(2)
    x_t, image, target = (torch.randn(40, width, generator=draw) for width in (n_genes, 16, n_genes))
    coords, t, seed = torch.rand(40, 2, generator=draw), torch.tensor([0.4]), torch.tensor([7])

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        network.to(dtype).zero_grad()
        with use_backend(backend):
            graph = network.build_graph(coords)
            predicted = network.denoise(graph, x_t.to(dtype), image.to(dtype), t, slide_seed=seed)
            ((predicted - target.to(dtype)) ** 2).mean().backward()
        return {name: value.grad.double() for name, value in network.named_parameters() if value.grad is not None}

    exact = gradients("reference", torch.float64)
    found = gradients("triton", torch.float32)
    assert found.keys() == exact.keys()
    largest = max(gradient.abs().max() for gradient in exact.values())
    for name, gradient in exact.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("non_negative", [False, True])
def test_expression_and_tokens_may_have_gaps(gradients: bool, non_negative: bool) -> None:
    network = small(3, non_negative=non_negative).eval()
    graph, t = network.build_graph(torch.rand(20, 2)), torch.tensor([0.3])
    x_t, image = torch.rand(3, 20).T, torch.rand(16, 20).T
    found = []
    for backend in ("reference", "triton"):
        with torch.set_grad_enabled(gradients), use_backend(backend):
            found.append(network.denoise(graph, x_t, image, t).detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_float64_is_left_alone_by_autocast() -> None:
    network = small(3).double().eval()
    graph, t = network.build_graph(torch.rand(20, 2)), torch.tensor([0.3])
    x_t, image = torch.rand(20, 3).double(), torch.rand(20, 16).double()
    with torch.no_grad():
        expected = network.denoise(graph, x_t, image, t)
        with torch.autocast("cpu", torch.bfloat16), use_backend("auto"):
            assert torch.equal(network.denoise(graph, x_t, image, t), expected)
        with torch.autocast("cpu", torch.bfloat16), use_backend("triton"), pytest.raises(InputError, match="float64"):
            network.denoise(graph, x_t, image, t)


def test_what_nothing_would_read_is_not_joined() -> None:
    network = small(3)
    assert network.backbone.layer_states().layers[0].joined is None
    with use_backend("triton"):
        assert network.backbone.layer_states().layers[0].joined is not None

"""What a denoiser promises beyond the golden files: invariances, packing, blocks, gradients and the odd sizes."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import stflow_fast.ops as ops
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.graph import SpotGraph
from stflow_fast.model import Denoiser, TimestepEmbedder
from stflow_fast.ops.dropout import DropoutKeys, dropout

SMALL = {"n_genes": 7, "feature_dim": 10, "hidden_dim": 16, "pairwise_hidden_dim": 24, "n_layers": 2, "n_neighbors": 5}


def small(seed: int = 0, **settings: object) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(DenoiserConfig(**{**SMALL, **settings})).double().eval()


def inputs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Expression [n, 7], features [n, 10] and coordinates [n, 2]."""
    draw = torch.Generator().manual_seed(seed)
    x, features = torch.rand(n, 7, generator=draw).double(), torch.randn(n, 10, generator=draw).double()
    return x, features, 100 * torch.rand(n, 2, generator=draw).double()


def predict(
    model: Denoiser, x: torch.Tensor, features: torch.Tensor, coords: torch.Tensor, t: float = 0.4
) -> torch.Tensor:
    return model.inference(x[None], features[None], coords[None], torch.tensor([t]).double())[0]


@pytest.mark.parametrize("lattice", [False, True])
@given(angle=st.floats(0, 6.28), mirror=st.booleans(), shift=st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4)))
def test_prediction_does_not_see_how_the_slide_lies(
    lattice: bool, angle: float, mirror: bool, shift: tuple[float, float]
) -> None:
    model = small()
    x, features, coords = inputs(64)
    if lattice:
        row, column = torch.arange(64).div(8, rounding_mode="floor"), torch.arange(64) % 8
        coords = 100 * torch.stack([column + 0.5 * (row % 2), row * 3**0.5 / 2], dim=1).double()
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]).double()
    if mirror:
        turn = turn @ torch.diag(torch.tensor([1.0, -1.0])).double()
    with torch.no_grad():
        before, after = (predict(model, x, features, c) for c in (coords, coords @ turn.T + torch.tensor(shift)))
    assert (before - after).abs().max() < 1e-6 * before.abs().max()


@given(seed=st.integers(0, 1000))
def test_prediction_follows_a_permutation_of_the_spots(seed: int) -> None:
    model = small()
    x, features, coords = inputs(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        plain, permuted = predict(model, x, features, coords), predict(model, x[order], features[order], coords[order])
    torch.testing.assert_close(permuted, plain[order], rtol=1e-9, atol=1e-10)


def test_packed_slides_are_predicted_as_alone() -> None:
    model = small()
    sizes, times = [1, 30, 3, 6, 5], torch.rand(5).double()
    slides = [inputs(n, seed) for seed, n in enumerate(sizes)]
    x, features, coords = (torch.cat(part) for part in zip(*slides, strict=True))
    graph = model.build_graph(coords, torch.tensor([0, *np.cumsum(sizes)]))
    with torch.no_grad():
        image = model.image_transform(graph.to_rows(features))
        packed = graph.to_spots(model.denoise(graph, graph.to_rows(x), image, times))
        alone = torch.cat([predict(model, *slide, t=float(t)) for slide, t in zip(slides, times, strict=True)])
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 6])
def test_small_slides_have_finite_predictions_and_gradients(n: int) -> None:
    model = small()
    prediction = predict(model, *inputs(n))
    assert prediction.shape == (n, 7)
    assert prediction.isfinite().all()
    prediction.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_slide_below_k_neighbours_ignores_what_is_missing() -> None:
    few, many = small(n_neighbors=5), small(n_neighbors=40)
    many.load_state_dict(few.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(predict(few, *inputs(6)), predict(many, *inputs(6)), rtol=1e-9, atol=1e-10)


def test_padding_that_is_named_is_left_out() -> None:
    model = small()
    x, features, coords = inputs(20)
    pad = [torch.cat([part, torch.zeros(9, part.shape[1]).double()])[None] for part in (x, features, coords)]
    padding = torch.arange(29)[None] >= 20
    with torch.no_grad():
        padded = model.inference(*pad, torch.tensor([0.4]).double(), padding=padding)[0]
        torch.testing.assert_close(padded[:20], predict(model, x, features, coords), rtol=1e-9, atol=1e-10)
    assert not padded[20:].any()


@pytest.mark.parametrize("training", [False, True])
def test_a_relu_that_cuts_nothing_changes_nothing(training: bool) -> None:
    """With more genes than the heads read, heads are folded, but not behind a ReLU or with dropout."""
    results = []
    for non_negative in (False, True):
        model = small(n_genes=40, dropout=0.3, attn_dropout=0.3, non_negative=non_negative).train(training)
        x, (_, features, coords) = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)).double(), inputs(30)
        for block in model.backbone.blks:
            torch.nn.init.constant_(block.gene_updater.head.bias, 20.0)
        torch.manual_seed(0)  # of dropout
        prediction = predict(model, x, features, coords)
        prediction.square().sum().backward()
        results.append([prediction.detach(), *(p.grad for p in model.parameters())])
    assert (results[0][0] >= 0).all()
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-7)


def test_the_prediction_has_the_precision_of_the_expression_under_autocast() -> None:
    for n_genes in (7, 40):
        model = small(n_genes=n_genes).float()
        _, features, coords = (part.float() for part in inputs(30))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert predict(model, torch.rand(30, n_genes), features, coords).dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Whole, and in blocks of a few spots with a backward that recomputes; with dropout too."""
    model = small(dropout=0.3, attn_dropout=0.3).train(training)
    x, features, coords = inputs(53)
    graph = model.build_graph(coords)
    seed = torch.tensor([5])

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        image = model.image_transform(graph.to_rows(features))
        output = model.denoise(graph, graph.to_rows(x), image, torch.tensor([0.4]).double(), slide_seed=seed)
        output.square().sum().backward()
        return output.detach(), [p.grad.clone() for p in model.parameters()]

    whole, whole_gradients = run()
    monkeypatch.setattr(ops, "KEPT_BYTES", 0)
    monkeypatch.setattr(ops, "TRAINED_BLOCK_BYTES", 40_000)
    blocks, block_gradients = run()
    torch.testing.assert_close(blocks, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block_gradients, whole_gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("trained", ["", "backbone.blks.1.gene_updater.output.4", "backbone.blks.1", "image_transform"])
def test_frozen_parts_get_no_gradient_and_the_others_theirs(trained: str) -> None:
    model = small()
    x, features, coords = inputs(53)
    graph = model.build_graph(coords)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        image = model.image_transform(graph.to_rows(features))
        loss = model.denoise(graph, graph.to_rows(x), image, torch.tensor([0.4]).double()).square().sum()
        if loss.requires_grad:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(trained) and name.startswith(trained))
    for parameter in model.parameters():
        parameter.grad = None
    found = gradients()
    assert found.keys() == {name for name in whole if trained and name.startswith(trained)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-10, atol=1e-12)


def test_kept_messages_change_nothing() -> None:
    model = small()
    x, features, coords = inputs(53)
    graph = model.build_graph(coords)
    t = torch.tensor([0.4]).double()
    with torch.no_grad():
        image = model.image_transform(graph.to_rows(features))
        states = model.backbone.layer_states()
        one_layer = ops.message_bytes(graph.n_spots, 5, states.layers[0].attention.edges)
        kept = [model.backbone.keep_messages(states, graph, budget) for budget in (0, one_layer, 10 * one_layer)]
        assert [sum(state.messages is not None for state in some.layers) for some in kept] == [0, 1, 2]
        first, *others = (model.denoise(graph, graph.to_rows(x), image, t, some) for some in kept)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_kept_messages_take_the_stated_bytes(autocast: bool) -> None:
    model = small().float()
    graph = model.build_graph(inputs(53)[2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states = model.backbone.layer_states()
        stated = ops.message_bytes(graph.n_spots, 5, states.layers[0].attention.edges)
        kept = model.backbone.keep_messages(states, graph, 2 * stated).layers
    assert [layer.messages.nbytes for layer in kept] == [stated, stated]


def test_compiled_blocks_equal_plain_ones() -> None:
    if ops.cpp_compiler() is None:
        pytest.skip("no C++ compiler here")
    model = small().float()
    x, features, coords = (part.float() for part in inputs(ops.COMPILED_BLOCK + 77))
    results = []
    for mode in ("off", "on"):
        with ops.use_compile(mode), torch.no_grad():
            results.append(predict(model, x, features, coords))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_input_gradients(activation: str) -> None:
    model = small(activation=activation, hidden_dim=8, pairwise_hidden_dim=8, n_layers=1, n_heads=2, n_neighbors=3)
    x, features, coords = inputs(6)
    graph = SpotGraph.build(coords, 3, None, torch.float64)

    def run(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return model.denoise(graph, x, model.image_transform(features), torch.tensor([0.3]).double())

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), features.requires_grad_()))


class StaysOn(TorchDispatchMode):
    """Lets no operation read or make anything on another device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} <= {self.device}, f"{function} leaves the device"
        return made


def test_a_training_step_takes_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host waits for a GPU, and cannot be captured. The device here is torch's "meta", which autocast
    does not know."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    model = small(dropout=0.3, attn_dropout=0.3)
    graph = model.build_graph(inputs(30)[2]).to("meta")
    model.to("meta").train()
    x, features, t = (torch.empty(*shape, dtype=torch.float64, device="meta") for shape in ((30, 7), (30, 10), (1,)))

    def step() -> None:
        model.denoise(graph, x, model.image_transform(features), t).sum().backward()

    step()  # moves what stays on the device from then on
    with StaysOn("meta"):
        step()


def test_the_embedding_of_the_time_keeps_its_bits_whatever_the_model_goes_through() -> None:
    embedder, t = TimestepEmbedder(8), torch.tensor([0.37])
    angles = t.unsqueeze(1) * TimestepEmbedder.frequencies()
    waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
    names = set(embedder.state_dict())
    with torch.inference_mode():
        embedder(t)
    state = embedder.state_dict()
    with torch.device("meta"):
        loaded = TimestepEmbedder(8)
        loaded(t)
    loaded.load_state_dict(state, assign=True)
    for module in (embedder, loaded):
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            cast = copy.deepcopy(module).to(dtype)
            assert torch.equal(cast(t), cast.mlp(waves.to(dtype)))
            assert set(cast.state_dict()) == names
        module(t.clone().requires_grad_()).sum().backward()


def test_dropout_depends_on_slide_and_spot_alone() -> None:
    model = small(dropout=0.4, attn_dropout=0.4).train()
    first, second = inputs(20, 0), inputs(30, 1)

    def run(slides: list[tuple[torch.Tensor, ...]], seeds: list[int]) -> list[torch.Tensor]:
        x, features, coords = (torch.cat(part) for part in zip(*slides, strict=True))
        sizes = [len(slide[0]) for slide in slides]
        graph = model.build_graph(coords, torch.tensor([0, *np.cumsum(sizes)]))
        image = model.image_transform(graph.to_rows(features))
        t = torch.full((len(sizes),), 0.4).double()
        rows = model.denoise(graph, graph.to_rows(x), image, t, slide_seed=torch.tensor(seeds))
        return list(graph.to_spots(rows).detach().split(sizes))

    a, b = run([first, second], [11, 12])
    d, c = run([second, first], [12, 11])
    torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(b, d, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(a, run([first], [13])[0])


def test_dropout_keeps_the_stated_share_and_the_mean() -> None:
    n, width = 500, 400
    keys = DropoutKeys.for_spots(torch.tensor([3, 2**61]), torch.arange(n) % 2, torch.arange(n))
    for p in (0.1, 0.5, 0.9):
        kept = dropout(torch.ones(n, width), p, keys, stream=1)
        assert abs((kept == 0).float().mean() - p) < 5 * (p * (1 - p) / (n * width)) ** 0.5
        torch.testing.assert_close(kept.unique(), torch.tensor([0.0, 1 / (1 - p)]))
        # No spot, channel or pair of streams is drawn alike.
        dropped = (kept == 0).float()
        spread = (p * (1 - p)) ** 0.5
        assert (dropped.mean(dim=1) - p).abs().max() < 5 * spread / width**0.5
        assert (dropped.mean(dim=0) - p).abs().max() < 5 * spread / n**0.5
        other = (dropout(torch.ones(n, width), p, keys, stream=2) == 0).float()
        agreement = ((dropped - p) * (other - p)).mean() / (p * (1 - p))
        assert abs(agreement) < 5 / (n * width) ** 0.5


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"n_genes": 0}, "n_genes"),
        ({"feature_dim": -1}, "feature_dim"),
        ({"hidden_dim": 18}, "hidden_dim"),
        ({"pairwise_hidden_dim": 10}, "pairwise_hidden_dim"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_heads": 2.0}, "n_heads"),
        ({"n_neighbors": 0}, "n_neighbors"),
        ({"dropout": 1.0}, "dropout"),
        ({"attn_dropout": -0.1}, "attn_dropout"),
        ({"activation": "tanh"}, "activation"),
        ({"non_negative": "yes"}, "non_negative"),
        ({"hidden_dim": 5, "pairwise_hidden_dim": 6, "n_heads": 1}, "hidden_dim"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: "):
        DenoiserConfig(**{**SMALL, **settings})


def test_unknown_settings_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="^width: is not a setting"):
        DenoiserConfig.from_dict({**SMALL, "width": 3})
    with pytest.raises(InputError, match="^n_genes: is missing"):
        DenoiserConfig.from_dict({"feature_dim": 3})


def test_shapes_that_disagree_are_refused_by_name() -> None:
    model, (x, features, coords) = small(), inputs(4)
    with pytest.raises(InputError, match="img_features: must have shape"):
        predict(model, x, features[:, :9], coords)
    with pytest.raises(InputError, match="noisy_exp: must have shape"):
        predict(model, x[:, :6], features, coords)

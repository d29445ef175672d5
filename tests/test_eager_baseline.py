"""The eager baseline of the benchmarks is the published algorithm: it equals the golden files too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.opponents import eager_stflow
from benchmarks.opponents.eager_stflow import (
    EagerDenoiser,
    EagerGeneUpdate,
    EagerMLP,
    EagerTimeEmbedding,
    dense_neighbors,
    eager_sample,
)
from stflow_fast.config import DenoiserConfig
from stflow_fast.model import Denoiser, TimestepEmbedder

from .golden import CASES, Golden, relative_error

TOLERANCE = 1e-9  # float64

Load = Callable[[str], tuple[Golden, EagerDenoiser]]


@pytest.fixture
def load(shared: Callable[[str], Path], same_frequencies: None) -> Load:
    """A golden file in float64 and the eager denoiser with its parameters, loaded strictly."""

    def load_case(name: str) -> tuple[Golden, EagerDenoiser]:
        golden = Golden(shared(f"golden/{name}.npz"))
        model = EagerDenoiser(feature_dim=golden["input/features"].shape[-1], **layer_settings(golden)).double()
        model.load_state_dict(golden.part("state/"), strict=True)
        return golden, model.eval()

    return load_case


def layer_settings(golden: Golden) -> dict[str, int | str | bool]:
    return {key: value for key, value in golden.config.items() if key != "feature_dim"}


@pytest.mark.parametrize("name", CASES)
def test_predictions(load: Load, name: str) -> None:
    golden, model = load(name)
    x, features, coords = (golden[f"input/{key}"] for key in ("gene_exp", "features", "coords"))
    with torch.no_grad():
        found = torch.stack([model.inference(x, features, coords, t.expand(len(x))) for t in golden["input/t"]])
    assert relative_error(found, golden["output/prediction"]) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_neighbours(load: Load, name: str) -> None:
    golden, _ = load(name)
    lengths = golden["input/lengths"]
    coords = torch.cat([slide[:n] for slide, n in zip(golden["input/coords"], lengths.tolist(), strict=True)])
    expected = golden["output/neighbors"]
    slide = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    found = dense_neighbors(coords, slide, expected.shape[1])
    assert torch.equal(found, expected)  # on the lattice too: ties in the order of torch.topk


@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_parameter_gradient(load: Load, name: str) -> None:
    golden, model = load(name)
    if "output/loss" not in golden:
        assert name in ("default_config", "small_relu", "visium_hex_grid", "wide_neighbourhood")
        return
    inputs = (golden[f"input/{key}"] for key in ("gene_exp", "features", "coords", "labels", "t_train"))
    _, loss = model(*inputs)
    assert relative_error(loss, golden["output/loss"]) < TOLERANCE
    loss.backward()
    expected = golden.part("grad/")
    assert expected.keys() == dict(model.named_parameters()).keys()
    for parameter, value in model.named_parameters():
        if expected[parameter].abs().max() < 1e-12:  # a bias in front of a softmax: its gradient is rounding
            assert value.grad.abs().max() < TOLERANCE, parameter
        else:
            assert relative_error(value.grad, expected[parameter]) < TOLERANCE, parameter


@pytest.mark.parametrize("name", ["default_config", "small_swiglu", "visium_hex_grid"])
def test_sampling_loop(load: Load, name: str) -> None:
    golden, model = load(name)
    features, coords, noise = (golden[f"input/{key}"][0] for key in ("features", "coords", "noise"))
    found = eager_sample(model, features, coords, noise, int(golden["input/n_sample_steps"]))
    assert relative_error(found, golden["output/sample"][0]) < TOLERANCE


def test_same_parameters_as_ours() -> None:
    """What the benchmark compares is one network: its parameters load into both, strictly."""
    ours = Denoiser(DenoiserConfig(n_genes=5, feature_dim=7))
    EagerDenoiser(n_genes=5, feature_dim=7).load_state_dict(ours.state_dict(), strict=True)


def test_frequencies_differ_from_ours_by_rounding_alone() -> None:
    found = EagerTimeEmbedding.frequencies(torch.device("cpu"))
    torch.testing.assert_close(found, TimestepEmbedder.frequencies(), rtol=2e-7, atol=0)


def recorded_dropout(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, float]]:
    """What enters every call of dropout that is not off, which then changes nothing."""
    calls: list[tuple[torch.Tensor, float]] = []

    def record(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if training and p:
            calls.append((x, p))
        return x

    monkeypatch.setattr(eager_stflow.F, "dropout", record)
    return calls


def test_dropout_of_a_gated_mlp_stands_before_the_norm_and_after_the_last_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = recorded_dropout(monkeypatch)
    mlp = EagerMLP(3, 8, 5, "swiglu", 0.3)
    x = torch.randn(2, 3)
    out = mlp(x)
    gate, value = mlp.fc1(x).chunk(2, dim=-1)
    assert [p for _, p in calls] == [0.3, 0.3]
    torch.testing.assert_close(calls[0][0], F.silu(gate) * value)
    torch.testing.assert_close(calls[1][0], out)


def test_dropout_of_a_gene_head_stands_behind_the_norm_and_the_last_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_dropout(monkeypatch)
    head = EagerGeneUpdate(5, 8, False, 0.3)
    x = torch.randn(2, 8)
    out = head(x)
    assert [p for _, p in calls] == [0.3, 0.3]
    torch.testing.assert_close(calls[0][0], head.output[:3](x))
    torch.testing.assert_close(calls[1][0], out)


def test_dropout_of_attention_acts_on_its_weights_after_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded_dropout(monkeypatch)
    model = EagerDenoiser(n_genes=3, feature_dim=4, n_layers=1, n_neighbors=2, dropout=0.1, attn_dropout=0.4)
    model.inference(torch.rand(1, 6, 3), torch.rand(1, 6, 4), torch.rand(1, 6, 2), torch.rand(1))
    [attention] = [x for x, p in calls if p == 0.4]
    assert attention.shape == (6, 2, 4, 1)  # [N, K, H, 1]: one mask per edge and head
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(6, 4, 1))

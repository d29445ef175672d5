"""The model equals the published code: predictions, neighbours, losses, gradients and sampling trajectories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stflow_fast.config import DenoiserConfig
from stflow_fast.graph import knn_graph
from stflow_fast.model import Denoiser
from stflow_fast.sampling import sample

from .golden import CASES, Golden, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}

Load = Callable[[str, torch.dtype], tuple[Golden, Denoiser]]


@pytest.fixture
def load(shared: Callable[[str], Path]) -> Load:
    """A golden file and our denoiser with its parameters, loaded strictly."""

    def load_case(name: str, dtype: torch.dtype) -> tuple[Golden, Denoiser]:
        golden = Golden(shared(f"golden/{name}.npz"), dtype)
        model = Denoiser(DenoiserConfig(**golden.config)).to(dtype)
        model.load_state_dict(golden.part("state/"), strict=True)
        return golden, model.eval()

    return load_case


def predictions(golden: Golden, model: Denoiser) -> torch.Tensor:
    x, features, coords = (golden[f"input/{name}"] for name in ("gene_exp", "features", "coords"))
    with torch.no_grad():
        return torch.stack([model.inference(x, features, coords, t.expand(len(x))) for t in golden["input/t"]])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_predictions(load: Load, name: str, dtype: torch.dtype) -> None:
    golden, model = load(name, dtype)
    assert relative_error(predictions(golden, model), golden["output/prediction"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", CASES)
def test_neighbours(load: Load, name: str) -> None:
    golden, _ = load(name, torch.float64)
    lengths, coords = golden["input/lengths"].tolist(), golden["input/coords"]
    packed = torch.cat([slide[:n] for slide, n in zip(coords, lengths, strict=True)])
    slide_ptr = torch.tensor([0, *lengths]).cumsum(0)
    expected = golden["output/neighbors"]
    found = knn_graph(packed, expected.shape[1], slide_ptr)
    if name != "visium_hex_grid":
        assert torch.equal(found, expected)
        return
    # On a lattice the published order within a tie is torch.topk's; ours is the index. The neighbours are the same,
    # and ours stand in order of distance.
    assert torch.equal(found.sort(dim=1).values, expected.sort(dim=1).values)
    distance = (packed[found] - packed[:, None]).norm(dim=-1)
    assert (distance.diff(dim=1) > -1e-5 * distance[:, 1:]).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_parameter_gradient(load: Load, name: str, dtype: torch.dtype) -> None:
    golden, model = load(name, dtype)
    if "output/loss" not in golden:
        assert name in ("default_config", "small_relu", "visium_hex_grid", "wide_neighbourhood")
        return
    x, features, coords, labels, t = (
        golden[f"input/{key}"] for key in ("gene_exp", "features", "coords", "labels", "t_train")
    )
    prediction, loss = model(exp=x, img_features=features, coords=coords, labels=labels, t_steps=t)
    assert prediction.shape == x.shape
    assert relative_error(loss, golden["output/loss"]) < TOLERANCE[dtype]
    loss.backward()
    expected = golden.part("grad/")
    assert expected.keys() == dict(model.named_parameters()).keys()
    for parameter, value in model.named_parameters():
        if expected[parameter].abs().max() < 1e-12:  # a bias in front of a softmax: its gradient is rounding
            assert value.grad.abs().max() < TOLERANCE[dtype], parameter
        else:
            assert relative_error(value.grad, expected[parameter]) < TOLERANCE[dtype], parameter


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["default_config", "small_swiglu", "visium_hex_grid"])
def test_sampling_trajectory(load: Load, name: str, dtype: torch.dtype) -> None:
    golden, model = load(name, dtype)
    features, coords, noise = (golden[f"input/{key}"][0] for key in ("features", "coords", "noise"))
    steps = int(golden["input/n_sample_steps"])
    drawn = sample(model, (features, coords), x_0=noise, n_sample_steps=steps, trajectory=True)
    assert drawn.nfe == steps - 1
    assert relative_error(drawn.trajectory, golden["output/trajectory"][:, 0]) < TOLERANCE[dtype]
    assert relative_error(drawn.expression, golden["output/sample"][0]) < TOLERANCE[dtype]

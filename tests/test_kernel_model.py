"""The whole model through the kernels: golden files, dropout, sampling, small slides; and by blocks of spots."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import stflow_fast
import stflow_fast.ops as ops
from stflow_fast.model import Denoiser

from .backend_cases import interpreted, large_tiles, nothing_is_asked_for, predict
from .golden import CASES, Golden, relative_error
from .test_golden import Load, load
from .test_model import inputs, small

__all__ = ["large_tiles", "load", "nothing_is_asked_for"]  # fixtures

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # a sigmoid of -90 is 0


def first_prediction(golden: Golden, model: Denoiser) -> Tensor:
    x, features, coords = (golden[f"input/{name}"] for name in ("gene_exp", "features", "coords"))
    with torch.no_grad():
        return model.inference(x, features, coords, golden["input/t"][0].expand(len(x)))


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_kernels_predict_what_the_published_code_does(load: Load, name: str) -> None:
    golden, model = load(name, torch.float32)
    with ops.use_backend("triton"):
        found = first_prediction(golden, model)
    assert relative_error(found, golden["output/prediction"][0]) < 1e-5


@interpreted
@pytest.mark.parametrize("name", ["small_gelu", "small_swiglu", "non_negative", "batched_padding"])
def test_kernels_learn_what_the_published_code_does(load: Load, name: str) -> None:
    golden, model = load(name, torch.float32)
    x, features, coords, labels, t = (
        golden[f"input/{key}"] for key in ("gene_exp", "features", "coords", "labels", "t_train")
    )
    with ops.use_backend("triton"):
        _, loss = model(exp=x, img_features=features, coords=coords, labels=labels, t_steps=t)
        loss.backward()
    assert relative_error(loss, golden["output/loss"]) < 1e-5
    expected = golden.part("grad/")
    for parameter, value in model.named_parameters():
        if expected[parameter].abs().max() < 1e-12:  # a bias in front of a softmax: its gradient is rounding
            assert value.grad.abs().max() < 1e-5, parameter
        else:
            assert relative_error(value.grad, expected[parameter]) < 1e-5, parameter


@interpreted
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_training_step_with_dropout_is_the_same(activation: str) -> None:
    model = small(activation=activation, dropout=0.3, attn_dropout=0.2).float().train()
    sizes = [1, 23, 4]
    x, features, coords = (torch.cat(part) for part in zip(*map(inputs, sizes), strict=True))
    results = []
    for name in ("triton", "reference"):
        model.zero_grad()
        with ops.use_backend(name):
            graph = model.build_graph(coords, torch.tensor([0, *np.cumsum(sizes)]))
            image = model.image_transform(graph.to_rows(features).float())
            prediction = model.denoise(
                graph,
                graph.to_rows(x).float(),
                image,
                torch.tensor([0.1, 0.4, 0.9]),
                slide_seed=torch.tensor([5, 2**61, 7]),
            )
            loss = (graph.to_spots(prediction) - x).square().mean()
            loss.backward()
        results.append((loss.detach(), {key: value.grad for key, value in model.named_parameters()}))
    (loss, gradients), (expected_loss, expected) = results
    assert relative_error(loss, expected_loss) < 1e-5
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, gradient in expected.items():
        assert (gradients[key] - gradient).abs().max() < 1e-4 * max(gradient.abs().max(), 1e-4 * largest), key


@interpreted
def test_a_slide_is_sampled_the_same() -> None:
    model, (_, features, coords) = small().float(), inputs(23)
    drawn = []
    for name in ("triton", "reference"):
        with ops.use_backend(name):
            drawn.append(
                stflow_fast.sample(model, (features.float(), coords), n_sample_steps=3, x_0=inputs(23, 1)[0].float())
            )
    found, expected = (part.expression for part in drawn)
    assert relative_error(found, expected) < 1e-5


@interpreted
@pytest.mark.parametrize("n", [0, 1, 5, 6])
def test_small_slides_have_finite_predictions_and_gradients(n: int) -> None:
    model = small(n_layers=1).float()
    x, features, coords = inputs(n)
    with ops.use_backend("triton"):
        prediction = predict(model, x.float(), features.float(), coords)
        prediction.sum().backward()
    with ops.use_backend("reference"):
        expected = predict(model, x.float(), features.float(), coords)
    assert prediction.shape == (n, 7)
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rows_in_blocks_and_rows_at_once_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, spots come in blocks, and dropout follows them."""
    model = small(dropout=0.3).float().train()
    x, features, coords = inputs(23)
    drawn = []
    for rows in (1024, 10):
        monkeypatch.setattr(ops, "ROW_BLOCK", rows)
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                graph = model.build_graph(coords)
                image = model.image_transform(graph.to_rows(features).float())
                x_t, t, seed = graph.to_rows(x).float(), torch.tensor([0.4]), torch.tensor([3])
                drawn.append(model.denoise(graph, x_t, image, t, slide_seed=seed))
    for other in drawn[1:]:
        assert relative_error(drawn[0], other) < 1e-5

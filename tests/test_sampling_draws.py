"""What a sample is: the published loop, from a seed or a source, whatever the order, memory or form of the input."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stflow_fast import ops
from stflow_fast.config import DenoiserConfig, parse_bytes
from stflow_fast.errors import InputError
from stflow_fast.flow import time_grid
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance
from stflow_fast.priors import Prior
from stflow_fast.sampling import Sampler, sample

from .sampling_cases import error_in_the_last_corner, model, slide


@pytest.mark.parametrize("n_genes", [5, 40])
def test_a_sample_is_the_published_loop(n_genes: int) -> None:
    """Also with more genes than the gene heads read, where the loop is of gene terms and not of genes."""
    network, spots = model(n_genes).double().eval(), slide()
    features, coords = torch.from_numpy(spots.features), torch.from_numpy(spots.coords)
    x_t = torch.rand(len(coords), n_genes, generator=torch.Generator().manual_seed(1)).double()
    prepared = Sampler(network, 4).prepare(spots)
    assert (prepared.states.heads is not None) == (n_genes == 40)
    found, followed = prepared.draw(x_t), prepared.draw(x_t, trajectory=True)
    grid, predictions = time_grid(4), []
    for t, after in itertools.pairwise(grid):
        times = torch.tensor([t]).double()
        with torch.no_grad():
            x_1 = network.inference(x_t[None], features.double()[None], coords[None], times)[0]
        torch.testing.assert_close(prepared.denoise(x_t, t), x_1, rtol=1e-10, atol=1e-12)
        x_t = x_t + (after - t) * (x_1 - x_t) / (1 - t)
        predictions.append(x_1)
    torch.testing.assert_close(found.expression, predictions[-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(followed.expression, predictions[-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(followed.trajectory, torch.stack(predictions), rtol=1e-10, atol=1e-12)


def test_one_call_between_the_times_of_the_grid() -> None:
    network = model().eval()
    prepared, x_t = Sampler(network).prepare(slide()), torch.rand(40, 5)
    with torch.no_grad():
        rows = network.denoise(
            prepared.graph, prepared.graph.to_rows(x_t), prepared.image, torch.tensor([0.3]).double()
        )
    assert torch.equal(prepared.denoise(x_t, 0.3), prepared.graph.to_spots(rows))
    with pytest.raises(InputError, match=r"slide a: x_t: must have shape \[40, 5\], not \[39, 5\]"):
        prepared.denoise(x_t[1:], 0.3)
    with pytest.raises(InputError, match=r"t: must be in \[0, 1\], not 1.5"):
        prepared.denoise(x_t, 1.5)


def test_a_sample_is_drawn_as_the_model_was_trained() -> None:
    denoiser = model()
    settings = {"n_sample_steps": 4, "prior": "zinb", "prior_total_count": 3.0, "prior_logits": -1.0}
    trained = Denoiser(denoiser.config, Provenance(training={"training": settings}))
    trained.load_state_dict(denoiser.state_dict())
    found = sample(trained, slide())
    expected = sample(denoiser, slide(), n_sample_steps=4, prior=Prior("zinb", 3.0, -1.0))
    assert torch.equal(found.expression, expected.expression)
    assert found.nfe == 3
    assert torch.equal(sample(trained, slide(), prior="zinb").expression, expected.expression)
    assert not torch.equal(sample(trained, slide(), prior="zero").expression, expected.expression)
    assert sample(denoiser, slide(), n_sample_steps=np.int64(5), seed=np.int64(0)).nfe == 4


def test_a_sample_is_a_function_of_the_seed_and_leaves_the_model_alone() -> None:
    denoiser = model().train()
    torch.manual_seed(1)
    first = sample(denoiser, slide(), seed=3)
    torch.manual_seed(2)
    assert torch.equal(sample(denoiser, slide(), seed=3).expression, first.expression)
    assert not torch.equal(sample(denoiser, slide(), seed=4).expression, first.expression)
    assert denoiser.training
    assert first.nfe == 4
    assert first.trajectory is None


def test_the_trajectory_ends_in_the_sample() -> None:
    drawn = sample(model(), slide(), n_sample_steps=4, trajectory=True)
    assert drawn.trajectory.shape == (3, 40, 5)
    assert torch.equal(drawn.trajectory[-1], drawn.expression)


@pytest.mark.parametrize("budget", [0, "20kB", "1GiB"])
def test_memory_does_not_change_the_result(budget: int | str) -> None:
    whole = sample(model(), slide(200), memory_budget="4GiB").expression
    torch.testing.assert_close(
        sample(model(), slide(200), memory_budget=budget).expression, whole, rtol=1e-5, atol=1e-5
    )


def test_the_default_budget_holds_the_messages_of_the_largest_public_slide():
    network = Denoiser(DenoiserConfig(n_genes=50, feature_dim=8))
    layers = Sampler(network).states.layers
    needed = sum(ops.message_bytes(605_471, network.config.n_neighbors, layer.attention.edges) for layer in layers)
    assert Sampler(network).memory_budget >= needed


def test_a_slide_and_its_tensors_give_the_same() -> None:
    one = slide(name="")
    tensors = torch.from_numpy(one.features), torch.from_numpy(one.coords)
    assert torch.equal(sample(model(), one).expression, sample(model(), tensors).expression)


def test_samples_follow_the_order_of_the_spots() -> None:
    one, order = slide(), np.random.default_rng(0).permutation(40)
    x_0 = torch.rand(40, 5)
    plain = sample(model(), one, x_0=x_0).expression
    permuted = sample(model(), one.subset(order), x_0=x_0[order]).expression
    torch.testing.assert_close(permuted, plain[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [0, 1, 2, 8, 9])
def test_small_slides(n: int) -> None:
    drawn = sample(model(), (torch.rand(n, 6), torch.rand(n, 2))).expression
    assert drawn.shape == (n, 5)
    assert drawn.isfinite().all()


@pytest.mark.parametrize(
    ("features", "coords", "complaint"),
    [
        (torch.rand(4, 7), torch.rand(4, 2), r"features: must have shape \[N, 6\], not \[4, 7\]; use embeddings"),
        (torch.rand(4, 6), torch.rand(3, 2), r"coords: must have shape \[4, 2\]"),
        (torch.tensor([[0.0] * 6, [float("nan")] * 6]), torch.rand(2, 2), "features: 1 of 2 spots are NaN"),
        (torch.rand(2, 6), torch.tensor([[0.0, float("inf")], [0, 0]]), "coords: 1 of 2 spots are NaN"),
    ],
)
def test_bad_inputs_are_named(features: torch.Tensor, coords: torch.Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        sample(model(), (features, coords))


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in (7, "7", "4GiB", "500 MB", "1.5k")] == [7, 7, 2**32, 5 * 10**8, 1500]
    with pytest.raises(InputError, match="memory_budget: must be a size"):
        parse_bytes("much")


def test_a_prepared_slide_draws_as_sample_does() -> None:
    network, drawn = model(), slide(30)
    prepared = Sampler(network, n_sample_steps=3).prepare(drawn)
    for seed in (0, 1):
        expected = sample(network, drawn, n_sample_steps=3, seed=seed).expression
        torch.testing.assert_close(prepared.draw(seed=seed).expression, expected, rtol=0, atol=0)


def test_the_last_corner_of_a_slide_is_what_its_patch_alone_gives() -> None:
    network = model()
    assert error_in_the_last_corner(network, side=40, patch=20, margin=11) < 1e-6
    assert error_in_the_last_corner(network, side=40, patch=20, margin=0) > 1e-4  # a border is seen


def test_a_trajectory_ends_in_the_sample_smoothed_or_not() -> None:
    sampler = Sampler(model(), smooth=0.4)
    prepared, x_0 = sampler.prepare(slide(30)), torch.rand(30, sampler.model.config.n_genes)
    whole, drawn = prepared.draw(x_0, trajectory=True), prepared.draw(x_0)
    torch.testing.assert_close(whole.expression, drawn.expression, rtol=1e-5, atol=1e-6)
    plain = Sampler(sampler.model).prepare(slide(30)).draw(x_0).expression
    torch.testing.assert_close(whole.trajectory[-1], plain, rtol=1e-5, atol=1e-6)
    assert (whole.expression - plain).abs().max() > 1e-3


def test_a_source_is_judged_as_the_model_reads_it() -> None:
    prepared = Sampler(model()).prepare(slide(30))
    x_0 = torch.zeros(30, prepared.sampler.model.config.n_genes, dtype=torch.float64)
    x_0[2, 1] = 1e200
    with pytest.raises(InputError, match="x_0: has values that are NaN or infinite"):
        prepared.draw(x_0)

"""The law of x_1 around a mean: what is fitted, what is drawn of it, and what is kept with the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import nbinom, norm

import stflow_fast
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import CONFIG_FILE
from stflow_fast.priors.observation import (
    TABLE,
    TABLE_STEP,
    CensoredGaussian,
    Law,
    ObservationModel,
    ZinbCounts,
    laws_of,
    load_observation,
)
from stflow_fast.priors.shared_error import SharedError
from stflow_fast.sampling import Sampler

from .builders import FEATURES, small_model

GENES = ("A", "B", "C")
SIGMA = np.array([0.3, 1.0, 2.0], np.float32)


def zinb(log: bool = True) -> ZinbCounts:
    scale, theta, pi = ([1.0, 1.5, 0.7], [0.5, 2.0, 8.0], [0.0, 0.3, 0.6])
    return ZinbCounts(*(np.array(values, np.float32) for values in (scale, theta, pi)), np.float32(log))


LAWS = [CensoredGaussian(SIGMA), zinb(), zinb(log=False)]
SHARED = SharedError(np.array([0.3, 0.6, -0.8], np.float32), np.array([0.2, 0.5, 4.0], np.float32))


def of_law(law: Law, shared: SharedError = SHARED) -> ObservationModel:
    return ObservationModel(GENES, law, shared, {"spots": 9, "groups": 2})


def places(n: int) -> np.ndarray:
    """Of a lattice."""
    return 100.0 * np.column_stack([np.arange(n) % 8, np.arange(n) // 8])


def many_draws(law: Law, mean: np.ndarray, n: int) -> np.ndarray:
    """[n, N, G] float64 around the mean [N, G]: of as many spots, which takes less time than as many draws."""
    spots = np.tile(mean, (n, 1))
    drawn = of_law(law, SharedError.none(mean.shape[1])).drawer(0, "S", 1, np.zeros((len(spots), 2)))(spots)[0]
    return drawn.reshape(n, *mean.shape).astype(np.float64)


def quantile(law: Law, mean: np.ndarray, probability: float) -> np.ndarray:
    return of_law(law).quantile(mean, 100 * probability)


def means(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.0, 1.2, (n, 3)).astype(np.float32)


def test_sigma_is_the_likeliest() -> None:
    centres = means(4000).astype(np.float64) - 0.5
    truth = np.maximum(centres + SIGMA * np.random.default_rng(1).standard_normal(centres.shape), 0.0)
    assert 0.2 < (truth == 0).mean() < 0.8
    mean = centres * norm.cdf(centres / SIGMA) + SIGMA * norm.pdf(centres / SIGMA)
    found = CensoredGaussian.fit(mean, truth, "log1p").sigma
    np.testing.assert_allclose(found, SIGMA, rtol=0.05)
    for gene in range(3):

        def loss(log_sigma: float, gene: int = gene) -> float:
            s = np.exp(log_sigma)
            grid = s * np.linspace(-6, 60, 200_001)
            m = np.interp(mean[:, gene], grid * norm.cdf(grid / s) + s * norm.pdf(grid / s), grid)
            y = truth[:, gene]
            return -np.where(y > 0, norm.logpdf(y, m, s), norm.logcdf(0, m, s))[mean[:, gene] > 0.02].sum()

        near = [loss(np.log(found[gene]) + step) for step in (-0.1, 0.0, 0.1)]
        assert near[1] == min(near)


def test_a_gene_that_is_predicted_exactly_or_never_expressed_has_a_sigma() -> None:
    mean = np.column_stack([np.ones(50), np.full(50, 0.1), np.zeros(50)]).astype(np.float32)
    truth = np.column_stack([np.ones(50), np.zeros(50), np.zeros(50)]).astype(np.float32)
    law = CensoredGaussian.fit(mean, truth, "log1p")
    assert np.isfinite(law.sigma).all()
    assert (law.sigma > 0).all()
    assert np.isfinite(law.std(mean)).all()


@pytest.mark.parametrize("law", LAWS, ids=["gaussian", "zinb", "zinb of counts"])
def test_numbers_of_a_law_are_those_of_its_draws(law: Law) -> None:
    mean = means(4, seed=3)
    drawn = many_draws(law, mean, 20_000)
    assert (drawn >= 0).all()
    np.testing.assert_allclose(law.std(mean), drawn.std(axis=0), rtol=0.05, atol=0.02)
    for probability in (0.05, 0.5, 0.95):
        below = (drawn < quantile(law, mean, probability) - 1e-4).mean(axis=0)
        upto = (drawn <= quantile(law, mean, probability) + 1e-4).mean(axis=0)
        assert (below <= probability + 0.02).all()
        assert (upto >= probability - 0.02).all()


@pytest.mark.parametrize("sigma", [0.05, 0.5, 3.0])
def test_the_mean_of_draws_is_the_mean_that_was_predicted(sigma: float) -> None:
    mean = np.array([[0.02, 0.1, 0.5, 2.0, 40.0]], np.float32)
    law = CensoredGaussian(np.full(5, sigma, np.float32))
    drawn = many_draws(law, mean, 200_000)
    np.testing.assert_allclose(drawn.mean(axis=0), mean, rtol=0.02, atol=0.01 * sigma)


@pytest.mark.parametrize("counts", [0.5, 30.0, 190.0, 210.0, 5000.0])
def test_spread_of_many_counts_and_of_few(counts: float) -> None:
    """Of sums over counts, and of rates."""
    theta = np.array([0.05, 0.3, 2.0], np.float32)
    law = ZinbCounts(np.ones(3, np.float32), theta, np.array([0.0, 0.2, 0.2], np.float32), np.float32(1))
    mean = np.full((1, 3), np.log1p(counts), np.float32)
    drawn = many_draws(law, mean, 40_000)
    np.testing.assert_allclose(law.std(mean), drawn.std(axis=0), rtol=0.03)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), first=st.integers(0, 40), draws=st.integers(1, 3), law=st.sampled_from(LAWS))
def test_a_draw_is_of_its_seed_slide_number_and_spot(n: int, first: int, draws: int, law: Law) -> None:
    first = min(first, n)
    model, mean, coords = of_law(law), means(40), places(40)
    whole = model.drawer(5, "S", 3, coords)(mean[:n])
    by_blocks = model.drawer(5, "S", draws, coords)
    parts = [by_blocks(mean[:first]), by_blocks(mean[first:n])]
    assert np.array_equal(np.concatenate(parts, axis=1), whole[:draws])


def test_draws_differ_by_seed_slide_and_number() -> None:
    model, mean, coords = of_law(LAWS[0]), means(50), places(50)
    one = model.drawer(5, "S", 2, coords)(mean)
    for other in (one[::-1], model.drawer(6, "S", 2, coords)(mean), model.drawer(5, "T", 2, coords)(mean)):
        assert not np.array_equal(other, one)


@pytest.mark.parametrize("mean", [0.5, 11.0, 68.0, 167.0, 1013.0])
def test_spreads_between_those_of_the_table_are_exact(mean: float) -> None:
    """Beside sums over all counts; the mean is brought to the middle between two of the table."""
    place = np.floor(np.log(mean / TABLE[0]) / TABLE_STEP)
    mean = float(TABLE[0] * np.exp((place + 0.5) * TABLE_STEP))
    theta = np.array([2.0, 10.0, 100.0, 1e4], np.float32)
    law = ZinbCounts(
        *(np.full(4, value, np.float32) if np.isscalar(value) else value for value in (1.0, theta, 0.0)), np.float32(1)
    )
    counts = np.arange(40 * int(mean + 10))
    for gene, t in enumerate(theta.astype(float)):
        share = nbinom.pmf(counts, t, t / (t + mean))
        log = np.log1p(counts)
        exact = np.sqrt(share @ log**2 - (share @ log) ** 2)
        assert law.std(np.full((1, 4), np.log1p(mean), np.float32))[0, gene] == pytest.approx(exact, rel=0.01)


def test_counts_per_ten_thousand_are_no_counts() -> None:
    assert laws_of("cp10k_log1p") == ("gaussian",)
    assert laws_of("log1p") == laws_of("counts") == ("gaussian", "zinb")


def test_counts_are_fitted_around_their_mean() -> None:
    law, mean = zinb(), np.log1p(np.random.default_rng(0).gamma(2.0, 3.0, (6000, 3))).astype(np.float32)
    truth = of_law(law, SharedError.none(3)).drawer(0, "S", 1, np.zeros((6000, 2)))(mean)[0]
    found = ZinbCounts.fit(mean, truth, "log1p")
    np.testing.assert_allclose(found.scale * (1 - found.pi), law.scale * (1 - law.pi), rtol=0.1)
    np.testing.assert_allclose(found.pi, law.pi, atol=0.08)
    np.testing.assert_allclose(found.theta[:2], law.theta[:2], rtol=0.25)


@pytest.mark.parametrize("law", LAWS, ids=["gaussian", "zinb", "zinb of counts"])
def test_the_rarest_draws_are_numbers_that_rise(law: Law) -> None:
    """Parameters are float32, and probabilities next to 1 are not."""
    mean = np.repeat(np.float32([[0.02, 0.36, 2.0]]), 14, axis=0)
    score = np.repeat(np.linspace(-6.5, 6.5, 14, dtype=np.float32)[:, None], 3, axis=1)
    found = law.values(mean)(score)
    assert np.isfinite(found).all()
    assert (np.diff(found, axis=0) >= 0).all()


def test_spreads_are_as_large_as_what_is_measured() -> None:
    mean = means(400)
    truth = 5e4 * mean * np.random.default_rng(0).standard_normal(mean.shape)
    truth[:, 2] = 0.0  # never seen
    sigma = CensoredGaussian.fit(5e4 * mean, np.maximum(5e4 * mean + truth, 0.0), "counts").sigma
    assert (sigma[:2] > 1e3).all()
    sigma = CensoredGaussian.fit(mean, np.maximum(truth / 5e4, 0.0) * [1, 1, 0], "log1p").sigma
    assert sigma[2] == pytest.approx((truth / 5e4).max(), rel=1e-3)


@pytest.mark.parametrize("law", LAWS, ids=["gaussian", "zinb", "zinb of counts"])
def test_scores_are_those_that_a_value_has(law: Law) -> None:
    mean, score = (
        np.minimum(means(500, seed=4), 4.0),
        np.random.default_rng(5).standard_normal((500, 3)).astype(np.float32),
    )
    truth = law.values(mean)(score.copy())
    low, high = law.scores(mean, truth)
    assert ((low <= score + 1e-4) & (score <= high + 1e-4)).all()
    assert (low[truth == 0] == -np.inf).all()
    inside = np.clip((np.maximum(low, -5) + np.minimum(high, 5)) / 2, low, high).astype(np.float32)
    np.testing.assert_allclose(law.values(mean)(inside), truth, atol=1e-4)


@pytest.fixture
def model() -> Denoiser:
    made = small_model(3, GENES, "uni")
    made.observation = of_law(CensoredGaussian(SIGMA))
    return made


@pytest.fixture
def slide() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(70, FEATURES), 1000 * torch.rand(70, 2)


@pytest.mark.parametrize("law", LAWS[:2], ids=["gaussian", "zinb"])
def test_a_law_is_kept_with_the_model(model: Denoiser, law: Law, tmp_path: Path) -> None:
    model.observation = of_law(law)
    model.save_pretrained(tmp_path / "model")
    again = Denoiser.from_pretrained(tmp_path / "model")
    assert again.observation.to_dict() == model.observation.to_dict()
    for name, values in {**law.parameters(), **SHARED.tensors()}.items():
        assert np.array_equal(again.observation.tensors()[name], values)
    assert set(again.state_dict()) == set(model.state_dict())
    small_model(3, GENES, "uni").save_pretrained(tmp_path / "plain")
    assert Denoiser.from_pretrained(tmp_path / "plain").observation is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"law": "poisson"}, "observation: must describe one of gaussian, zinb"),
        ({"genes": ["A", "B", "D"]}, "observation: .*D"),
        ({"genes": ["A"]}, "observation: "),
        ({"law": "zinb"}, "observation: scale must be"),
    ],
)
def test_a_law_of_other_genes_or_of_none_is_refused(
    model: Denoiser, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / CONFIG_FILE
    content = json.loads(path.read_text())
    content["observation"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=complaint) as error:
        Denoiser.from_pretrained(tmp_path / "model")
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_broken_numbers_are_refused() -> None:
    described = {"law": "gaussian", "genes": list(GENES)}
    for broken in ([1.0, np.nan, 1.0], [1.0, -1.0, 1.0], [1.0, 0.0, 1.0], [1.0]):
        with pytest.raises(InputError, match="observation: sigma must be"):
            load_observation(described, {"sigma": np.array(broken, np.float32), **SHARED.tensors()}, GENES)
    described = {**described, "law": "zinb"}
    law = zinb().parameters()
    for name, broken in (("theta", [0.0, 1.0, 1.0]), ("pi", [0.1, 1.0, 0.0]), ("scale", [0.0, 1.0, 1.0]), ("log", 5.0)):
        with pytest.raises(InputError, match=f"observation: {name} must be"):
            load_observation(described, {**law, **SHARED.tensors(), name: np.array(broken, np.float32)}, GENES)


def test_broken_numbers_of_what_errors_share_are_refused() -> None:
    described = {"law": "gaussian", "genes": list(GENES)}
    for name, broken in (("loading", [0.1, 1.5, 0.0]), ("field", [0.6, 0.6, 1.0]), ("field", [0.1, 0.1, 0.0])):
        with pytest.raises(InputError, match="observation: .*what errors have in common; fit it again"):
            load_observation(described, {"sigma": SIGMA, **SHARED.tensors(), name: np.array(broken)}, GENES)
    with pytest.raises(InputError, match="observation: .*what errors have in common; fit it again"):
        load_observation(described, {"sigma": SIGMA}, GENES)  # of a version that knew none


def test_draws_stand_around_the_mean_of_samples(model: Denoiser, slide: tuple[torch.Tensor, torch.Tensor]) -> None:
    drawn = stflow_fast.sample(model, slide, seed=4, draws=3)
    prepared = Sampler(model).prepare(slide)
    samples = torch.stack([prepared.draw(seed=seed).expression for seed in (4, 5, 6)])
    torch.testing.assert_close(drawn.expression, samples.mean(dim=0))
    assert (drawn.nfe, drawn.draws.shape) == (12, (3, 70, 3))
    assert np.array_equal(drawn.std.numpy(), model.observation.std(drawn.expression.numpy()))
    of_slide = model.observation.drawer(4, "", 3, slide[1].numpy())
    assert np.array_equal(drawn.draws.numpy(), of_slide(drawn.expression.numpy()))
    plain = stflow_fast.sample(model, slide, seed=4)
    assert (plain.std, plain.draws) == (None, None)
    assert torch.equal(plain.expression, samples[0])
    none = stflow_fast.sample(model, (torch.zeros(0, FEATURES), torch.zeros(0, 2)), draws=2)
    assert (none.expression.shape, none.draws.shape) == ((0, 3), (2, 0, 3))


def test_draws_that_cannot_be_are_refused(model: Denoiser, slide: tuple[torch.Tensor, torch.Tensor]) -> None:
    for draws in (0, -1, 1.5):
        with pytest.raises(InputError, match="draws: must be a whole number"):
            stflow_fast.sample(model, slide, draws=draws)
    with pytest.raises(InputError, match="seed: "):
        stflow_fast.sample(model, slide, seed=2**63 - 1, draws=2)
    with pytest.raises(InputError, match="draws: .*leave x_0 and trajectory out"):
        stflow_fast.sample(model, slide, draws=2, trajectory=True)
    model.observation = None
    with pytest.raises(InputError, match="draws: the model has no observation model.*calibrate"):
        stflow_fast.sample(model, slide, draws=2)

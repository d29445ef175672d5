"""How sure a model is, from training to the scores of its draws."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest

import stflow_fast
import stflow_fast.calibration as calibration
from stflow_fast.calibration import calibrate
from stflow_fast.cohort import SamplingConfig, evaluate, evaluate_slides, predict
from stflow_fast.errors import InputError
from stflow_fast.evaluation import certainty, neighborhood_mean
from stflow_fast.model import Denoiser
from stflow_fast.outputs import OutputConfig
from stflow_fast.pretrained import CONFIG_FILE
from stflow_fast.priors.observation import CensoredGaussian, ObservationModel
from stflow_fast.priors.shared_error import SharedError
from stflow_fast.slides import Slide
from stflow_fast.synthetic import make_cohort
from stflow_fast.tables import predict_adata
from stflow_fast.training import Run, fit, train
from stflow_fast.windows import NOTHING, TrainingConfig, TrainingData

from .builders import ENCODER, SLIDES, arrays, embeddings_of, small_model, write_task
from .command_cases import say
from .training_cases import TINY

__all__ = ["say"]  # a fixture

QUICK = TrainingConfig(epochs=2, windows_per_slide=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task") / "task")


@pytest.fixture
def run(task: Path, tmp_path: Path) -> Run:
    return train(task, tmp_path / "run", ENCODER, denoiser=TINY, config=QUICK)


def test_slides_are_left_out_in_turn_and_regions_where_they_are_few() -> None:
    slides = make_cohort(n_train=3, train_spots=50, test_spots=40, n_genes=4, feature_dim=6).train
    for kept, left in calibration._groups(slides):
        assert [slide.id for slide in left] == [slide.id for slide in slides if slide not in kept]
        assert len(left) == 1
    few = [slides[0], slides[1].subset(np.arange(2))]
    groups = calibration._groups(few)
    assert len(groups) == 4
    seen = [(slide.id, spot) for _, left in groups for slide in left for spot in slide.barcodes.tolist()]
    assert sorted(seen) == sorted((slide.id, spot) for slide in few for spot in slide.barcodes.tolist())
    for kept, left in groups:
        assert sum(slide.n_spots for slide in kept + left) == 52


def test_a_run_is_calibrated_on_what_is_left_out_in_turn(run: Run, task: Path) -> None:
    seen = []
    observation = calibrate(run.folder, on_epoch=lambda number, total, record: seen.append((number, total)))
    assert seen == [(number, 4) for number in range(4) for _ in range(2)]
    for number in range(4):
        told = json.loads((run.folder / "left_out" / str(number) / "run.json").read_text())
        assert set(told["train"]) == set(SLIDES[:2])
        assert 60 < sum(told["train"].values()) < 120
    kept = Denoiser.from_pretrained(run.folder / "model")
    assert kept.observation.to_dict() == observation.to_dict()
    assert observation.about["spots"] == 120
    reached = observation.about["out_of_fold"]
    assert observation.law.name == min(reached, key=lambda name: reached[name]["crps_mean"])
    for name, values in run.model.state_dict().items():
        assert np.array_equal(kept.state_dict()[name], values)
    again: list[int] = []
    calibrate(run.folder, on_epoch=lambda number, total, record: again.append(number))
    assert not again  # what is trained is there
    result = evaluate(run.folder, task).result
    assert set(result["certainty"]) >= {"crps_mean", "coverage_50", "coverage_90", "spread_ratio"}
    assert "certainty" in result["baselines"]["train_mean"]
    of_neighborhoods = result["certainty_of_neighborhoods"]
    assert set(of_neighborhoods) == {*result["certainty"], "n_genes"}
    assert (of_neighborhoods["n_genes"], of_neighborhoods["n_draws"]) == (8, 100)
    json.dumps(result, allow_nan=False)


def test_a_run_that_is_trained_anew_is_not_calibrated(run: Run, task: Path) -> None:
    calibrate(run.folder)
    again = train(task, run.folder, ENCODER, denoiser=TINY, config=dataclasses.replace(QUICK, epochs=3), resume=True)
    assert Denoiser.from_pretrained(again.folder / "model").observation is None
    calibrate(run.folder)
    assert len((run.folder / "left_out" / "0" / "metrics.jsonl").read_text().splitlines()) == 3
    train(task, run.folder, ENCODER, denoiser=TINY, config=QUICK, overwrite=True)
    assert not (run.folder / "left_out").exists()


def test_a_model_whose_law_cannot_be_read_is_calibrated_anew(run: Run) -> None:
    """As one of a version that knew nothing of what errors share, which is told to calibrate."""
    calibrate(run.folder)
    path = run.folder / "model" / CONFIG_FILE
    content = json.loads(path.read_text())
    content["observation"]["genes"][0] = "OTHER"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="observation: .*fit it again"):
        Denoiser.from_pretrained(run.folder / "model")
    found = calibrate(run.folder)
    assert Denoiser.from_pretrained(run.folder / "model").observation.to_dict() == found.to_dict()


def test_a_run_of_other_data_is_refused(run: Run, task: Path, tmp_path: Path) -> None:
    other = write_task(tmp_path / "other")
    (other / "splits" / "train_0.csv").write_text("sample_id,patches_path,expr_path\nS0,patches/S0.h5,adata/S0.h5ad\n")
    with pytest.raises(InputError, match="lacks S1; give the data that .* was trained on"):
        calibrate(run.folder, other)
    with pytest.raises(InputError, match="has no model/; give the folder of a finished run"):
        calibrate(task)
    told = json.loads((run.folder / "run.json").read_text())
    for content in ({}, {name: value for name, value in told.items() if name != "encoder"}):
        (run.folder / "run.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"run\.json: tells of no task folder"):
            calibrate(run.folder)


def test_a_model_that_does_not_tell_how_it_was_trained_is_refused(tmp_path: Path) -> None:
    slides = make_cohort(n_train=3, train_spots=50, test_spots=40, n_genes=4, feature_dim=6).train
    with pytest.raises(InputError, match="model: does not tell how it was trained"):
        calibration.predict_left_out(small_model(4, "ABCD", "synthetic"), slides, tmp_path)


def test_a_law_holds_on_a_slide_that_nobody_has_seen(tmp_path: Path) -> None:
    """Of the same making as those that it was fitted on: intervals hold what they say, and CRPS is below that of
    training spots drawn at random."""
    cohort = make_cohort(n_train=3, train_spots=300, test_spots=600, n_genes=10, feature_dim=24, seed=1)
    data = TrainingData(cohort.train, [], NOTHING, cohort.genes, "synthetic")
    config = TrainingConfig(epochs=12, windows_per_slide=6, learning_rate=3e-3, ema_decay=0.9)
    model = fit(data, tmp_path / "run", TINY, config).model
    predicted = calibration.predict_left_out(model, cohort.train, tmp_path / "run" / "left_out")
    model.observation = calibration.fit_observation(predicted, model)
    result = evaluate_slides(model, cohort.train, cohort.test).result
    assert 0.80 < result["certainty"]["coverage_90"] < 0.99
    assert result["certainty"]["crps_mean"] < result["baselines"]["train_mean"]["certainty"]["crps_mean"]
    assert 0.6 < result["certainty"]["spread_ratio"] < 1.6


def test_what_errors_have_in_common_is_found_by_calibrating() -> None:
    """And draws that have it hold what they say of a region, where independent ones do not."""
    rng = np.random.default_rng(0)
    coords = [np.column_stack([np.arange(300) % 20, np.arange(300) // 20]) * 50.0 for _ in range(6)]
    sigma, shared = np.full(12, 0.6, np.float32), SharedError(np.full(12, 0.8, np.float32), np.float32([0.0, 0.9, 6.0]))
    genes = tuple("ABCDEFGHIJKL")
    made = ObservationModel(genes, CensoredGaussian(sigma), shared, {})
    predicted = []
    for number, places in enumerate(coords):
        mean = rng.gamma(3.0, 0.4, (300, 12)).astype(np.float32)
        truth = made.drawer(number, "S", 1, places)(mean)[0]
        predicted.append(calibration.Predicted(mean, truth, [places]))
    found = calibration.fit_observation(predicted[:5], small_model(12, genes, "synthetic"))
    assert found.law.name == "gaussian"
    np.testing.assert_allclose(found.shared.loading, 0.8, atol=0.12)
    mean, truth, (places,) = predicted[5]
    held = {}
    for name, law in (("shared", found), ("independent", dataclasses.replace(found, shared=SharedError.none(12)))):
        drawn = neighborhood_mean(places, law.drawer(0, "S", 60, places)(mean))
        of_regions = certainty(
            neighborhood_mean(places, truth), neighborhood_mean(places, mean), lambda rows, drawn=drawn: drawn[:, rows]
        )
        held[name] = of_regions["coverage_90"]
    assert 0.8 < held["shared"] < 0.98
    assert held["independent"] < 0.75


def test_a_network_that_never_errs_has_a_law() -> None:
    mean = np.ones((40, 2), np.float32)
    group = calibration.Predicted(mean, mean, [np.zeros((40, 2))])
    found = calibration.fit_observation([group, group], small_model(2, "AB", "synthetic"))
    assert found.about["out_of_fold"]["gaussian"]["spread_ratio"] is None
    assert np.isfinite(found.shared.loading).all()


def test_neighborhoods_of_many_spots_are_of_fewer_draws_and_then_of_fewer_genes(
    run: Run, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(run.folder)
    room, found = importlib.import_module("stflow_fast.cohort.evaluate"), {}  # the package has a function of this name
    for kept in (60 * 8 * 40, 60 * 8 * 16, 60 * 3 * 16):
        monkeypatch.setattr(room, "NUMBERS_KEPT", kept)
        told = evaluate(run.folder, task).result["certainty_of_neighborhoods"]
        found[told["n_draws"], told["n_genes"]] = told["coverage_90"]
    assert list(found) == [(40, 8), (16, 8), (16, 3)]
    assert np.ptp(list(found.values())[:2]) < 0.1


def test_predictions_with_draws(run: Run, task: Path, tmp_path: Path, say: Callable[..., str]) -> None:
    slide, out = embeddings_of(task, "S2"), tmp_path / "out"
    said = say("predict", run.folder, slide, "--out", out, "--draws", 4)
    assert "draws: the model has no observation model" in said
    assert not list(out.glob("*.h5ad"))
    calibrate(run.folder)
    model = Denoiser.from_pretrained(run.folder / "model")
    say("predict", run.folder, slide, "--out", out, "--quantiles", "5,50")
    predict(
        run.folder,
        [slide],
        out,
        sampling=SamplingConfig(seed=3, draws=2),
        output=OutputConfig(quantiles=(5, 50, 95), keep_draws=True, genes=model.provenance.genes[2:4]),
    )
    table = anndata.read_h5ad(out / "S2.h5ad")
    assert list(table.layers) == ["draw_0", "draw_1", "q5", "q50", "q95", "std"]
    predict(run.folder, [slide], tmp_path / "plain", sampling=SamplingConfig(seed=3, draws=2))
    whole = anndata.read_h5ad(tmp_path / "plain" / "S2.h5ad")
    assert list(whole.layers) == ["std"]
    mean, law = np.asarray(whole.X), model.observation
    drawn = law.drawer(3, "S2", 2, whole.obsm["spatial"])(mean)
    assert law.shared.loading.any()
    expected = {"std": law.std(mean), "q5": law.quantile(mean, 5), "q50": law.quantile(mean, 50)}
    expected |= {"q95": law.quantile(mean, 95), "draw_0": drawn[0], "draw_1": drawn[1]}
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(table.layers[name]), values[:, 2:4], err_msg=name)
    about = table.uns["stflow_fast"]
    assert (about["draws"], about["observation"], about["nfe"]) == (2, law.law.name, 8)


def test_one_call_from_zero(run: Run, task: Path, tmp_path: Path, say: Callable[..., str]) -> None:
    slide = embeddings_of(task, "S2")
    say("predict", run.folder, slide, "--out", tmp_path / "out", "--fast", "--smooth", "0.25", code=0)
    about = anndata.read_h5ad(tmp_path / "out" / "S2.h5ad").uns["stflow_fast"]
    assert (about["nfe"], about["prior"]["name"], about["smooth"]) == (1, "zero", 0.25)
    said = say("predict", run.folder, slide, "--out", tmp_path / "other", "--fast", "--prior", "zinb")
    assert "fast: is --n-sample-steps 2 --prior zero" in said


def test_a_table_gets_the_standard_deviation_too(run: Run) -> None:
    calibrate(run.folder)
    model = Denoiser.from_pretrained(run.folder / "model")
    made = arrays("S2")
    genes = [*model.provenance.genes[:2], "OTHER"]
    table = anndata.AnnData(
        np.zeros((60, 3), np.float32),
        var={"names": genes},
        obsm={"X_uni": made["features"], "spatial": made["centres"]},
    )
    table.var_names = genes
    with pytest.warns(UserWarning, match="6 of 8 predicted genes are not in"):
        predict_adata(model, table, sampling=SamplingConfig(draws=2))
    assert set(table.layers) == {"stflow", "stflow_std"}
    drawn = stflow_fast.sample(model, Slide("adata", made["features"], made["centres"], made["barcodes"]), draws=2)
    np.testing.assert_array_equal(table.layers["stflow"][:, :2], drawn.expression[:, :2])
    np.testing.assert_array_equal(table.layers["stflow_std"][:, :2], drawn.std[:, :2])
    assert np.isnan(table.layers["stflow_std"][:, 2]).all()
    with pytest.warns(UserWarning, match="predicted genes are not in"):
        predict_adata(model, table)
    assert set(table.layers) == {"stflow"}  # an earlier prediction goes whole
    table.layers["stflow_std"] = np.zeros((60, 3))
    with pytest.raises(InputError, match=r"adata.layers\['stflow_std'\] is no prediction"):
        predict_adata(model, table, sampling=SamplingConfig(draws=2))

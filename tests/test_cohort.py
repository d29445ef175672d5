"""Predictions as files, and the evaluation of a fold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import anndata
import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch

from stflow_fast.cohort import (
    MANIFEST,
    SamplingConfig,
    SlideLine,
    evaluate,
    evaluate_slides,
    load_model,
    predict,
    read_lines,
)
from stflow_fast.config import DenoiserConfig
from stflow_fast.devices import choose_device
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance
from stflow_fast.sampling import sample
from stflow_fast.slides import Origin, ReadOptions, Slide, read
from stflow_fast.synthetic import Cohort, make_cohort
from stflow_fast.training import fit, load_fold
from stflow_fast.windows import TrainingConfig, TrainingData

from .builders import (
    BASELINES,
    ENCODER,
    FEATURES,
    PANEL,
    arrays,
    gene_names,
    write_embeddings,
    write_h5ad,
    write_model,
    write_task,
)


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return make_cohort(n_train=2, train_spots=80, test_spots=60, n_genes=6, feature_dim=12)


@pytest.fixture(scope="module")
def model(cohort: Cohort) -> Denoiser:
    torch.manual_seed(0)
    config = DenoiserConfig(n_genes=6, feature_dim=12, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    training = {"training": {"prior": "gaussian", "n_sample_steps": 4}, "selected_on": "held-out regions"}
    return Denoiser(config, Provenance(cohort.genes, "synthetic", "log1p", training)).eval()


def without_counts(slide: Slide) -> Slide:
    return dataclasses.replace(slide, counts=None, gene_names=(), notes=("nothing left out",))


def test_a_prediction_says_what_it_is(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    slide = without_counts(cohort.test[0])
    [path] = predict(model, [slide], tmp_path / "out", sampling=SamplingConfig(seed=5))
    table = anndata.read_h5ad(path)
    expected = sample(model, slide, n_sample_steps=4, prior="gaussian", seed=5).expression.numpy()
    assert np.array_equal(table.X, expected)
    assert list(table.var_names) == list(cohort.genes)
    assert list(table.obs_names) == list(slide.barcodes)
    assert np.array_equal(table.obsm["spatial"], slide.coords)
    about = table.uns["stflow_fast"]
    assert (about["seed"], about["nfe"], about["prior"]["name"]) == (5, 3, "gaussian")
    assert (about["slide"], about["device"], about["selected_on"]) == (slide.id, "cpu", "held-out regions")
    assert about["encoder"] == "synthetic"
    assert about["normalize"] == "log1p"
    assert about["version"]
    assert about["micron_per_pixel"] == 0.5
    assert about["notes"] == "nothing left out"


def test_a_slide_does_not_depend_on_its_cohort(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    slides = [without_counts(slide) for slide in (*cohort.train, *cohort.test)]
    together = predict(model, slides, tmp_path / "together")
    [alone] = predict(model, slides[-1:], tmp_path / "alone")
    assert np.array_equal(anndata.read_h5ad(together[-1]).X, anndata.read_h5ad(alone).X)


def made_in(out: Path) -> list[str]:
    """Slides whose newest line says that they are done."""
    return sorted(name for name, line in read_lines(out).items() if line.is_done)


def all_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_resuming_predicts_what_is_missing(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    slides = [without_counts(slide) for slide in cohort.train]
    first, second = predict(model, slides, tmp_path / "out")
    kept = first.read_bytes()
    second.unlink()
    with pytest.raises(InputError, match="exists already"):
        predict(model, slides, tmp_path / "out")
    done: dict[str, int] = {}

    def note(line: SlideLine, total: int) -> None:
        done[line.slide] = line.attempts
        assert line.notes == ("nothing left out",)
        assert total == 2

    assert predict(model, slides, tmp_path / "out", resume=True, on_slide=note) == [first, second]
    assert first.read_bytes() == kept
    assert done == {slides[0].id: 1, slides[1].id: 2}
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["seed"] == 0
    assert manifest["earlier"] == []
    assert made_in(tmp_path / "out") == sorted(done)


def test_resuming_does_not_mix_predictions(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    slides, out = [without_counts(slide) for slide in cohort.train], tmp_path / "out"
    predict(model, slides, out)
    before = all_files(out)
    with pytest.raises(InputError, match=r"predictions.json: seed differs"):
        predict(model, slides, out, sampling=SamplingConfig(seed=1), resume=True)
    torch.manual_seed(1)
    with pytest.raises(InputError, match=r"predictions.json: weights_sha256 differs"):
        predict(Denoiser(model.config, model.provenance), slides, out, resume=True)
    assert before == all_files(out)


def test_overwriting_leaves_nothing_of_the_last_result(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    slides, out = [without_counts(slide) for slide in cohort.train], tmp_path / "out"
    first, _ = predict(model, slides, out)
    predict(model, slides[:1], out, sampling=SamplingConfig(seed=1), overwrite=True)
    assert list(out.glob("*.h5ad")) == [first]
    assert anndata.read_h5ad(first).uns["stflow_fast"]["seed"] == 1


def test_overwriting_that_was_killed_goes_on(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    """The manifest is of the new seed; resuming draws what has no line, though its file may be there already."""
    slides, out = [without_counts(slide) for slide in cohort.train], tmp_path / "out"
    first, second = predict(model, slides, out)

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, slides, out, sampling=SamplingConfig(seed=1), overwrite=True, on_slide=kill)
    assert anndata.read_h5ad(first).uns["stflow_fast"]["seed"] == 1
    assert made_in(out) == sorted(slide.id for slide in slides)  # the other's line is of the old seed
    done = first.read_bytes()
    predict(model, slides, out, sampling=SamplingConfig(seed=1), resume=True)
    assert first.read_bytes() == done
    assert anndata.read_h5ad(second).uns["stflow_fast"]["seed"] == 1


def seed_of(path: Path) -> int:
    return anndata.read_h5ad(path).uns["stflow_fast"]["seed"]


def test_the_manifest_is_true_after_overwriting_in_part(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    """Slides that are still of the earlier call are told apart, and go when this one has ended well."""
    slides, out = [without_counts(slide) for slide in (*cohort.train, *cohort.test)], tmp_path / "out"
    names, paths = [slide.id for slide in slides], predict(model, slides, out)
    bad = dataclasses.replace(slides[0], features=slides[0].features[:, :5])

    def told() -> tuple[int, list[str], list[str]]:
        manifest = json.loads((out / MANIFEST).read_text())
        lines = [line for line in read_lines(out).values() if line.is_done and line.path(out).exists()]
        made = {line.slide for line in lines if seed_of(line.path(out)) == 3}
        return manifest["seed"], sorted(made), manifest["earlier"]

    seed = {"sampling": SamplingConfig(seed=3)}
    with pytest.raises(InputError, match="must have shape"):
        predict(model, [bad, slides[1]], out, **seed, overwrite=True)
    assert told() == (3, [names[1]], sorted(names))
    assert list(map(seed_of, paths)) == [0, 3, 0]
    with pytest.raises(InputError, match="seed differs"):
        predict(model, slides, out, resume=True)
    predict(model, slides[:2], out, **seed, resume=True)
    assert told() == (3, sorted(names[:2]), [])
    assert list(map(seed_of, paths[:2])) == [3, 3]
    assert not paths[2].exists()


def test_the_lines_tell_what_is_there(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    slides, out = [without_counts(slide) for slide in cohort.train], tmp_path / "out"
    first, _ = predict(model, slides, out)
    first.unlink()
    bad = dataclasses.replace(slides[0], features=slides[0].features[:, :5])
    with pytest.raises(InputError, match="must have shape"):
        predict(model, [bad], out, resume=True)
    assert made_in(out) == [slides[1].id]


def small_model() -> Denoiser:
    """For the slides of :mod:`.builders`."""
    torch.manual_seed(0)
    config = DenoiserConfig(4, FEATURES, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    return Denoiser(config, Provenance(("A", "B", "C", "D"), ENCODER)).eval()


FLAGS = [{"overwrite": True}, {"resume": True}, {"overwrite": True, "resume": True}]


@pytest.mark.parametrize("flags", FLAGS)
def test_the_users_own_files_are_never_replaced(tmp_path: Path, flags: dict[str, bool]) -> None:
    """A slide that lies among the predictions: all is refused before anything is predicted."""
    model, out = small_model(), tmp_path / "preds"
    first, other = (write_h5ad(tmp_path / f"{name}.h5ad", arrays(name), features=True) for name in ("S0", "S1"))
    predict(model, first, out)
    own = write_h5ad(out / "S2.h5ad", arrays("S2"), features=True)
    before = all_files(out)
    slide = read(own)
    for given in (own, slide, dataclasses.replace(slide, origin=Origin())):
        with pytest.raises(InputError, match=r"S2\.h5ad: is .*; (move it away, or )?choose another --out$"):
            predict(model, [other, given], out, **flags)
    assert before == all_files(out)


@pytest.mark.parametrize("flags", FLAGS)
def test_a_prediction_that_is_given_as_a_slide_is_not_replaced_by_its_own(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    """Nor taken away where its sections become slides of other names; by whatever path it is given."""
    model, out = small_model(), tmp_path / "preds"
    [made] = predict(model, write_h5ad(tmp_path / "S0.h5ad", arrays("S0"), features=True), out)
    table = anndata.read_h5ad(made)
    table.obsm["features"] = arrays("S0")["features"]
    table.obs["section"] = np.repeat(["left", "right"], 30)
    table.write_h5ad(made)
    before = made.read_bytes()
    (tmp_path / "link").symlink_to(out)
    with pytest.raises(InputError, match=r"S0\.h5ad: is the slide itself, and its prediction would take its place"):
        predict(model, tmp_path / "link" / "S0.h5ad", out, **flags)
    if "overwrite" in flags:
        predict(model, made, out, reading=ReadOptions(library_key="section"), overwrite=True)
        assert {path.name for path in out.glob("*.h5ad")} == {"S0.h5ad", "S0_left.h5ad", "S0_right.h5ad"}
    assert made.read_bytes() == before


def test_resuming_keeps_no_prediction_that_was_read_otherwise(tmp_path: Path) -> None:
    model, out, path = small_model(), tmp_path / "out", write_h5ad(tmp_path / "S0.h5ad", arrays("S0"), features=True)
    table = anndata.read_h5ad(path)
    table.obsm["other"], table.obsm["sp2"] = arrays("S1")["features"], table.obsm["spatial"] * 2
    table.write_h5ad(path)
    features = write_embeddings(tmp_path / "S0.h5", arrays("S0"))
    [made] = predict(model, path, out)
    assert anndata.read_h5ad(made).uns["stflow_fast"]["reading"] == {}
    before = made.read_bytes()
    for changed in ({"features_key": "other"}, {"spatial_key": "sp2"}, {"library_key": ""}, {"embeddings": features}):
        with pytest.raises(InputError, match=rf"{MANIFEST}: reading differs from this call"):
            predict(model, path, out, reading=ReadOptions(**changed), resume=True)
        assert made.read_bytes() == before
        elsewhere = tmp_path / next(iter(changed))
        [other] = predict(model, path, elsewhere, reading=ReadOptions(**changed))
        told = {key: str(value) for key, value in changed.items()}
        assert anndata.read_h5ad(other).uns["stflow_fast"]["reading"] == told
        assert json.loads((elsewhere / MANIFEST).read_text())["reading"] == told
        kept = other.read_bytes()
        predict(model, path, elsewhere, reading=ReadOptions(**changed), resume=True)
        assert other.read_bytes() == kept
    reading = ReadOptions(gene_key="symbol", expression=False, require_features=False)  # decides nothing of it
    predict(model, path, out, reading=reading, resume=True)
    assert made.read_bytes() == before


def test_bad_slides_are_a_line_each_with_their_path(tmp_path: Path) -> None:
    """Also those of which the slide complains, and not the reader."""
    made, wide = arrays("S0"), {"features": np.zeros((60, 5), np.float32)}
    good = write_h5ad(tmp_path / "S0.h5ad", made, features=True)
    bad = [
        write_h5ad(tmp_path / "wide.h5ad", {**made, **wide}, features=True),
        tmp_path / "gone.h5ad",
        write_h5ad(tmp_path / "nan.h5ad", {**made, "centres": np.full((60, 2), np.nan)}, features=True),
    ]
    with pytest.raises(InputError) as raised:
        predict(small_model(), [bad[0], good, *bad[1:]], tmp_path / "out")
    *lines, others = str(raised.value).splitlines()
    assert others == f"1 other slide is in {tmp_path / 'out'}"
    assert sorted(line.split(": ")[0] for line in lines) == sorted(map(str, bad))
    with pytest.raises(InputError, match=r"^.*wide\.h5ad: slide wide: .* \(1 other slide is in .*\)$"):
        predict(small_model(), [bad[0], good], tmp_path / "out", overwrite=True)


@pytest.mark.parametrize(
    ("settings", "field"),
    [({"seed": -1}, "seed"), ({"n_sample_steps": 0}, "n_sample_steps"), ({"prior": "dice"}, "prior")],
)
def test_impossible_draws_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: must be"):
        SamplingConfig(**settings)


def test_two_slides_of_one_name_are_refused(cohort: Cohort, model: Denoiser, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the name of several slides"):
        predict(model, [cohort.test[0], dataclasses.replace(cohort.test[0])], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InputError, match="training did not finish"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="nowhere: is not a folder"):
        load_model(tmp_path / "nowhere")


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match=r"owner/name: is neither a folder .* nor a model within reach .*offline mode.*\)$"
    ):
        load_model("owner/name")
    (tmp_path / "runs").mkdir()
    for mistyped in ("runs/fold0", "nowhere"):
        with pytest.raises(InputError, match="is not a folder"):
            load_model(mistyped)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    for name in ("gpu", "mps", "cuda:99"):
        with pytest.raises(InputError, match="^device: "):
            choose_device(name)


def test_an_evaluation_scores_the_predictions_of_the_test_slides(cohort: Cohort, model: Denoiser) -> None:
    found = evaluate_slides(model, cohort.train, cohort.test)
    slide = cohort.test[0]
    predicted = sample(model, slide, n_sample_steps=4, prior="gaussian").expression.numpy()
    truth = slide.expression(cohort.genes)
    for gene, scores in enumerate(found.result["genes"]):
        assert scores["pearson"] == pytest.approx(np.corrcoef(truth[:, gene], predicted[:, gene])[0, 1], abs=1e-5)
    assert set(found.result["baselines"]) == BASELINES
    assert found.result["nfe"] == 3
    json.dumps(found.result, allow_nan=False)


def test_a_model_is_not_scored_on_slides_it_was_trained_on(
    shared: Callable[[str], Path], model: Denoiser, tmp_path: Path
) -> None:
    model.provenance.training["train"] = {"C6": 178}
    try:
        encoder = dataclasses.replace(model.provenance, encoder="efficientnet_lite0")
        told = Denoiser(model.config, encoder)
        with pytest.raises(InputError, match="fold 0: the model was trained or chosen on its test slides C6"):
            evaluate(told, shared("data/her2st"), 0)
    finally:
        del model.provenance.training["train"]


def test_a_model_is_scored_by_the_column_that_names_the_genes(tmp_path: Path) -> None:
    task = write_task(tmp_path / "task")
    model = write_model(tmp_path / "model", gene_names()[3 : 3 + PANEL])
    expected = evaluate(model, task)
    for path in (task / "adata").iterdir():
        table = anndata.read_h5ad(path)
        table.var = pd.DataFrame({"symbol": table.var_names}, index=[f"ENSG{i}" for i in range(table.n_vars)])
        table.write_h5ad(path)
    with pytest.raises(InputError, match="--gene-key symbol"):
        evaluate(model, task)
    found = evaluate(model, task, gene_key="symbol")
    assert found.result["pearson_mean"] == expected.result["pearson_mean"]


def test_a_short_real_fold_end_to_end(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """Three epochs on fold 1 of her2st, chosen honestly, beat the ridge that HEST-bench uses."""
    root = shared("data/her2st")
    config = TrainingConfig(epochs=3)
    data: TrainingData = load_fold(root, "efficientnet_lite0", 1, config=config)
    run = fit(data, tmp_path / "run", config=config)
    found = evaluate(run.folder, root, 1)
    scores = {name: other["pearson_mean"] for name, other in found.result["baselines"].items()}
    assert scores["hest_ridge"] == pytest.approx(0.290, abs=0.002)
    assert scores["ridge_alpha_1e4"] == pytest.approx(0.477, abs=0.002)
    assert scores["depth_oracle"] == pytest.approx(0.724, abs=0.002)
    assert found.result["pearson_mean"] > scores["ridge_alpha_1e4"]
    embeddings = root / "embeddings" / "efficientnet_lite0" / "fp32" / "B4.h5"
    [path] = predict(run.folder, [embeddings], tmp_path / "out")
    table = anndata.read_h5ad(path)
    order = table.obs_names.get_indexer(found.slides[0].barcodes)
    # The embeddings' corners and the expression's centres differ by a shift, rounded to a pixel: not by what is seen.
    correlation = np.corrcoef(table.X[order].ravel(), found.predicted[0].ravel())[0, 1]
    assert correlation > 0.999

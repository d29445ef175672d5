"""The card of a model's folder: what it says is what the folder tells, and nobody's words are lost."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.hub_mixin import HfApi
from typer.testing import CliRunner

import stflow_fast
from benchmarks.opponents.eager_stflow import EagerDenoiser
from stflow_fast import model_card, windows
from stflow_fast.calibration import calibrate
from stflow_fast.cli import app
from stflow_fast.cohort import evaluate, keep_scores
from stflow_fast.config import DenoiserConfig
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance, fingerprint
from stflow_fast.slides import NORMALIZATIONS
from stflow_fast.training import Run, train
from stflow_fast.windows import TrainingConfig

from .builders import BASELINES, ENCODER, FEATURES, PANEL, gene_names, small_model, write_h5ad, write_task
from .builders import arrays as made_arrays
from .training_cases import TINY

QUICK = TrainingConfig(epochs=2, windows_per_slide=2)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("data") / "her_tiny")


@pytest.fixture
def run(task: Path, tmp_path: Path) -> Run:
    return train(task, tmp_path / "run", ENCODER, denoiser=TINY, config=QUICK)


def card_of(run: Run) -> ModelCard:
    return ModelCard.load(run.folder / "model" / "README.md")


def section(card: ModelCard, heading: str) -> str:
    """The text below a heading."""
    return card.text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0].strip()


def facts(card: ModelCard) -> dict[str, str]:
    """The table on top."""
    rows = re.findall(r"^\| ([^|]+) \| (.+) \|$", card.text.split("\n## ", 1)[0], re.MULTILINE)
    return {name: value for name, value in rows if name != "---"}


def test_of_a_trained_model(run: Run) -> None:
    card = card_of(run)
    assert card.data.library_name == "stflow-fast"
    assert (card.data.license, card.data.license_name) == ("other", "unknown")
    assert {"spatial-transcriptomics", "histology", f"encoder:{ENCODER}"} <= set(card.data.tags)
    assert card.data.pipeline_tag is card.data.datasets is card.data.metrics is card.data.eval_results is None
    said = facts(card)
    assert said["genes"] == ", ".join(gene_names()[3 : 3 + PANEL])
    assert said["patch encoder"] == f"{ENCODER}, {FEATURES} numbers a patch"
    assert said["unit of its predictions"] == "log1p of raw counts"
    assert said["training slides"] == "2 slides, 120 spots: S0 (60), S1 (60)"
    assert said["network"] == "1 layer, hidden size 16, 4 heads, 8 neighbours, swiglu"
    assert said["a sample"] == "from `zinb`, 5 flow times, 4 calls of the network"
    assert said["data"] == "her\\_tiny, fold 0"
    assert "2 epochs were fixed before the training" in section(card, "How its weights were chosen")
    assert section(card, "Scores").startswith("None is known")
    assert section(card, "How sure it is").startswith("Unknown")
    assert str(run.folder) not in card.content  # of nobody's disk


@pytest.mark.parametrize(
    ("select_on", "words"),
    [
        ("validation", r"Epoch [12]: the best by its score on regions held out of the training slides \(2 slides, "),
        ("test", r"Epoch [12]: the best by its score on the TEST slides \(1 slide, 60 spots: S2 \(60\)\)"),
    ],
)
def test_what_the_epoch_was_chosen_on(task: Path, tmp_path: Path, select_on: str, words: str) -> None:
    run = train(task, tmp_path / "run", ENCODER, denoiser=TINY, config=QUICK, select_on=select_on)
    assert re.match(words, section(card_of(run), "How its weights were chosen"))


def test_every_choice_and_every_unit_has_its_words() -> None:
    chosen = {windows.NOTHING, windows.HELD_OUT_SLIDES, windows.HELD_OUT_REGIONS, windows.TEST}
    assert set(model_card.CHOSEN) == chosen
    assert set(model_card.UNITS) == set(NORMALIZATIONS)


def test_of_a_converted_model(tmp_path: Path) -> None:
    published = EagerDenoiser(n_genes=3, feature_dim=5, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    model = stflow_fast.convert(tmp_path / "published.pth", ("A", "B", "C"), "uni", n_neighbors=6, non_negative=True)
    model.save_pretrained(tmp_path / "m")
    card = ModelCard.load(tmp_path / "m" / "README.md")
    assert section(card, "How its weights were chosen").startswith("Converted from `published.pth`")
    assert facts(card)["training slides"] == "unknown"
    assert facts(card)["network"].endswith("6 neighbours, swiglu, a ReLU behind the gene heads")
    assert "a sample" not in facts(card)


def test_of_a_calibrated_and_evaluated_model(run: Run, task: Path) -> None:
    folder = run.folder / "model"
    observation = calibrate(run.folder)
    sure = section(card_of(run), "How sure it is")
    assert sure.startswith(f"It has an observation model (`{observation.law.name}`), fitted on 120 spots of 4 groups")
    assert f"CRPS {observation.about['out_of_fold'][observation.law.name]['crps_mean']:.3f}" in sure

    found = evaluate(run.folder, task)
    assert keep_scores(run.folder, found) == folder / "README.md"
    card, result = card_of(run), found.result
    scores = section(card, "Scores")
    assert "### her\\_tiny, fold 0" in scores
    assert "Test slides: 1 slide, 60 spots: S2 (60)." in scores
    rows = {
        name: cells.split(" | ") for name, cells in re.findall(r"^\| ([a-z][^|]*) \| (.+) \|$", scores, re.MULTILINE)
    }
    names = ("pearson_mean", "spearman_mean", "mse_mean")
    shown = {"this model": result, **{name.replace("_", " "): each for name, each in result["baselines"].items()}}
    assert len(shown) == 1 + len(BASELINES)
    numbers = {
        name: ["none" if each[key] is None else f"{each[key]:.3f}" for key in names] for name, each in shown.items()
    }
    assert rows == numbers
    assert f"CRPS {result['certainty']['crps_mean']:.3f}" in scores
    by_metric = {each.metric_type: each for each in card.data.eval_results}
    assert by_metric["pearsonr"].metric_value == result["pearson_mean"]
    assert by_metric["mse"].dataset_config == "fold 0"
    assert by_metric["spearmanr"].metric_args["slides"] == ["S2"]
    assert card.data.metrics == ["pearsonr", "spearmanr", "mse"]

    # Scores of the same slides by the same sampling take their place, others stand beside them.
    keep_scores(run.folder, found)
    smoothed = evaluate(run.folder, task, sampling=stflow_fast.SamplingConfig(smooth=0.25, draws=3))
    keep_scores(folder, smoothed)
    kept = json.loads((folder / "scores.json").read_text())["evaluations"]
    assert [each["calls"]["smooth"] for each in kept] == [0.0, 0.25]
    scores = section(card_of(run), "Scores")
    assert scores.count("### ") == 2
    assert "One sample from `zinb`, 4 calls, float32, seed 0." in scores
    assert "The mean of 3 samples from `zinb`, 12 calls, float32, seed 0. A share of 0.25 of the mean" in scores

    # Who writes the same weights again keeps them; other weights have no scores.
    model = Denoiser.from_pretrained(folder)
    model.save_pretrained(folder)
    assert section(card_of(run), "Scores").count("### ") == 2
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)
    assert section(card_of(run), "Scores").startswith("None is known")
    assert card_of(run).data.eval_results is None


def test_the_command_evaluate_writes_the_card(run: Run, task: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["evaluate", str(run.folder), str(task), "--maps", str(tmp_path)])
    assert said.exit_code == 0, said.output
    assert "README.md" in said.output.replace("\n", "")
    assert "### her\\_tiny, fold 0" in section(card_of(run), "Scores")


def test_an_edited_card_stays_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, card = small_model(3, ("A", "B", "C"), ENCODER), tmp_path / "m" / "README.md"
    model.save_pretrained(tmp_path / "m")
    written = card.read_text()
    assert str(ModelCard.load(card)) == written
    card.write_bytes(written.replace("\n", "\r\n").encode())  # as a checkout on Windows has it
    model.save_pretrained(tmp_path / "m")
    assert card.read_text() == written
    assert not caplog.records
    for edited in (written.replace("license: other", "license: mit"), written + "My words.\n", "My words.\n", "\xff"):
        card.write_bytes(edited.encode("latin-1"))
        caplog.clear()
        model.save_pretrained(tmp_path / "m")
        assert card.read_bytes() == edited.encode("latin-1")
        [record] = caplog.records
        assert str(card) in record.getMessage()
        assert "stays as it is" in record.getMessage()
    card.unlink()
    model.save_pretrained(tmp_path / "m")
    assert card.read_text() == written


def test_scores_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    model = small_model(3, ("A", "B", "C"), ENCODER)
    for content in ("{", "[]", '{"evaluations": [{}]}', '{"evaluations": 3}'):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "scores.json").write_text(content)
        model.save_pretrained(tmp_path / "m")
        assert "None is known" in (tmp_path / "m" / "README.md").read_text()


def test_what_is_pushed_has_the_card_and_the_scores_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, bytes] = {}

    def upload(self: HfApi, *, folder_path: Path, **told: object) -> str:
        pushed.clear()
        pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return "done"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **told: type("Repo", (), {"repo_id": repo_id}))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    model, folder = small_model(3, ("A", "B", "C"), ENCODER), tmp_path / "m"
    model.save_pretrained(folder)
    (folder / "scores.json").write_text(json.dumps({"evaluations": []}))
    (folder / "README.md").write_text("My words.\n")
    assert model.save_pretrained(folder, push_to_hub=True, repo_id="me/m") == "done"
    assert set(pushed) == {"README.md", "config.json", "model.safetensors", "scores.json"}
    assert pushed["README.md"] == b"My words.\n"
    model.push_to_hub("me/m")
    assert b"library_name: stflow-fast" in pushed["README.md"]


def test_what_the_card_tells_to_type_works(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = section(card_of(run), "How to use it")
    python, shell = (re.search(rf"```{name}\n(.+?)```", how, re.DOTALL)[1] for name in ("python", "bash"))
    folder, made = run.folder / "model", made_arrays("S2")
    write_h5ad(folder / "slides" / "S2.h5ad", made, features=True)
    monkeypatch.chdir(folder)
    names = {"features": torch.from_numpy(made["features"]), "coords": torch.from_numpy(made["centres"])}
    exec(python, names)
    assert names["drawn"].expression.shape == (60, PANEL)
    [line] = shell.splitlines()
    program, *arguments = shlex.split(line, comments=True)
    assert program == "stflow-fast"
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    assert (folder / "predictions" / "S2.h5ad").exists()


def test_names_break_no_table(tmp_path: Path) -> None:
    genes = ("A|B", "C_D_E", "<img>", "F\nG")
    training = {"train": {"a|b\n": 3}, "data": "/home/somebody/t|k", "converted": True, "training": {"seed": 3}}
    model = Denoiser(
        DenoiserConfig(4, FEATURES, **TINY), Provenance(genes, "uni\n---\nlicense: mit", training=training)
    )
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "other"
    assert facts(card)["genes"] == "A\\|B, C\\_D\\_E, \\<img\\>, F G"
    assert facts(card)["training slides"] == "1 slide, 3 spots: a\\|b (3)"
    assert "somebody" not in card.content


@pytest.mark.parametrize("told", [{"train": ["S0"]}, {"train": {"S0": None}}, {"selected_on": 3}, {"training": {}}])
def test_descriptions_of_another_form_are_called_unknown(tmp_path: Path, told: dict[str, object]) -> None:
    model = Denoiser(DenoiserConfig(4, FEATURES, **TINY), Provenance(training=told))
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert facts(card)["training slides"] == "unknown"
    assert facts(card)["genes"] == "4, names unknown"
    assert section(card, "How its weights were chosen").startswith("Unknown")


def test_a_folder_that_cannot_be_written_is_said_and_left(
    run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before, found = (run.folder / "model" / "README.md").read_bytes(), evaluate(run.folder, task)

    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(Path, "write_text", full)
        assert keep_scores(run.folder, found) is None
    assert "No space left on device" in caplog.text
    assert (run.folder / "model" / "README.md").read_bytes() == before
    assert keep_scores("owner/name", found) is None


def test_the_fingerprint_is_of_the_parameters_alone(tmp_path: Path) -> None:
    model = small_model(3, ("A", "B", "C"), ENCODER)
    model.save_pretrained(tmp_path)
    assert fingerprint(Denoiser.from_pretrained(tmp_path)) == fingerprint(model)

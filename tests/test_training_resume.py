"""A run that was killed resumes to the same bits; another is refused, or overwritten."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.runs import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE
from stflow_fast.training import fit, fitting
from stflow_fast.training.trainer import Trainer
from stflow_fast.windows import TrainingData

from .training_cases import QUICK, TINY, data, weights

__all__ = ["data"]  # a fixture


class Killed(Exception):
    pass


def test_a_killed_run_resumes_to_the_same_bits(data: TrainingData, tmp_path: Path) -> None:
    whole = fit(data, tmp_path / "whole", TINY, QUICK)

    def kill(record: dict[str, object]) -> None:
        if record["epoch"] == 2:
            raise Killed

    with pytest.raises(Killed):
        fit(data, tmp_path / "killed", TINY, QUICK, on_epoch=kill)
    resumed = fit(data, tmp_path / "killed", TINY, QUICK, resume=True)
    assert all(map(torch.equal, weights(whole), weights(resumed)))
    without_clock = [[{**r, "seconds": 0} for r in run.records] for run in (whole, resumed)]
    assert without_clock[0] == without_clock[1]


def test_a_run_killed_before_its_first_epoch_resumes(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(data, tmp_path / "run", TINY, QUICK)
    assert len(fit(data, tmp_path / "run", TINY, QUICK, resume=True).records) == 3


def test_a_finished_run_can_be_extended(data: TrainingData, tmp_path: Path) -> None:
    short = dataclasses.replace(QUICK, epochs=2)
    fit(data, tmp_path / "run", TINY, short)
    assert len(fit(data, tmp_path / "run", TINY, QUICK, resume=True).records) == 3


def test_resuming_with_other_settings_is_refused(data: TrainingData, tmp_path: Path) -> None:
    fit(data, tmp_path / "run", TINY, QUICK)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="denoiser.n_layers is 1 there and 2 in this call"):
        fit(data, tmp_path / "run", {**TINY, "n_layers": 2}, QUICK, resume=True)
    with pytest.raises(InputError, match="training.learning_rate is 0.0005 there and 0.001 in this call"):
        fit(data, tmp_path / "run", TINY, dataclasses.replace(QUICK, learning_rate=1e-3), resume=True)
    with pytest.raises(InputError, match="exists already"):
        fit(data, tmp_path / "run", TINY, QUICK)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_an_extended_run_says_how_long_it_was(data: TrainingData, tmp_path: Path) -> None:
    short = dataclasses.replace(QUICK, epochs=2)
    fit(dataclasses.replace(data, description={"data": "here"}), tmp_path / "run", TINY, short)
    moved = dataclasses.replace(data, description={"data": "elsewhere"})
    run = fit(moved, tmp_path / "run", TINY, QUICK, resume=True)
    assert json.loads((run.folder / RUN_FILE).read_text())["training"]["epochs"] == 3
    assert Denoiser.from_pretrained(run.folder / "model").provenance.training["training"]["epochs"] == 3


@pytest.mark.parametrize("spoil", ["{}", "[]", '{"training": 3}'])
def test_a_run_that_describes_nothing_is_not_resumed(data: TrainingData, tmp_path: Path, spoil: str) -> None:
    run = fit(data, tmp_path / "run", TINY, QUICK)
    (run.folder / RUN_FILE).write_text(spoil)
    with pytest.raises(InputError, match=r"run.json: does not describe a training"):
        fit(data, tmp_path / "run", TINY, QUICK, resume=True)


def test_checkpoints_of_something_else_are_named(data: TrainingData, tmp_path: Path) -> None:
    run = fit(data, tmp_path / "run", TINY, QUICK)
    path = run.folder / CHECKPOINT_FILE
    path.write_bytes((run.folder / "model" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"checkpoint.safetensors: is not the checkpoint of a training"):
        fit(data, tmp_path / "run", TINY, QUICK, resume=True)
    path.unlink()
    with pytest.raises(InputError, match=r"checkpoint.safetensors: is missing, but the run has trained"):
        fit(data, tmp_path / "run", TINY, QUICK, resume=True)


def test_a_run_is_overwritten_when_the_next_has_something_to_show(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(data, tmp_path / "run", TINY, QUICK)
    (run.folder / "training.png").write_text("of the first run")
    (run.folder / "evaluation").mkdir()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    other = dataclasses.replace(QUICK, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(data, run.folder, TINY, other, overwrite=True)
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    second = fit(data, run.folder, TINY, other, overwrite=True)
    assert json.loads((run.folder / RUN_FILE).read_text())["training"]["seed"] == 1
    assert not all(map(torch.equal, weights(run), weights(second)))
    assert {path.name for path in run.folder.iterdir()} == {RUN_FILE, METRICS_FILE, CHECKPOINT_FILE, "model"}


def test_an_overwriting_run_that_was_killed_is_not_taken_for_the_one_before(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fit(data, tmp_path / "run", TINY, QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "retire_last_run", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            fit(data, run.folder, TINY, dataclasses.replace(QUICK, seed=7), overwrite=True)
    with pytest.raises(InputError, match=r"checkpoint.safetensors: training.seed is 7 there and 0 in this call"):
        fit(data, run.folder, TINY, QUICK, resume=True)


def test_a_truncated_checkpoint_is_named(data: TrainingData, tmp_path: Path) -> None:
    run = fit(data, tmp_path / "run", TINY, QUICK)
    path = run.folder / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"checkpoint.safetensors: cannot be read"):
        fit(data, tmp_path / "run", TINY, QUICK, resume=True)

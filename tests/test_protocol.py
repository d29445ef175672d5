"""The field's benchmarks by one command: what is run, what is kept, what the table says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stflow_fast.errors import InputError
from stflow_fast.protocol import (
    Plan,
    Task,
    averages_of,
    cells_of,
    certainty_cells_of,
    hest_tasks,
    leakage_of,
    notes_of,
    read_patients,
    rows_of,
    run_protocol,
    stimage_tasks,
)

from .builders import ENCODER, SLIDES, write_split, write_task
from .command_cases import say
from .training_cases import TINY

__all__ = ["say"]  # a fixture

SMALL = {"epochs": 1, "windows_per_slide": 1}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Two tasks; the first has two folds."""
    for name in ("IDC", "HCC"):
        (tmp_path / "bench").mkdir(exist_ok=True)
        write_task(tmp_path / "bench" / name)
    write_split(tmp_path / "bench" / "IDC", "train", (SLIDES[0], SLIDES[2]), 1)
    write_split(tmp_path / "bench" / "IDC", "test", (SLIDES[1],), 1)
    (tmp_path / "bench" / "notes").mkdir()
    return tmp_path / "bench"


def plan(bench: Path, **changes: Any) -> Plan:
    settings = {"seeds": (0, 1), "selections": ("none", "test"), "training": SMALL, "denoiser": TINY, **changes}
    return Plan(hest_tasks(bench, ENCODER), ENCODER, **settings)


def test_all_tasks_folds_seeds_and_selections_are_run_once(bench: Path, tmp_path: Path) -> None:
    begun, epochs = [], []
    out = tmp_path / "out"
    found = run_protocol(plan(bench), out, None, lambda case, *place: begun.append((case.path, *place)), epochs.append)
    assert [path for path, *_ in begun] == [
        *(f"HCC/{selection}/fold0_seed{seed}" for selection in ("none", "test") for seed in (0, 1)),
        *(
            f"IDC/{selection}/fold{fold}_seed{seed}"
            for selection in ("none", "test")
            for fold in (0, 1)
            for seed in (0, 1)
        ),
    ]
    assert begun[-1][1:] == (11, 12)
    assert len(epochs) == 12
    assert (found["done"], found["of"]) == (12, 12)
    for path, *_ in begun:
        assert (out / path / "model").is_dir()
        told = json.loads((out / path / "scores.json").read_text())
        assert set(told["model"]) == {"", "smoothed", "fast"}
        assert (told["model"][""]["nfe"], told["model"]["fast"]["nfe"]) == (4, 1)
        assert told["selected_on"] == ("TEST" if "/test/" in path else "nothing")
    names = {row["predictor"] for row in found["rows"]}
    assert names >= {"STFlow, none", "STFlow, none, smoothed", "STFlow, test, fast", "ridge_alpha_1e4", "depth_oracle"}
    text = (out / "results.md").read_text()
    assert "| STFlow, none | " in text
    assert "as published, which flatters" in text

    epochs.clear()
    again = run_protocol(plan(bench), out, on_epoch=epochs.append)
    assert not epochs
    assert again["rows"] == found["rows"]
    run_protocol(plan(bench, seeds=(0, 1, 2), selections=("none",)), out, on_epoch=epochs.append)
    assert len(epochs) == 3


def test_a_run_of_other_settings_is_not_taken_for_this_one(bench: Path, tmp_path: Path) -> None:
    small = plan(bench, seeds=(0,), selections=("none",))
    run_protocol(small, tmp_path / "out")
    other = plan(bench, seeds=(0,), selections=("none",), training={**SMALL, "learning_rate": 1e-3})
    with pytest.raises(InputError, match="resume with the settings of the run"):
        run_protocol(other, tmp_path / "out")


def one(task: str, fold: int, seed: int, pearson: float | None, ridge: float) -> dict[str, Any]:
    case = {"task": task, "selection": "none", "fold": fold, "seed": seed}
    model = {"": {"pearson_mean": pearson, "seconds": 0.2 * fold}}
    return {"settings": {"case": case}, "model": model, "baselines": {"ridge": {"pearson_mean": ridge}}}


def test_means_are_over_folds_and_spreads_over_seeds() -> None:
    scores = [one("IDC", 0, 0, 0.2, 0.1), one("IDC", 1, 0, 0.4, 0.3), one("IDC", 0, 1, 0.4, 0.1)]
    scores += [one("IDC", 1, 1, 0.6, 0.3), one("HCC", 0, 0, 0.1, 0.0), one("HCC", 0, 1, 0.1, 0.0)]
    rows = {(row["predictor"], row["task"]): row for row in rows_of(scores)}
    ours = rows["STFlow, none", "IDC"]
    assert ours["pearson"] == pytest.approx(0.4)
    assert ours["std"] == pytest.approx(0.2 / 2**0.5)
    assert ours["folds"] == {0: pytest.approx(0.3), 1: pytest.approx(0.5)}
    assert rows["ridge", "IDC"]["std"] == pytest.approx(0.0)
    averages = averages_of(list(rows.values()))
    assert averages["STFlow, none"] == {
        "all": pytest.approx(0.25),
        "n": 2,
        "without_HCC": pytest.approx(0.4),
    }
    assert "STFlow, none" not in averages_of(rows_of([*scores[:4], one("HCC", 0, 0, None, 0.0)]))


def test_one_task_shows_its_folds() -> None:
    scores = [one("IDC", fold, 0, 0.1 * fold, 0.1) for fold in (1, 2)]
    found = {"tasks": [{"name": "IDC", "folds": [1, 2]}], "rows": json.loads(json.dumps(rows_of(scores)))}
    head, lines = cells_of({**found, "averages": averages_of(found["rows"])})
    assert head == ["predictor", "fold 1", "fold 2", "mean (std over seeds)", "s"]
    assert lines == [["STFlow, none", "0.100", "0.200", "0.150", "0.30"], ["ridge", "0.100", "0.100", "0.100", ""]]


def test_a_calibrated_run_is_in_the_table_of_certainty(bench: Path, tmp_path: Path) -> None:
    plain = Plan(hest_tasks(bench, ENCODER, names=["HCC"]), ENCODER, (0,), ("none",), training=SMALL, denoiser=TINY)
    assert not certainty_cells_of(run_protocol(plain, tmp_path / "out"))
    trained: list[dict[str, Any]] = []
    found = run_protocol(dataclasses.replace(plain, certainty=True), tmp_path / "out", on_epoch=trained.append)
    assert not trained  # the run itself is there
    ((name, *cells),) = certainty_cells_of(found)
    assert name == "HCC, STFlow, none"
    (told,) = found["scores"]
    of_spots, regions = (told["model"][""][key] for key in ("certainty", "certainty_of_neighborhoods"))
    random = told["baselines"]["train_mean"]["certainty"]["crps_mean"]
    values = [of_spots["crps_mean"], random, of_spots["coverage_50"], of_spots["coverage_90"]]
    assert cells == [f"{value:.3f}" for value in (*values, regions["coverage_90"], of_spots["spread_ratio"])]
    assert f"| {name} | {cells[0]} |" in (tmp_path / "out" / "results.md").read_text()


def test_patients_on_both_sides_are_named(bench: Path, tmp_path: Path) -> None:
    task = hest_tasks(bench, ENCODER, names=["IDC"])[0]
    unchecked = leakage_of(task, plan(bench))
    assert unchecked == {"checked": False, "folds": {}, "unknown": []}
    table = tmp_path / "patients.csv"
    table.write_text("id,patient\nS0,P1\nS1,P2\nS2,P1\n")
    told = leakage_of(task, plan(bench), read_patients(table))
    assert told == {"checked": True, "folds": {"0": ["P1"], "1": []}, "unknown": []}
    (bench / "IDC" / "slides.csv").write_text("sample_id,patient\nS0,P1\nS1,P1\n")
    told = leakage_of(task, plan(bench))
    assert (told["folds"], told["unknown"]) == ({"0": [], "1": ["P1"]}, ["S2"])
    base = {"encoder": "e", "genes": "g", "seeds": [0], "done": 1, "of": 1, "version": "0"}
    said = "\n".join(notes_of({**base, "leakage": {"IDC": told, "HCC": unchecked}}))
    assert "IDC: patients on both sides of a split: fold 1: P1." in said
    assert "IDC: nobody is named for S2." in said
    assert "HCC: nothing says whose a slide is, so leakage is not checked; give --patients FILE." in said


def test_a_table_of_something_else_names_no_patients(bench: Path) -> None:
    """Nobody has asked for it, and its rows may be longer than its head."""
    for text in ("slide,who\nA1,A,note\n", f"slide,who\nA1,{'x' * 200_000}\n", ""):
        (bench / "IDC" / "slides.csv").write_text(text)
        assert not leakage_of(hest_tasks(bench, ENCODER, names=["IDC"])[0], plan(bench))["checked"]


def test_a_task_without_splits_is_named(bench: Path) -> None:
    for path in (bench / "HCC" / "splits").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"HCC.splits: has no train_0\.csv"):
        hest_tasks(bench, ENCODER)


def test_what_cannot_be_run_is_a_line(bench: Path, tmp_path: Path, say: Callable[..., str]) -> None:
    out = ["--encoder", ENCODER, "--out", tmp_path / "out"]
    assert "protocol: must be hest or stimage" in say("protocol", "hist", bench, *out)
    assert "has no task LUNG; there are HCC, IDC" in say("protocol", "hest", bench, *out, "--tasks", "LUNG")
    assert "has no task; there are no folder with splits/" in say("protocol", "hest", tmp_path, *out)
    assert "selections: must be of none, validation, test" in say(
        "protocol", "hest", bench, *out, "--selections", "luck"
    )
    assert "tasks: must be of Breast" in say("protocol", "stimage", bench, *out, "--tasks", "Heart")
    assert "--set seed: has a flag of its own" in say("protocol", "hest", bench, *out, "--set", "seed=3")
    broken = tmp_path / "patients.csv"
    broken.write_text("slide,who\n")
    said = say("protocol", "hest", bench, *out, "--patients", broken)
    assert "patients.csv: wants columns sample_id (or id) and patient" in said
    assert not (tmp_path / "out").exists()


def test_a_seed_of_stimage_is_a_split() -> None:
    tasks = stimage_tasks("root", (0, 1), ["Brain"])
    cases = list(Plan(tasks, "e", seeds=(0, 1), selections=("none",)).cases())
    assert [(case.fold, case.seed) for case in cases] == [(0, 0), (1, 1)]
    assert len(stimage_tasks("root", (0,))) == 7
    assert tasks == (Task("Brain", "root", (0, 1), "Brain"),)

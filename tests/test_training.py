"""Training learns, resumes to the same bits, selects honestly, and says what it did."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import stflow_fast.training as training
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.synthetic import make_cohort
from stflow_fast.training import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE, Run, fit, load_fold
from stflow_fast.windows import TrainingConfig, TrainingData, Windows, hold_out_regions, hold_out_slides

TINY = {"hidden_dim": 16, "pairwise_hidden_dim": 16, "n_layers": 1}
QUICK = TrainingConfig(epochs=3, windows_per_slide=4, ema_decay=0.5)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    cohort = make_cohort(n_train=2, train_spots=120, test_spots=10, n_genes=6, feature_dim=12)
    rest, regions = hold_out_regions(cohort.train, 0.2, 0)
    return TrainingData(rest, regions, "held-out regions", cohort.genes, "synthetic")


def weights(run: Run) -> list[torch.Tensor]:
    return list(run.model.state_dict().values())


def test_training_lowers_the_loss_and_writes_its_run(data: TrainingData, tmp_path: Path) -> None:
    seen = []
    config = dataclasses.replace(QUICK, epochs=6, learning_rate=3e-3)
    run = fit(data, tmp_path / "run", TINY, config, on_epoch=seen.append)
    assert run.records[-1]["train_loss"] < 0.8 * run.records[0]["train_loss"]
    lines = (run.folder / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.records == seen
    best = max(run.records, key=lambda record: record["selection_pearson"])
    assert run.best_epoch == best["epoch"]
    loaded = Denoiser.from_pretrained(run.folder / "model")
    assert all(map(torch.equal, weights(run), loaded.state_dict().values()))
    assert loaded.provenance.genes == data.genes
    assert loaded.provenance.training["selected_on"] == "held-out regions"
    assert loaded.provenance.training["best_epoch"] == run.best_epoch
    assert set(loaded.provenance.training["train"]) == {slide.id for slide in data.train}


def test_the_same_seed_gives_the_same_model_and_another_another(data: TrainingData, tmp_path: Path) -> None:
    first, second = (fit(data, tmp_path / name, TINY, QUICK) for name in "ab")
    assert all(map(torch.equal, weights(first), weights(second)))
    third = fit(data, tmp_path / "c", TINY, dataclasses.replace(QUICK, seed=1))
    assert not all(map(torch.equal, weights(first), weights(third)))


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
        patch.setattr(training._Trainer, "advance", lambda *_: (_ for _ in ()).throw(Killed))
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
    with pytest.raises(InputError, match="denoiser differs"):
        fit(data, tmp_path / "run", {**TINY, "n_layers": 2}, QUICK, resume=True)
    with pytest.raises(InputError, match="training differs"):
        fit(data, tmp_path / "run", TINY, dataclasses.replace(QUICK, learning_rate=1e-3), resume=True)
    with pytest.raises(InputError, match="exists already"):
        fit(data, tmp_path / "run", TINY, QUICK)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_truncated_checkpoint_is_named(data: TrainingData, tmp_path: Path) -> None:
    run = fit(data, tmp_path / "run", TINY, QUICK)
    path = run.folder / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"checkpoint.safetensors: cannot be read"):
        fit(data, tmp_path / "run", TINY, QUICK, resume=True)


def test_patience_ends_a_run_that_no_longer_improves(data: TrainingData, tmp_path: Path) -> None:
    stuck = dataclasses.replace(QUICK, epochs=20, patience=2, learning_rate=1e-12, ema_decay=0.0)
    run = fit(data, tmp_path / "run", TINY, stuck)
    assert len(run.records) == run.best_epoch + 2 < 20


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (0.9, 1.2), (0.999, 1.002)])
def test_the_running_mean_follows_the_weights(decay: float, expected: float) -> None:
    mean, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(mean.weight, 1.0)
    torch.nn.init.constant_(model.weight, 3.0)
    training._follow(mean, model, decay)
    assert mean.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 3.0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precisions_train(data: TrainingData, tmp_path: Path, precision: str) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = fit(data, tmp_path / "run", TINY, QUICK, precision=precision)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(np.isfinite(record["train_loss"]) for record in run.records)


def test_regions_are_held_out_whole(data: TrainingData) -> None:
    cohort = make_cohort(n_train=2, train_spots=120, test_spots=10, n_genes=6, feature_dim=12)
    for slide, rest, region in zip(cohort.train, data.train, data.selection, strict=True):
        assert sorted([*rest.barcodes, *region.barcodes]) == sorted(slide.barcodes)
        assert region.n_spots == 24
        # A disc: no spot outside is nearer to its middle than the farthest spot inside.
        centre = region.coords[np.argmin([np.linalg.norm(region.coords - c, axis=1).max() for c in region.coords])]
        inside = np.linalg.norm(region.coords - centre, axis=1).max()
        assert (np.linalg.norm(rest.coords - centre, axis=1) < 0.7 * inside).sum() == 0


def test_whole_slides_are_held_out_where_there_are_enough(data: TrainingData) -> None:
    slides = [dataclasses.replace(data.train[0], id=str(number)) for number in range(10)]
    for n, expected in ((2, 0), (3, 0), (4, 1), (10, 2)):
        train, held_out = hold_out_slides(slides[:n], 0.15, seed=0)
        assert len(held_out) == expected
        assert sorted(slide.id for slide in train + held_out) == [str(number) for number in range(n)]
    chosen = {hold_out_slides(slides, 0.1, seed)[1][0].id for seed in range(100)}
    assert chosen == {slide.id for slide in slides}


def test_windows_are_the_nearest_spots_and_do_not_depend_on_their_batch(data: TrainingData) -> None:
    windows = Windows(data, QUICK, n_neighbors=5)
    everything = [window for batch in windows.batches(1) for window in batch]
    assert sorted(everything) == [(slide, number) for slide in (0, 1) for number in range(4)]
    assert windows.batches(1) != windows.batches(2)
    alone, paired = windows.make(1, [(0, 3)]), windows.make(1, [(1, 0), (0, 3)])
    of_window = paired.graph.slide_of == 1
    for name in ("features", "x_0", "x_1"):
        assert torch.equal(getattr(paired, name)[of_window], getattr(alone, name))
    assert torch.equal(paired.t[1:], alone.t)
    assert torch.equal(paired.slide_seed[1:], alone.slide_seed)
    assert alone.graph.n_spots >= 6
    slide = data.train[0]
    rows = [int(np.flatnonzero((slide.features == row.numpy()).all(axis=1))[0]) for row in alone.features]
    centre = slide.coords[rows[int(alone.graph.order.argmin())]]
    distance = np.linalg.norm(slide.coords - centre, axis=1)
    assert distance[rows].max() <= np.delete(distance, rows).min(initial=np.inf) + 1e-9


def test_window_sizes_are_uniform_fractions(data: TrainingData) -> None:
    windows = Windows(data, QUICK, n_neighbors=5)
    sizes = [windows.make(epoch, [(0, n)]).graph.n_spots for epoch in range(50) for n in range(4)]
    fractions = np.array(sizes) / data.train[0].n_spots
    assert abs(fractions.mean() - 0.53) < 0.07  # a little over a half: no window is below K + 1 spots
    assert fractions.max() <= 1


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"n_sample_steps": 1}, "n_sample_steps"),
        ({"prior": "none"}, "prior"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field}: must be"):
        TrainingConfig(**settings)


def test_selecting_on_the_test_fold_is_named_everywhere(shared: object, tmp_path: Path) -> None:
    root = shared("data/her2st")
    honest = load_fold(root, "efficientnet_lite0", 1)
    published = load_fold(root, "efficientnet_lite0", 1, select_on="test")
    assert honest.selected_on == "held-out slides"
    assert len(honest.selection) == 1
    assert {slide.id for slide in honest.train + honest.selection} == {"A1", "C2", "C3", "C4", "C5", "C6"}
    assert {slide.id for slide in published.selection} == {"B4"}
    run = fit(published, tmp_path / "run", TINY, TrainingConfig(epochs=1, windows_per_slide=1))
    assert {record["selected_on"] for record in run.records} == {"TEST"}
    assert json.loads((run.folder / RUN_FILE).read_text())["selected_on"] == "TEST"
    assert Denoiser.from_pretrained(run.folder / "model").provenance.training["selected_on"] == "TEST"

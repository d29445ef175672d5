"""Training learns, selects honestly, and says what it did."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stflow_fast.cohort import SamplingConfig
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.priors import PRIORS, SOURCES, slide_seed
from stflow_fast.runs import METRICS_FILE, RUN_FILE
from stflow_fast.sampling import PreparedSlide, Sample, Sampler, sample
from stflow_fast.training import Diverged, fit, load_fold
from stflow_fast.training import trainer as trainer_module
from stflow_fast.training.trainer import Trainer, _untrained
from stflow_fast.windows import FIXED_EPOCHS, NOTHING, TEST, TrainingConfig, TrainingData, hold_out_slides

from .builders import ENCODER, write_task
from .training_cases import QUICK, TINY, data, weights

__all__ = ["data"]  # a fixture


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


@pytest.mark.parametrize(("layers", "non_negative", "narrow"), [(1, False, True), (2, False, False), (1, True, False)])
def test_heads_of_more_genes_than_they_read_begin_at_zero(layers: int, non_negative: bool, narrow: bool) -> None:
    """Then nothing of a spot is in the first prediction; else weights are those of the published code, as behind a
    ReLU, where a head of zeros and a negative bias would never learn."""
    small = {"hidden_dim": 16, "pairwise_hidden_dim": 16, "n_layers": layers, "non_negative": non_negative}
    settings = DenoiserConfig(n_genes=20, feature_dim=6, **small)
    torch.manual_seed(3)
    untrained = _untrained(settings).eval()
    torch.manual_seed(3)
    for name, value in Denoiser(settings).state_dict().items():
        same = torch.equal(untrained.state_dict()[name], value)
        assert same != (narrow and name.endswith("gene_updater.output.4.weight"))
    drawn = sample(untrained, (torch.randn(30, 6), torch.rand(30, 2))).expression
    assert (drawn.std(dim=0).max() < 1e-6) == narrow


def test_the_same_seed_gives_the_same_model_and_another_another(data: TrainingData, tmp_path: Path) -> None:
    first, second = (fit(data, tmp_path / name, TINY, QUICK) for name in "ab")
    assert all(map(torch.equal, weights(first), weights(second)))
    third = fit(data, tmp_path / "c", TINY, dataclasses.replace(QUICK, seed=1))
    assert not all(map(torch.equal, weights(first), weights(third)))


def test_some_slide_is_left_to_train_on(data: TrainingData, tmp_path: Path) -> None:
    rest, held_out = hold_out_slides(data.train, 0.9, seed=0)
    assert (len(rest), len(held_out)) == (1, 1)
    assert hold_out_slides(data.train[:1], 0.9, seed=0) == (data.train[:1], [])
    with pytest.raises(InputError, match="^train: no slide is left to train on"):
        fit(dataclasses.replace(data, train=[]), tmp_path / "run", TINY, QUICK)


def test_a_diverged_run_says_so_and_keeps_its_best_model(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Diverged, match="learning_rate: training diverged in epoch 1; lower it$"):
        fit(data, tmp_path / "hot", TINY, dataclasses.replace(QUICK, learning_rate=1e30))
    train_epoch = Trainer._train_epoch

    def blow_up(self: Trainer, epoch: int) -> float:
        if epoch == 3:
            self.optimizer.param_groups[0]["lr"] = 1e30
        return train_epoch(self, epoch)

    monkeypatch.setattr(Trainer, "_train_epoch", blow_up)
    with pytest.raises(Diverged, match=r"diverged in epoch 3; lower it \(the model of epoch \d is in .*model\)"):
        fit(data, tmp_path / "run", TINY, QUICK)
    assert Denoiser.from_pretrained(tmp_path / "run" / "model").provenance.training["best_epoch"] in (1, 2)
    assert len((tmp_path / "run" / METRICS_FILE).read_text().splitlines()) == 2


def test_the_test_slides_are_pooled_and_held_out_slides_are_not(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slides, each predicted at random but for its level: pooled they correlate, one by one they do not."""
    levels = iter([0.0, 5.0] * 2)

    def draw(prepared: PreparedSlide, **_: object) -> Sample:
        n = prepared.graph.n_spots
        return Sample(torch.from_numpy(np.random.default_rng(n).normal(size=(n, 6)) + next(levels)), nfe=4)

    monkeypatch.setattr(PreparedSlide, "draw", draw)
    reached = {}
    for selected_on in (TEST, "held-out slides"):
        trainer = Trainer(
            dataclasses.replace(data, selected_on=selected_on), DenoiserConfig(6, 12, **TINY), QUICK, None
        )
        trainer.truth = [truth + level for truth, level in zip(trainer.truth, (0.0, 5.0), strict=True)]
        reached[selected_on] = trainer._score()["selection_pearson"]
    assert reached[TEST] > 0.7
    assert abs(reached["held-out slides"]) < 0.3


def test_patience_ends_a_run_that_no_longer_improves(data: TrainingData, tmp_path: Path) -> None:
    stuck = dataclasses.replace(QUICK, epochs=20, patience=2, learning_rate=1e-12, ema_decay=0.0)
    run = fit(data, tmp_path / "run", TINY, stuck)
    assert len(run.records) == run.best_epoch + 2 < 20


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (0.9, 1.2), (0.999, 1.002)])
def test_the_running_mean_follows_the_weights(decay: float, expected: float) -> None:
    mean, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(mean.weight, 1.0)
    torch.nn.init.constant_(model.weight, 3.0)
    trainer_module._follow(mean, model, decay)
    assert mean.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 3.0


def test_with_nothing_to_choose_on_the_model_is_the_mean_of_all_steps(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dataclasses.replace(data, train=[*data.train, *data.selection], selection=[], selected_on=NOTHING)
    steps, follow = [], trainer_module._follow

    def seen(average: torch.nn.Module, model: torch.nn.Module, share_of_old: float) -> None:
        steps.append([value.detach().clone() for value in model.parameters()])
        follow(average, model, share_of_old)

    monkeypatch.setattr(trainer_module, "_follow", seen)
    config = TrainingConfig(windows_per_slide=2)
    run = fit(whole, tmp_path / "run", TINY, config)
    assert len(run.records) == run.best_epoch == FIXED_EPOCHS
    assert {record["selection_pearson"] for record in run.records} == {None}
    for value, *of_steps in zip(run.model.parameters(), *steps, strict=True):
        torch.testing.assert_close(value, torch.stack(of_steps).mean(dim=0))
    about = Denoiser.from_pretrained(run.folder / "model").provenance.training
    assert (about["selected_on"], about["training"]["epochs"], about["training"]["ema_decay"]) == ("nothing", 8, 1.0)
    fit(whole, tmp_path / "part", TINY, dataclasses.replace(config, epochs=3))
    again = fit(whole, tmp_path / "part", TINY, config, resume=True)
    assert all(map(torch.equal, weights(run), weights(again)))


@pytest.mark.parametrize("name", [name for name in SOURCES if name not in PRIORS])
def test_a_fitted_source_is_trained_with_kept_with_the_model_and_drawn_from(
    data: TrainingData, tmp_path: Path, name: str
) -> None:
    config = dataclasses.replace(QUICK, epochs=1, windows_per_slide=1, prior=name)
    run = fit(data, tmp_path / "run", TINY, config)
    model, slide = Denoiser.from_pretrained(run.folder / "model"), data.train[0]
    assert (model.source.name, model.source.genes) == (name, data.genes)
    prepared = Sampler(model).prepare(slide)
    drawn = prepared.draw(seed=5).expression
    source = model.source.draw(slide.n_spots, 6, slide_seed(5, slide.id), slide.features)
    assert torch.equal(prepared.draw(x_0=torch.from_numpy(source)).expression, drawn)
    assert torch.equal(prepared.draw_blocks(seed=5).expression, drawn)
    assert not torch.equal(Sampler(model, prior="zinb").prepare(slide).draw(seed=5).expression, drawn)
    told = SamplingConfig().describe(model)["prior"]
    assert told["name"] == name
    json.dumps(told)
    resumed = fit(data, tmp_path / "run", TINY, dataclasses.replace(config, epochs=2), resume=True)
    whole = fit(data, tmp_path / "whole", TINY, dataclasses.replace(config, epochs=2))
    assert all(map(torch.equal, weights(resumed), weights(whole)))


def test_a_source_that_a_model_lacks_is_not_drawn_from(data: TrainingData, tmp_path: Path) -> None:
    model = fit(data, tmp_path / "run", TINY, dataclasses.replace(QUICK, epochs=1, windows_per_slide=1)).model
    assert model.source is None
    with pytest.raises(InputError, match="prior: the model has no source 'empirical'; train it with"):
        Sampler(model, prior="empirical")
    with pytest.raises(InputError, match="prior: must be one of zinb"):
        SamplingConfig(prior="zinb-gird")
    per_ten_thousand = dataclasses.replace(data, normalize="cp10k_log1p")
    with pytest.raises(InputError, match="source: conditional draws counts"):
        fit(per_ten_thousand, tmp_path / "other", TINY, dataclasses.replace(QUICK, prior="conditional"))
    assert not (tmp_path / "other").exists()


def test_what_is_left_open_depends_on_what_the_epoch_is_chosen_on() -> None:
    assert dataclasses.astuple(TrainingConfig().filled_in(TEST))[0] == 100
    assert TrainingConfig().filled_in(TEST).ema_decay == 0.0
    given = TrainingConfig(epochs=5, ema_decay=0.9).filled_in(NOTHING)
    assert (given.epochs, given.ema_decay) == (5, 0.9)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_precisions_train(data: TrainingData, tmp_path: Path, precision: str) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run = fit(data, tmp_path / "run", TINY, QUICK, precision=precision)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(np.isfinite(record["train_loss"]) for record in run.records)


def test_half_precision_needs_a_gpu(data: TrainingData, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with pytest.raises(InputError, match="precision: fp16 needs a GPU"):
            fit(data, tmp_path / "run", TINY, QUICK, precision="fp16")
        with pytest.raises(InputError, match="precision: another training of this process set it"):
            fit(data, tmp_path / "run", TINY, QUICK, precision="bf16")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Distributed training by the command line: two processes, one run folder, one voice."""
    task = write_task(tmp_path / "task")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "stflow_fast", "train"]
    small = [word for name in ("hidden_dim", "pairwise_hidden_dim") for word in ("--set", f"{name}=16")]
    options = ["--encoder", ENCODER, "--epochs", "2", "--set", "windows_per_slide=2", *small]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": "0"}
    command = [*launch, str(task), "--out", str(tmp_path / "run"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model of epoch") == 1
    assert json.loads((tmp_path / "run" / RUN_FILE).read_text())["num_processes"] == 2
    assert len((tmp_path / "run" / METRICS_FILE).read_text().splitlines()) == 2
    Denoiser.from_pretrained(tmp_path / "run" / "model")


def test_selecting_on_the_test_fold_is_named_everywhere(shared: object, tmp_path: Path) -> None:
    root = shared("data/her2st")
    honest = load_fold(root, "efficientnet_lite0", 1, select_on="validation")
    whole = load_fold(root, "efficientnet_lite0", 1)
    assert (whole.selected_on, whole.selection) == (NOTHING, [])
    assert {slide.id for slide in whole.train} == {slide.id for slide in honest.train + honest.selection}
    published = load_fold(root, "efficientnet_lite0", 1, select_on="test")
    assert honest.selected_on == "held-out slides"
    assert len(honest.selection) == 1
    assert {slide.id for slide in honest.train + honest.selection} == {"A1", "C2", "C3", "C4", "C5", "C6"}
    assert {slide.id for slide in published.selection} == {"B4"}
    run = fit(published, tmp_path / "run", TINY, TrainingConfig(epochs=1, windows_per_slide=1))
    assert {record["selected_on"] for record in run.records} == {TEST}
    assert json.loads((run.folder / RUN_FILE).read_text())["selected_on"] == "TEST"
    assert Denoiser.from_pretrained(run.folder / "model").provenance.training["selected_on"] == "TEST"

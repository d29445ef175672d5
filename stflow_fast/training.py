"""Training: flow matching on windows of slides, honest selection of the epoch, and resuming to the same bits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .config import DenoiserConfig
from .errors import InputError, first_line
from .evaluation import score
from .files import atomic_path
from .flow import CondOTPath
from .model import Denoiser
from .pretrained import Provenance, load_state, load_tensors, save_tensors
from .priors import FittedSource
from .runs import CHECKPOINT_FILE, METRICS_FILE, MODEL_FOLDER, check_same_run, open_run, retire_last_run
from .sampling import Sampler
from .slides import open_task
from .threads import ahead, spread
from .windows import (
    HELD_OUT_REGIONS,
    HELD_OUT_SLIDES,
    NOTHING,
    TEST,
    TrainingConfig,
    TrainingData,
    WindowBatch,
    Windows,
    hold_out_regions,
    hold_out_slides,
)

PRECISIONS = ("no", "bf16", "fp16")

SELECTIONS = ("none", "validation", "test")
"""What the epoch may be chosen on, see :func:`load_fold`."""


class FlowObjective(nn.Module):
    """The conditional flow matching loss with target prediction; what DistributedDataParallel wraps."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, batch: WindowBatch) -> Tensor:
        """Mean squared error of the predicted x_1 over the spots and genes of the batch."""
        x_t = CondOTPath.sample(batch.x_0, batch.x_1, batch.t[batch.graph.slide_of].unsqueeze(1))
        image = self.denoiser.image_transform(batch.features)
        predicted = self.denoiser.denoise(batch.graph, x_t, image, batch.t, slide_seed=batch.slide_seed)
        return F.mse_loss(predicted.float(), batch.x_1)


class Progress(NamedTuple):
    """How far a run is: what a checkpoint holds beside the optimiser."""

    records: list[dict[str, Any]]
    best: dict[str, Tensor]

    @property
    def epoch(self) -> int:
        return len(self.records)

    @property
    def best_epoch(self) -> int:
        return max((record["epoch"] for record in self.records if record["best"]), default=0)

    @property
    def best_score(self) -> float:
        scores = [record["selection_pearson"] for record in self.records]
        return max((score for score in scores if score is not None), default=-math.inf)


class Diverged(InputError):
    """The loss or a sample is no longer finite."""


@dataclass(frozen=True)
class Run:
    """A finished training: its folder, the model, and a record of every epoch."""

    folder: Path
    model: Denoiser = dataclasses.field(repr=False)
    records: list[dict[str, Any]]
    best_epoch: int


def fit(
    data: TrainingData,
    out: str | Path,
    denoiser: dict[str, Any] | None = None,
    config: TrainingConfig | None = None,
    *,
    precision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Train a denoiser and write a run folder: run.json, metrics.jsonl, checkpoint.safetensors and model/.

    Run it under ``accelerate launch`` for several devices; each then takes its share of the batches of an epoch.

    Args:
        data: slides, panel and what the epoch is chosen on.
        out: the run folder.
        denoiser: fields of DenoiserConfig other than n_genes and feature_dim.
        config: how to train.
        precision: "no" (float32), "bf16" or "fp16" (on a GPU); Accelerate's own setting when None, float32 without.
        resume: go on from the last finished epoch in ``out``; on the CPU the weights end with the same bits as if
            never interrupted.
        overwrite: replace the run in ``out``, once the first epoch is written.
        on_epoch: called with each epoch's record, for a progress bar.

    Raises:
        InputError: genes missing from a slide, features of different sizes, an occupied ``out``, another
            configuration on resume, a truncated checkpoint, or a full disk.
        Diverged: the loss is no longer finite; the best model before that is in ``out``.
    """
    config = (config or TrainingConfig()).filled_in(data.selected_on)
    out = Path(out)
    if not (data.train and (data.selection or data.selected_on == NOTHING)):
        raise InputError("train: no slide is left to train on, or none to choose the epoch on; see validation_fraction")
    settings = DenoiserConfig(n_genes=len(data.genes), feature_dim=_feature_dim(data), **(denoiser or {}))
    trainer = _Trainer(data, settings, config, precision)
    speaks = trainer.accelerator.is_main_process
    if speaks:
        open_run(out, trainer.description, resume, overwrite)
    trainer.accelerator.wait_for_everyone()
    progress, diverged = _run_epochs(trainer, out, resume, on_epoch)
    model = _finished_model(settings, data, trainer, progress)
    if speaks:
        model.save_pretrained(out / MODEL_FOLDER)
    trainer.accelerator.wait_for_everyone()
    if diverged:
        raise Diverged(f"{diverged} (the model of epoch {progress.best_epoch} is in {out / MODEL_FOLDER})")
    return Run(out, model, progress.records, progress.best_epoch)


def _run_epochs(
    trainer: _Trainer, out: Path, resume: bool, on_epoch: Callable[[dict[str, Any]], None] | None
) -> tuple[Progress, Diverged | None]:
    """Epoch after epoch until the last, or until patience or the loss gives out; each is written before the next."""
    config = trainer.config
    progress = trainer.restore(out) if resume else Progress([], {})
    while progress.epoch < config.epochs and progress.epoch - progress.best_epoch < config.patience:
        try:
            progress = trainer.advance(progress)
        except Diverged as error:
            if not progress.best:
                raise
            return progress, error
        if trainer.accelerator.is_main_process:
            trainer.save(out, progress)
            if progress.epoch == 1:
                retire_last_run(out, trainer.description)
            if on_epoch:
                on_epoch(progress.records[-1])
    return progress, None


def train(
    data: str | Path,
    out: str | Path,
    encoder: str,
    fold: int = 0,
    genes: str = "var_50genes.json",
    *,
    embeddings: str | Path | None = None,
    normalize: str = "log1p",
    select_on: str = "none",
    gene_key: str | None = None,
    organ: str | None = None,
    denoiser: dict[str, Any] | None = None,
    config: TrainingConfig | None = None,
    precision: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train on one fold of a HEST-bench task folder: :func:`load_fold` (``encoder`` to ``organ``) and :func:`fit`
    (the others), whose arguments and errors these are. The Python twin of ``stflow-fast train``, without its picture.
    """
    loaded = load_fold(
        data,
        encoder,
        fold,
        genes,
        embeddings=embeddings,
        normalize=normalize,
        select_on=select_on,
        gene_key=gene_key,
        organ=organ,
        config=config,
    )
    return fit(loaded, out, denoiser, config, precision=precision, resume=resume, overwrite=overwrite)


def load_fold(
    data: str | Path,
    encoder: str,
    fold: int = 0,
    genes: str = "var_50genes.json",
    *,
    embeddings: str | Path | None = None,
    normalize: str = "log1p",
    select_on: str = "none",
    gene_key: str | None = None,
    organ: str | None = None,
    config: TrainingConfig | None = None,
) -> TrainingData:
    """The training side of one fold of a HEST-bench task folder, or of an organ of STImage-1K4M.

    With ``select_on="validation"`` the epoch is chosen on the slides of ``splits/val_{fold}.csv`` where there is one,
    else on training slides that are held out, or on regions of them where they are few; with "test" on the test slides,
    as the published code does; with "none" on nothing: all slides but those of the test train, for a fixed number of
    epochs, and the model is the mean of the weights on the way.

    Args:
        data: the task folder.
        encoder: name of the embeddings' folder.
        fold: number of the split.
        genes: the gene list, a file in the task folder or elsewhere; see :func:`stflow_fast.slides.read_genes`.
        embeddings: where the embeddings are, if not in the task folder.
        normalize: see ``stflow_fast.slides.NORMALIZATIONS``.
        select_on: one of :data:`SELECTIONS`.
        gene_key: column of ``var`` with the names of the genes; its index when None.
        organ: of STImage-1K4M, whose folder ``data`` then is; see :class:`stflow_fast.slides.StImageTask`.
        config: its seed and validation_fraction decide the regions.

    Raises:
        InputError: as :func:`stflow_fast.slides.open_task` and Slide; another ``select_on``.
    """
    if select_on not in SELECTIONS:
        raise InputError(f"select_on: must be {', '.join(SELECTIONS[:-1])} or {SELECTIONS[-1]}, not {select_on!r}")
    config = config or TrainingConfig()
    task = open_task(data, encoder, embeddings, gene_key, organ)
    split = task.fold(fold)
    train = [task.slide(name) for name in split.train]
    if select_on == "none":
        train += [task.slide(name) for name in split.val]
        selection, selected_on = [], NOTHING
    elif select_on == "test":
        selection, selected_on = [task.slide(name) for name in split.test], TEST
    elif split.val:
        selection, selected_on = [task.slide(name) for name in split.val], HELD_OUT_SLIDES
    else:
        train, selection = hold_out_slides(train, config.validation_fraction, config.seed)
        selected_on = HELD_OUT_SLIDES
        if not selection:
            train, selection = hold_out_regions(train, config.validation_fraction, config.seed)
            selected_on = HELD_OUT_REGIONS
    told = {"data": str(data), "organ": organ, "fold": fold, "gene_list": genes, "gene_key": gene_key}
    description = {**told, "test": list(split.test)}
    return TrainingData(train, selection, selected_on, task.genes(genes), encoder, normalize, description)


def _feature_dim(data: TrainingData) -> int:
    sizes = {slide.id: slide.feature_dim for slide in [*data.train, *data.selection]}
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != first:
            raise InputError(f"slide {name}: features of size {size}, others have {first}; embed all with one encoder")
    return first


class _Trainer:
    """The network, its running mean and its optimiser, and one epoch after another."""

    def __init__(self, data: TrainingData, settings: DenoiserConfig, config: TrainingConfig, precision: str) -> None:
        self.data, self.config = data, config
        self.windows = Windows(data, config, settings.n_neighbors)
        self.truth = [slide.expression(data.genes, data.normalize) for slide in data.selection]
        self.accelerator = _accelerator(precision)
        torch.manual_seed(config.seed)
        self.model = _untrained(settings)
        self.average = copy.deepcopy(self.model).to(self.accelerator.device)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.objective, self.optimizer = self.accelerator.prepare(FlowObjective(self.model), optimizer)
        self.description = self._describe(settings)

    def _describe(self, settings: DenoiserConfig) -> dict[str, Any]:
        """What decides a run, for run.json and for the model (plain JSON types)."""
        data = self.data
        return {
            **data.description,
            "encoder": data.encoder,
            "normalize": data.normalize,
            "genes": list(data.genes),
            "train": {slide.id: slide.n_spots for slide in data.train},
            "selected_on": data.selected_on,
            "selection": {slide.id: slide.n_spots for slide in data.selection},
            "denoiser": settings.to_dict(),
            "training": dataclasses.asdict(self.config),
            "precision": self.accelerator.mixed_precision,
            "num_processes": self.accelerator.num_processes,
        }

    def advance(self, progress: Progress) -> Progress:
        """Train one epoch more and score it."""
        started = time.perf_counter()
        epoch = progress.epoch + 1
        with spread(self.accelerator.device):
            loss = self._train_epoch(epoch)
            # One process scores for all: were they to differ by a bit, they would stop at different epochs.
            scores = self._score() if self.accelerator.is_main_process else {}
        [scores] = broadcast_object_list([scores])
        _check_finite(bool(scores), epoch)
        reached = scores["selection_pearson"]
        fixed = self.data.selected_on == NOTHING  # then the last epoch is the one
        improved = fixed or (reached is not None and reached > progress.best_score)
        record = {
            "epoch": epoch,
            "train_loss": loss,
            **scores,
            "selected_on": self.data.selected_on,
            "best": improved or not progress.best,
            "seconds": round(time.perf_counter() - started, 3),
        }
        best = _copy(self.average.state_dict()) if record["best"] else progress.best
        return Progress([*progress.records, record], best)

    def _train_epoch(self, epoch: int) -> float:
        self.objective.train()
        batches, world = self.windows.batches(epoch), self.accelerator.num_processes
        # Every process takes as many steps as the others, or their gradient exchange would wait for ever.
        steps = math.ceil(len(batches) / world)
        total = torch.zeros((), device=self.accelerator.device)
        own = [batches[(step * world + self.accelerator.process_index) % len(batches)] for step in range(steps)]
        windows = ahead(functools.partial(self.windows.make, epoch), own, self.accelerator.device)
        with contextlib.closing(windows):
            for step, batch in enumerate(windows):
                total += self._step(batch, (epoch - 1) * steps + step)
        loss = float(self.accelerator.reduce(total / steps, "mean"))
        _check_finite(math.isfinite(loss), epoch)
        return loss

    def _step(self, batch: WindowBatch, done: int) -> Tensor:
        """The loss of one step, behind ``done`` others."""
        with self.accelerator.autocast():
            loss = self.objective(batch.to(self.accelerator.device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        _follow(self.average, self.model, _share_of_old(self.config.ema_decay, done))
        return loss.detach()

    def _score(self) -> dict[str, float | None]:
        """Pearson and mean squared error, means over genes, of sampled expression; empty if that is not finite, None of
        each where nothing is there to score.

        The spots of all TEST slides are pooled, as in the published selection and in HEST-bench. Held-out slides and
        regions are scored one by one: they differ in depth, and pooled they would score that.
        """
        if self.data.selected_on == NOTHING:
            return {"selection_mse": None, "selection_pearson": None, "n_constant_genes": None}
        sampler = Sampler(self.average, self.config.n_sample_steps, self.windows.source)
        drawn = [sampler.prepare(slide).draw(seed=self.config.seed).expression for slide in self.data.selection]
        drawn = [expression.numpy() for expression in drawn]
        pairs = list(zip(self.truth, drawn, strict=True))
        if not all(np.isfinite(made).all() for made in drawn):
            return {}
        if self.data.selected_on == TEST:
            pairs = [tuple(map(np.concatenate, zip(*pairs, strict=True)))]
        scores = [score(truth, made, self.data.genes) for truth, made in pairs]
        defined = [one["pearson_mean"] for one in scores if one["pearson_mean"] is not None]
        return {
            "selection_mse": float(np.mean([one["mse_mean"] for one in scores])),
            "selection_pearson": float(np.mean(defined)) if defined else None,
            "n_constant_genes": sum(one["n_constant_genes"] for one in scores),
        }

    def save(self, out: Path, progress: Progress) -> None:
        """Write checkpoint.safetensors and metrics.jsonl."""
        parts = {"model": self.model.state_dict(), "average": self.average.state_dict(), "best": progress.best}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                parts.setdefault(f"adam.{key}", {})[names[parameter]] = value
        tensors = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
        scaler = self.accelerator.scaler
        metadata = {
            "run": json.dumps(self.description),
            "records": json.dumps(progress.records),
            "scaler": json.dumps(None if scaler is None else scaler.state_dict()),
        }
        save_tensors(out / CHECKPOINT_FILE, _copy(tensors), metadata)
        with atomic_path(out / METRICS_FILE) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in progress.records))

    def restore(self, out: Path) -> Progress:
        """Go back to a run's checkpoint; to the start where there is none: killed before the first epoch ended."""
        path = out / CHECKPOINT_FILE
        if not path.exists():
            if (out / METRICS_FILE).exists():
                raise InputError(f"{path}: is missing, but the run has trained; choose another --out, or --overwrite")
            return Progress([], {})
        tensors, metadata = load_tensors(path)
        if "records" not in metadata:
            raise InputError(f"{path}: is not the checkpoint of a training; choose another --out, or --overwrite")
        part = {
            prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("model.", "average.", "best.", "adam.")
        }
        # Not only run.json: a run that was overwritten and killed in between is described by the one before it.
        check_same_run(path, json.loads(metadata["run"]), self.description)
        load_state(self.model, part["model."], path)
        load_state(self.average, part["average."], path)
        for name, parameter in self.model.named_parameters():
            state = {key: part["adam."][f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(json.loads(metadata["scaler"]))
        return Progress(json.loads(metadata["records"]), part["best."])


def _untrained(settings: DenoiserConfig) -> Denoiser:
    """Random weights, as published; but gene heads with weights of zero where the genes are more than all that heads
    read of a spot.

    Random heads of as many genes as that add noise to each gene which no hidden layer can undo: Adam has to, and takes
    hundreds of steps. Fold 2 of her2st, 80 steps with 13,468 genes: mean Pearson .055 with random heads, .206 with
    these, .193 by the best ridge (benchmarks/results/her2st_notes.md).
    """
    model = Denoiser(settings)
    if settings.heads_are_narrow and not settings.non_negative:  # a ReLU would keep negative biases for ever
        for block in model.backbone.blks:
            nn.init.zeros_(block.gene_updater.head.weight)
    return model


def _accelerator(precision: str | None) -> Accelerator:
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"precision: must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    try:
        # CUDA or the CPU, said outright: left to itself, Accelerate takes a Mac's GPU, which lacks float64, and takes
        # each of several CPU processes for the only one.
        accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
    except ValueError as error:  # Accelerate keeps one state for a whole process
        raise InputError(f"precision: another training of this process set it; {first_line(error)}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("precision: fp16 needs a GPU; use bf16 or no")
    return accelerator


def _check_finite(finite: bool, epoch: int) -> None:
    if not finite:
        raise Diverged(f"learning_rate: training diverged in epoch {epoch}; lower it")


def _share_of_old(ema_decay: float, done: int) -> float:
    """In a running mean of the weights behind ``done`` + 1 steps. A uniform one has those of all steps alike; else the
    first steps are soon forgotten, or the mean would long remember the initial weights."""
    return done / (1 + done) if ema_decay == 1 else min(ema_decay, (1 + done) / (10 + done))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _finished_model(
    settings: DenoiserConfig,
    data: TrainingData,
    trainer: _Trainer,
    progress: Progress,
) -> Denoiser:
    apart = ("genes", "denoiser", "encoder")
    training = {key: value for key, value in trainer.description.items() if key not in apart}
    training["best_epoch"] = progress.best_epoch
    model = Denoiser(settings, Provenance(data.genes, data.encoder, data.normalize, training))
    model.load_state_dict(progress.best)
    model.source = trainer.windows.source if isinstance(trainer.windows.source, FittedSource) else None
    return model.eval()

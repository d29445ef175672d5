"""The network, its running mean and its optimiser, an epoch at a time, and how far they are."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..config import DenoiserConfig
from ..errors import InputError, first_line
from ..evaluation import score
from ..flow import CondOTPath
from ..model import Denoiser
from ..pretrained import Provenance
from ..priors import FittedSource
from ..sampling import Sampler
from ..threads import ahead, spread
from ..windows import NOTHING, TEST, TrainingConfig, TrainingData, WindowBatch, Windows

PRECISIONS = ("no", "bf16", "fp16")


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


class Trainer:
    """The network, its running mean and its optimiser, and one epoch after another."""

    def __init__(
        self, data: TrainingData, settings: DenoiserConfig, config: TrainingConfig, precision: str | None
    ) -> None:
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
        best = cpu_copy(self.average.state_dict()) if record["best"] else progress.best
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
            loss: Tensor = self.objective(batch.to(self.accelerator.device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.config.ema_decay is not None  # it is filled in
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
        samples = [sampler.prepare(slide).draw(seed=self.config.seed).expression for slide in self.data.selection]
        drawn = [expression.numpy() for expression in samples]
        pairs = list(zip(self.truth, drawn, strict=True))
        if not all(np.isfinite(made).all() for made in drawn):
            return {}
        if self.data.selected_on == TEST:
            pairs = [(np.concatenate(self.truth), np.concatenate(drawn))]
        scores = [score(truth, made, self.data.genes) for truth, made in pairs]
        defined = [one["pearson_mean"] for one in scores if one["pearson_mean"] is not None]
        return {
            "selection_mse": float(np.mean([one["mse_mean"] for one in scores])),
            "selection_pearson": float(np.mean(defined)) if defined else None,
            "n_constant_genes": sum(one["n_constant_genes"] for one in scores),
        }


def _untrained(settings: DenoiserConfig) -> Denoiser:
    """Random weights, as published; but gene heads with weights of zero where the genes are more than all that heads
    read of a spot.

    Random heads of as many genes as that add noise to each gene which no hidden layer can undo: Adam has to, and takes
    hundreds of steps. Fold 2 of her2st, 80 steps with 13,468 genes: mean Pearson .055 with random heads, .206 with
    these, .193 by the best ridge (benchmarks/results/her2st_notes.md).
    """
    model = Denoiser(settings)
    if settings.heads_are_narrow and not settings.non_negative:  # a ReLU would keep negative biases for ever
        for block in model.backbone.blocks:
            nn.init.zeros_(block.gene_updater.head.weight)
    return model


def finished_model(
    settings: DenoiserConfig,
    data: TrainingData,
    trainer: Trainer,
    progress: Progress,
) -> Denoiser:
    """The model of the best epoch, in evaluation mode, which knows what decided the run."""
    apart = ("genes", "denoiser", "encoder")
    training = {key: value for key, value in trainer.description.items() if key not in apart}
    training["best_epoch"] = progress.best_epoch
    model = Denoiser(settings, Provenance(data.genes, data.encoder, data.normalize, training))
    model.load_state_dict(progress.best)
    model.source = trainer.windows.source if isinstance(trainer.windows.source, FittedSource) else None
    return model.eval()


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


def cpu_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}

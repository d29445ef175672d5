"""Training: flow matching on windows of slides, honest selection of the epoch, and resuming to the same bits."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from .config import DenoiserConfig
from .errors import InputError
from .evaluation import score
from .files import atomic_path, claim_output, read_json, write_json
from .flow import CondOTPath, sample
from .model import Denoiser
from .pretrained import Provenance, load_tensors, save_tensors
from .slides import HestTask
from .windows import TrainingConfig, TrainingData, WindowBatch, Windows, hold_out_regions, hold_out_slides

PRECISIONS = ("no", "bf16", "fp16")

RUN_FILE, METRICS_FILE, CHECKPOINT_FILE, MODEL_FOLDER = (
    "run.json",
    "metrics.jsonl",
    "checkpoint.safetensors",
    "model",
)


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


@dataclass(frozen=True)
class Run:
    """A finished training: its folder, the model, and a record of every epoch."""

    folder: Path
    model: Denoiser
    records: list[dict[str, Any]]
    best_epoch: int


def fit(
    data: TrainingData,
    out: str | Path,
    denoiser: dict[str, Any] | None = None,
    config: TrainingConfig | None = None,
    *,
    precision: str = "no",
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
        precision: of Accelerate: "no" (float32), "bf16" or "fp16".
        resume: go on from the last finished epoch in ``out``; the weights end as if never interrupted.
        overwrite: replace the run in ``out``.
        on_epoch: called with each epoch's record, for a progress bar.

    Raises:
        InputError: genes missing from a slide, features of different sizes, an occupied ``out``, another
            configuration on resume, a truncated checkpoint, a full disk.
    """
    config = config or TrainingConfig()
    out = Path(out)
    settings = DenoiserConfig(n_genes=len(data.genes), feature_dim=_feature_dim(data), **(denoiser or {}))
    trainer = _Trainer(data, settings, config, precision)
    description = _describe(data, settings, config, precision)
    speaks = trainer.accelerator.is_main_process
    if speaks:
        _open_run(out, description, resume, overwrite)
    trainer.accelerator.wait_for_everyone()
    progress = trainer.restore(out / CHECKPOINT_FILE) if resume else Progress([], {})
    while progress.epoch < config.epochs and progress.epoch - progress.best_epoch < config.patience:
        progress = trainer.advance(progress)
        if speaks:
            trainer.save(out, progress)
            if on_epoch:
                on_epoch(progress.records[-1])
    model = _finished_model(settings, data, description, progress)
    if speaks:
        _replace_model(out / MODEL_FOLDER, model)
    trainer.accelerator.wait_for_everyone()
    return Run(out, model, progress.records, progress.best_epoch)


def train(
    data: str | Path,
    out: str | Path,
    encoder: str,
    fold: int = 0,
    *,
    denoiser: dict[str, Any] | None = None,
    config: TrainingConfig | None = None,
    precision: str = "no",
    resume: bool = False,
    overwrite: bool = False,
    **loading: Any,
) -> Run:
    """Train on one fold of a HEST-bench task folder: :func:`load_fold` (``loading``: its other arguments) and
    :func:`fit`, whose arguments and errors these are."""
    loaded = load_fold(data, encoder, fold, config=config, **loading)
    return fit(loaded, out, denoiser, config, precision=precision, resume=resume, overwrite=overwrite)


def load_fold(
    data: str | Path,
    encoder: str,
    fold: int = 0,
    genes: str = "var_50genes.json",
    *,
    embeddings: str | Path | None = None,
    normalize: str = "log1p",
    select_on: str = "validation",
    config: TrainingConfig | None = None,
) -> TrainingData:
    """The training side of one fold of a HEST-bench task folder.

    The epoch is chosen on the slides of ``splits/val_{fold}.csv`` where there is one, else on training slides
    that are held out, or on regions of them where they are few; with ``select_on="test"`` on the test slides, as the
    published code does.

    Args:
        data: the task folder.
        encoder: name of the embeddings' folder.
        fold: number of the split.
        genes: the gene list, a file in the task folder.
        embeddings: where the embeddings are, if not in the task folder.
        normalize: see ``stflow_fast.slides.NORMALIZATIONS``.
        select_on: "validation" or "test".
        config: its seed and validation_fraction decide the regions.

    Raises:
        InputError: as HestTask and Slide; another ``select_on``.
    """
    if select_on not in ("validation", "test"):
        raise InputError(f"select_on: must be validation or test, not {select_on!r}")
    config = config or TrainingConfig()
    task = HestTask(data, encoder, embeddings)
    split = task.fold(fold)
    train = [task.slide(name) for name in split.train]
    if select_on == "test":
        selection, selected_on = [task.slide(name) for name in split.test], "TEST"
    elif split.val:
        selection, selected_on = [task.slide(name) for name in split.val], "held-out slides"
    else:
        train, selection = hold_out_slides(train, config.validation_fraction, config.seed)
        selected_on = "held-out slides"
        if not selection:
            train, selection = hold_out_regions(train, config.validation_fraction, config.seed)
            selected_on = "held-out regions"
    description = {"data": str(data), "fold": fold, "gene_list": genes, "test": list(split.test)}
    return TrainingData(train, selection, selected_on, task.genes(genes), encoder, normalize, description)


def _feature_dim(data: TrainingData) -> int:
    sizes = {slide.id: slide.feature_dim for slide in [*data.train, *data.selection]}
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != first:
            raise InputError(f"slide {name}: features of size {size}, others have {first}; embed all with one encoder")
    return first


def _describe(data: TrainingData, settings: DenoiserConfig, config: TrainingConfig, precision: str) -> dict[str, Any]:
    return {
        **data.description,
        "encoder": data.encoder,
        "normalize": data.normalize,
        "genes": list(data.genes),
        "train": {slide.id: slide.n_spots for slide in data.train},
        "selected_on": data.selected_on,
        "selection": {slide.id: slide.n_spots for slide in data.selection},
        "denoiser": settings.to_dict(),
        "training": dataclasses.asdict(config),
        "precision": precision,
    }


def _open_run(out: Path, description: dict[str, Any], resume: bool, overwrite: bool) -> None:
    if not resume:
        claim_output(out, RUN_FILE, reuse=overwrite)
        for name in (CHECKPOINT_FILE, METRICS_FILE):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / MODEL_FOLDER, ignore_errors=True)
        write_json(out / RUN_FILE, description)
        return
    before = read_json(out / RUN_FILE)
    # More epochs or more patience extend a run; anything else would make it another one.
    for part in (before, description):
        part["training"] = {k: v for k, v in part["training"].items() if k not in ("epochs", "patience")}
    for field in description:
        if before.get(field) != description[field]:
            raise InputError(f"{out / RUN_FILE}: {field} differs from this call; resume with the settings of the run")


class _Trainer:
    """The network, its running mean and its optimiser, and one epoch after another."""

    def __init__(self, data: TrainingData, settings: DenoiserConfig, config: TrainingConfig, precision: str) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision: must be one of {', '.join(PRECISIONS)}, not {precision!r}")
        self.data, self.config = data, config
        self.windows = Windows(data, config, settings.n_neighbors)
        self.truth = [slide.expression(data.genes, data.normalize) for slide in data.selection]
        self.accelerator = Accelerator(mixed_precision=precision)
        torch.manual_seed(config.seed)
        self.model = Denoiser(settings)
        self.average = copy.deepcopy(self.model).to(self.accelerator.device)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)
        self.objective, self.optimizer = self.accelerator.prepare(FlowObjective(self.model), optimizer)

    def advance(self, progress: Progress) -> Progress:
        """Train one epoch more and score it."""
        started = time.perf_counter()
        loss = self._train_epoch(progress.epoch + 1)
        scores = self._score()
        reached = scores["selection_pearson"]
        improved = reached is not None and reached > progress.best_score
        record = {
            "epoch": progress.epoch + 1,
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
        for step in range(steps):
            batch = batches[(step * world + self.accelerator.process_index) % len(batches)]
            with self.accelerator.autocast():
                loss = self.objective(self.windows.make(epoch, batch).to(self.accelerator.device))
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            done = (epoch - 1) * steps + step
            # The first steps are soon forgotten, or the mean would long remember the initial weights.
            _follow(self.average, self.model, min(self.config.ema_decay, (1 + done) / (10 + done)))
            total += loss.detach()
        return float(self.accelerator.reduce(total / steps, "mean"))

    def _score(self) -> dict[str, float | None]:
        """Mean over slides of the mean Pearson over genes, and of the mean squared error, of sampled expression."""
        how = {name: getattr(self.config, name) for name in ("n_sample_steps", "prior", "seed")}
        scores = []
        for slide, truth in zip(self.data.selection, self.truth, strict=True):
            drawn = sample(self.average, slide, **how)
            scores.append(score(truth, drawn.expression.numpy(), self.data.genes))
        defined = [one["pearson_mean"] for one in scores if one["pearson_mean"] is not None]
        return {
            "selection_mse": float(np.mean([one["mse_mean"] for one in scores])),
            "selection_pearson": float(np.mean(defined)) if defined else None,
        }

    def save(self, out: Path, progress: Progress) -> None:
        """Write checkpoint.safetensors and metrics.jsonl."""
        parts = {"model": self.model.state_dict(), "average": self.average.state_dict(), "best": progress.best}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                parts.setdefault(f"adam.{key}", {})[names[parameter]] = value
        tensors = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
        save_tensors(out / CHECKPOINT_FILE, _copy(tensors), {"records": json.dumps(progress.records)})
        with atomic_path(out / METRICS_FILE) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in progress.records))

    def restore(self, path: Path) -> Progress:
        """Go back to a checkpoint; to the start where there is none: killed before the first epoch ended."""
        if not path.exists():
            return Progress([], {})
        tensors, metadata = load_tensors(path)
        part = {
            prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("model.", "average.", "best.", "adam.")
        }
        self.model.load_state_dict(part["model."], strict=True)
        self.average.load_state_dict(part["average."], strict=True)
        for name, parameter in self.model.named_parameters():
            state = {key: part["adam."][f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
            }
        return Progress(json.loads(metadata["records"]), part["best."])


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1.0 - decay)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}


def _finished_model(
    settings: DenoiserConfig,
    data: TrainingData,
    description: dict[str, Any],
    progress: Progress,
) -> Denoiser:
    training = {key: value for key, value in description.items() if key not in ("genes", "denoiser", "encoder")}
    training["best_epoch"] = progress.best_epoch
    model = Denoiser(settings, Provenance(data.genes, data.encoder, data.normalize, training))
    model.load_state_dict(progress.best)
    return model.eval()


def _replace_model(folder: Path, model: Denoiser) -> None:
    """Write the model's folder whole, then put it where the last one was."""
    with atomic_path(folder.with_name("model.new")) as temporary:
        model.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
    folder.with_name("model.new").rename(folder)

"""A whole training: epoch after epoch into the folder of a run, until the last one, or until it gets no better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DenoiserConfig
from ..errors import InputError
from ..model import Denoiser
from ..runs import MODEL_FOLDER, open_run, retire_last_run
from ..windows import NOTHING, TrainingConfig, TrainingData
from .checkpoint import restore_checkpoint, save_checkpoint
from .folds import load_fold
from .trainer import Diverged, Progress, Trainer, finished_model


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
    trainer = Trainer(data, settings, config, precision)
    speaks = trainer.accelerator.is_main_process
    if speaks:
        open_run(out, trainer.description, resume, overwrite)
    trainer.accelerator.wait_for_everyone()
    progress, diverged = _run_epochs(trainer, out, resume, on_epoch)
    model = finished_model(settings, data, trainer, progress)
    if speaks:
        model.save_pretrained(out / MODEL_FOLDER)
    trainer.accelerator.wait_for_everyone()
    if diverged:
        raise Diverged(f"{diverged} (the model of epoch {progress.best_epoch} is in {out / MODEL_FOLDER})")
    return Run(out, model, progress.records, progress.best_epoch)


def _run_epochs(
    trainer: Trainer, out: Path, resume: bool, on_epoch: Callable[[dict[str, Any]], None] | None
) -> tuple[Progress, Diverged | None]:
    """Epoch after epoch until the last, or until patience or the loss gives out; each is written before the next."""
    config = trainer.config
    assert config.epochs is not None  # it is filled in
    progress = restore_checkpoint(trainer, out) if resume else Progress([], {})
    while progress.epoch < config.epochs and progress.epoch - progress.best_epoch < config.patience:
        try:
            progress = trainer.advance(progress)
        except Diverged as error:
            if not progress.best:
                raise
            return progress, error
        if trainer.accelerator.is_main_process:
            save_checkpoint(trainer, out, progress)
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


def _feature_dim(data: TrainingData) -> int:
    sizes = {slide.id: slide.feature_dim for slide in [*data.train, *data.selection]}
    first = next(iter(sizes.values()))
    for name, size in sizes.items():
        if size != first:
            raise InputError(f"slide {name}: features of size {size}, others have {first}; embed all with one encoder")
    return first

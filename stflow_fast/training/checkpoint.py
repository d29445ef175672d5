"""The checkpoint of a run: a trainer and how far it is, as files, and back to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..files import atomic_path
from ..pretrained import load_state, load_tensors, save_tensors
from ..runs import CHECKPOINT_FILE, METRICS_FILE, check_same_run
from .trainer import Progress, Trainer, cpu_copy


def save_checkpoint(trainer: Trainer, out: Path, progress: Progress) -> None:
    """Write checkpoint.safetensors and metrics.jsonl."""
    parts = {"model": trainer.model.state_dict(), "average": trainer.average.state_dict(), "best": progress.best}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for parameter, state in trainer.optimizer.state.items():
        for key, value in state.items():
            parts.setdefault(f"adam.{key}", {})[names[parameter]] = value
    tensors = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
    scaler = trainer.accelerator.scaler
    metadata = {
        "run": json.dumps(trainer.description),
        "records": json.dumps(progress.records),
        "scaler": json.dumps(None if scaler is None else scaler.state_dict()),
    }
    save_tensors(out / CHECKPOINT_FILE, cpu_copy(tensors), metadata)
    with atomic_path(out / METRICS_FILE) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in progress.records))


def restore_checkpoint(trainer: Trainer, out: Path) -> Progress:
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
    check_same_run(path, json.loads(metadata["run"]), trainer.description)
    load_state(trainer.model, part["model."], path)
    load_state(trainer.average, part["average."], path)
    for name, parameter in trainer.model.named_parameters():
        state = {key: part["adam."][f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        trainer.optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in state.items()
        }
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(json.loads(metadata["scaler"]))
    return Progress(json.loads(metadata["records"]), part["best."])

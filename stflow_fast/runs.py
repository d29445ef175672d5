"""The folder of a training run: what is in it, and who may write there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import check_output, read_json, write_json

RUN_FILE, METRICS_FILE, CHECKPOINT_FILE, MODEL_FOLDER = (
    "run.json",
    "metrics.jsonl",
    "checkpoint.safetensors",
    "model",
)
CURVES_FILE, EVALUATION_FOLDER = "training.png", "evaluation"
"""What the command line adds to a run."""

LEFT_OUT_FOLDER = "left_out"
"""Of networks that ``calibrate`` trained without some of the slides each."""


def model_folder(run: str | Path) -> Path:
    """Where a run keeps its model; ``run`` itself where it is the folder of a model, or a name of the Hub."""
    inside = Path(run) / MODEL_FOLDER
    return inside if inside.is_dir() else Path(run)


def open_run(out: Path, description: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Make sure that a run may be written into ``out``, and write its description where that loses nothing.

    Raises:
        InputError: the folder is occupied, or on ``resume`` holds another run.
    """
    if resume:
        check_same_run(out / RUN_FILE, read_json(out / RUN_FILE), description)
    else:
        check_output(out, RUN_FILE, reuse=overwrite)
    # Until its first epoch is on the disk, a run that overwrites another leaves it as it is.
    if resume or not (out / CHECKPOINT_FILE).exists():
        write_json(out / RUN_FILE, description)


def retire_last_run(out: Path, description: dict[str, Any]) -> None:
    """The first epoch of this run is on the disk: what was left of an overwritten one goes."""
    write_json(out / RUN_FILE, description)
    (out / CURVES_FILE).unlink(missing_ok=True)
    for folder in (MODEL_FOLDER, EVALUATION_FOLDER, LEFT_OUT_FOLDER):
        shutil.rmtree(out / folder, ignore_errors=True)


def check_same_run(path: Path, before: Any, description: dict[str, Any]) -> None:
    """Raise InputError, with the first setting that differs, unless ``path`` describes the run that is to go on."""
    if not isinstance(before, dict) or not isinstance(before.get("training"), dict):
        raise InputError(f"{path}: does not describe a training; choose another --out")

    def compared(run: dict[str, Any]) -> dict[str, Any]:
        # More epochs or more patience extend a run, and data may move; anything else would make it another run.
        training = {key: value for key, value in run["training"].items() if key not in ("epochs", "patience")}
        return {**{key: value for key, value in run.items() if key != "data"}, "training": training}

    difference = _difference(compared(before), compared(description))
    if difference:
        raise InputError(f"{path}: {difference}; resume with the settings of the run")


def _difference(was: Any, now: Any, name: str = "") -> str | None:
    """The first leaf of two nested dicts that differs, in words."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = sorted(was.keys() | now.keys())
        found = (_difference(was.get(key), now.get(key), f"{name}.{key}" if name else key) for key in keys)
        return next(filter(None, found), None)
    if was == now:
        return None
    return f"{name} differs" if isinstance(now, list) else f"{name} is {was!r} there and {now!r} in this call"

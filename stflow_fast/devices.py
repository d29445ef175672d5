"""Which device a model runs on."""

from __future__ import annotations

import torch

from .errors import InputError


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` (a CUDA device where torch finds one, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        InputError: another name, or a CUDA device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: must be auto, cpu, cuda or cuda:N, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name} is not there, torch finds {torch.cuda.device_count()} CUDA devices; use cpu")
    return device

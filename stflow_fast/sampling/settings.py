"""The settings of a sampler: their defaults, what is allowed, and what a model was trained with."""

from __future__ import annotations

import numbers

import torch

from ..errors import InputError
from ..flow import DEFAULT_SAMPLE_STEPS
from ..model import Denoiser
from ..priors import PRIORS, SOURCES, Prior, Source
from ..priors.observation import ObservationModel

DEFAULT_MEMORY_BUDGET = "5GiB"
"""What sampling may spend on keeping edge messages from one flow step to the next: those of the largest public slide,
605,471 spots, by the default model. Measured in benchmarks/results/cpu_notes.md, "time per spot"."""

PRECISIONS = {"float32": None, "tf32": None, "bf16": torch.bfloat16}
"""Of products; parameters, statistics, softmax and positions stay float32."""


def check_draws(draws: object) -> int:
    """Raise InputError unless it is a whole number above 0."""
    if not isinstance(draws, numbers.Integral) or draws < 1:
        raise InputError(f"draws: must be a whole number of at least 1, not {draws!r}")
    return int(draws)


def check_smooth(smooth: float) -> None:
    """Raise InputError unless it is a share."""
    if not 0 <= smooth <= 1:
        raise InputError(f"smooth: must be a share from 0 to 1, not {smooth!r}")


def check_precision(precision: str, model: Denoiser | None = None) -> None:
    """Raise InputError unless it is one of :data:`PRECISIONS`, and of the model."""
    if precision not in PRECISIONS:
        raise InputError(f"precision: must be {' or '.join(PRECISIONS)}, not {precision!r}")
    if model is None or precision == "float32":
        return
    weight = model.image_transform.weight
    if weight.dtype != torch.float32:
        raise InputError(f"precision: {precision} is of a float32 model, not one of {weight.dtype}")
    if precision == "tf32" and not weight.is_cuda:
        raise InputError(f"precision: tf32 is of NVIDIA GPUs, and the model is on the {weight.device.type}")


def resolve(model: Denoiser, n_sample_steps: int | None, prior: Source | str | None) -> tuple[int, Source]:
    """Steps and prior; what is None is what the model was trained with, or else the published default.

    Raises:
        InputError: the name of a source that is fitted, and the model has none of that name.
    """
    trained = model.provenance.training.get("training", {})
    if n_sample_steps is None:
        n_sample_steps = trained.get("n_sample_steps", DEFAULT_SAMPLE_STEPS)
    if model.source is not None and prior in (None, model.source.name):
        return n_sample_steps, model.source
    if isinstance(prior, str) and prior in SOURCES and prior not in PRIORS:
        raise InputError(
            f"prior: the model has no source {prior!r}; train it with --set prior={prior}, or take another"
        )
    of_training = Prior() if model.source is not None else Prior.of_training(trained)
    if prior is None or prior == of_training.name:
        prior = of_training
    return n_sample_steps, Prior(prior) if isinstance(prior, str) else prior


def observation_of(model: Denoiser) -> ObservationModel:
    """That of the model.

    Raises:
        InputError: it has none.
    """
    if model.observation is None:
        raise InputError(
            "draws: the model has no observation model, and its own samples say nothing about certainty; fit one with "
            "stflow-fast calibrate RUN, or leave draws out"
        )
    return model.observation

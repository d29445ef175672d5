"""How predictions are drawn, by which model, and what a prediction says of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..config import parse_bytes
from ..devices import choose_device
from ..errors import InputError
from ..flow import time_grid
from ..model import Denoiser
from ..pretrained import fingerprint
from ..priors import SOURCES, Source, check_seed
from ..runs import MODEL_FOLDER, RUN_FILE, model_folder
from ..sampling import (
    DEFAULT_MEMORY_BUDGET,
    BlockSample,
    Sampler,
    check_draws,
    check_precision,
    check_smooth,
    observation_of,
    resolve,
)
from ..slides import Slide


@dataclass(frozen=True)
class SamplingConfig:
    """How predictions are drawn. ``None`` is what the model was trained with (else the published default).

    Attributes:
        n_sample_steps: times of the flow's grid, at least 2; one more than denoiser calls.
        prior: the source distribution or its name.
        seed: with the slide's id, decides the noise; 0 or larger.
        memory_budget, precision, smooth: see :class:`stflow_fast.Sampler`.
        draws: samples whose mean is predicted, with what the model's observation model says around it; see
            :func:`stflow_fast.sample`. One sample and nothing more when None.

    Raises:
        InputError: a value out of its range, with the field's name.
    """

    n_sample_steps: int | None = None
    prior: Source | str | None = None
    seed: int = 0
    memory_budget: int | str = DEFAULT_MEMORY_BUDGET
    precision: str = "float32"
    smooth: float = 0.0
    draws: int | None = None

    def __post_init__(self) -> None:
        if self.n_sample_steps is not None:
            time_grid(self.n_sample_steps)
        if isinstance(self.prior, str) and self.prior not in SOURCES:
            raise InputError(f"prior: must be one of {', '.join(SOURCES)}, not {self.prior!r}")
        check_seed(self.seed)
        parse_bytes(self.memory_budget)
        check_precision(self.precision)
        check_smooth(self.smooth)
        if self.draws is not None:
            check_draws(self.draws)

    def sampler(self, model: Denoiser) -> Sampler:
        """What samples one slide after another by ``model``, whose weights are folded once.

        Raises:
            InputError: draws of a model without observation model.
        """
        if self.draws is not None:
            observation_of(model)
        steps, prior, budget = self.n_sample_steps, self.prior, self.memory_budget
        return Sampler(model, steps, prior, budget, precision=self.precision, smooth=self.smooth)

    def drawer(self, model: Denoiser) -> Callable[[Slide], BlockSample]:
        """What draws one slide after another by ``model``."""
        sampler = self.sampler(model)
        return lambda slide: sampler.prepare(slide).draw_blocks(self.seed, self.draws or 1)

    def describe(self, model: Denoiser) -> dict[str, Any]:
        """What decides the draws of ``model``, with its own settings filled in (plain JSON types)."""
        steps, prior = resolve(model, self.n_sample_steps, self.prior)
        decided = {"seed": int(self.seed), "n_sample_steps": steps, "prior": prior.named()}
        told = {"draws": self.draws, **observation_of(model).named()} if self.draws else {}
        return {**decided, "precision": self.precision, "smooth": float(self.smooth), **told}


def load_model(run: str | Path, device: str = "auto") -> Denoiser:
    """The model of a run folder, of a ``save_pretrained`` folder, or of the Hugging Face Hub.

    Raises:
        InputError: no model there, a truncated one, a run that has not finished, or a device that is not there.
    """
    folder, place = model_folder(run), str(choose_device(device))
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder}: has no {MODEL_FOLDER}/, its training did not finish; go on with train --resume")
    return Denoiser.from_pretrained(folder, map_location=place)


def model_and_origin(run: str | Path | Denoiser, device: str) -> tuple[Denoiser, str]:
    """A model that is given, or that of :func:`load_model`, and where it is from."""
    return (run, "in memory") if isinstance(run, Denoiser) else (load_model(run, device), str(run))


def gene_names(model: Denoiser) -> tuple[str, ...]:
    """What a model predicts, in the order of its output; numbered where it does not know."""
    return model.provenance.genes or tuple(f"gene_{i}" for i in range(model.config.n_genes))


def selection_of(model: Denoiser) -> dict[str, Any]:
    """How the weights of a model were chosen (plain types)."""
    about = model.provenance.training
    told = {"selected_on": str(about.get("selected_on", "unknown"))}
    named = {"ema_decay": about.get("training", {}).get("ema_decay"), "epoch": about.get("best_epoch")}
    return {**told, **{name: value for name, value in named.items() if value is not None}}


def made_by(model: Denoiser, sampling: SamplingConfig) -> dict[str, Any]:
    """What decides the numbers of a prediction, beside the slide (plain types)."""
    return {
        "weights_sha256": fingerprint(model),
        "version": __version__,
        **selection_of(model),
        **sampling.describe(model),
    }


def drawn_by(model: Denoiser, drawn: BlockSample) -> dict[str, Any]:
    """How a prediction was drawn, and what its numbers are (plain types)."""
    return {
        "nfe": drawn.nfe,
        "device": str(next(model.parameters()).device),
        "encoder": model.provenance.encoder,
        "normalize": model.provenance.normalize,
    }

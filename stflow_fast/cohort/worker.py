"""What is done with one slide: it is read, drawn and written. Every engine calls this."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, OutputError, first_line, with_path
from ..inspection import encoder_misfit
from ..model import Denoiser
from ..outputs import WRITERS, OutputConfig, as_dtype, prediction_table
from ..slides import Slide, SlideSource
from .inputs import path_of
from .maps import draw_map
from .settings import SamplingConfig, drawn_by, gene_names, made_by
from .state import DONE, FAILED, SlideLine

MAPS = "maps"
"""Folder of pictures, in that of the predictions."""

MOST_STATISTICS = 1000
"""Genes up to which every slide's line has numbers of each; else of those with maps alone."""


@dataclass(frozen=True)
class Task:
    """One slide of a run."""

    id: str
    slide: SlideSource | Slide
    reading: dict[str, str]  # what was said of how to read it
    attempts: int = 1  # this one, and those before


@dataclass(frozen=True)
class Settings:
    """What is the same for every slide of a run (plain types, so that another process can have them).

    Attributes:
        out: folder of the predictions.
        origin: where the model is from, as predictions tell.
        ignore_encoder: predict from features of another encoder than the model's, too.
        maps: genes that pictures are drawn of.
    """

    out: Path
    origin: str
    sampling: SamplingConfig
    output: OutputConfig
    ignore_encoder: bool = False
    maps: tuple[str, ...] = ()


def digest(about: dict[str, Any]) -> str:
    """Of what decides a prediction."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


class Drawn(NamedTuple):
    """A slide, its expression [N, genes that are written], and how that was drawn."""

    slide: Slide
    expression: np.ndarray
    about: dict[str, Any]


class Worker:
    """Reads, draws and writes slides by one model. Its three steps may overlap for slides that follow each other."""

    def __init__(self, model: Denoiser, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.about = {**settings.output.describe(gene_names(model)), **made_by(model, settings.sampling)}
        self._draw = settings.sampling.drawer(model)

    def read(self, task: Task) -> Slide:
        """Raises InputError as :func:`stflow_fast.slides.read`, and for features of another encoder."""
        slide = task.slide if isinstance(task.slide, Slide) else task.slide.read()
        if not self.settings.ignore_encoder and (misfit := encoder_misfit(slide, self.model)):
            raise InputError(misfit)
        return slide

    def draw(self, slide: Slide) -> Drawn:
        """The slide's prediction."""
        drawn = self._draw(slide)
        columns = self.settings.output.select(gene_names(self.model))
        expression = as_dtype(slide.id, drawn.expression.float().numpy()[:, columns], self.settings.output.dtype)
        return Drawn(slide, expression, drawn_by(self.model, drawn))

    def write(self, task: Task, made: Drawn) -> SlideLine:
        """The prediction's file and its pictures, and what is to be told of them; no time yet."""
        slide, expression, drawn = made
        output, folder = self.settings.output, self.settings.out
        genes = np.array(gene_names(self.model))[output.select(gene_names(self.model))].tolist()
        told = {**self.about, "reading": task.reading}
        about = {"model": self.settings.origin, **told, **drawn}
        path = output.path(folder, task.id)
        WRITERS[output.to](path, prediction_table(slide, expression, genes, about))
        column = {name: index for index, name in enumerate(genes)}
        return SlideLine(
            task.id,
            str(path_of(task.slide) or ""),
            DONE,
            made=digest(told),
            file=path.name,
            spots=slide.n_spots,
            genes=len(genes),
            attempts=task.attempts,
            notes=tuple(slide.notes),
            micron_per_pixel=slide.micron_per_pixel,
            maps={gene: self._map(task.id, slide, gene, expression[:, column[gene]]) for gene in self.settings.maps},
            statistics=statistics(expression, genes, self.settings.maps),
        )

    def _map(self, name: str, slide: Slide, gene: str, values: np.ndarray) -> dict[str, Any]:
        number = self.settings.maps.index(gene)  # a gene's name may be no file's
        path = self.settings.out / MAPS / f"{name}.{number}.png"
        micron = draw_map(path, values.astype(np.float32), slide.coords, slide.micron_per_pixel)
        return {"path": f"{MAPS}/{path.name}", "micron": micron}

    def failed(self, task: Task, error: BaseException) -> SlideLine:
        """The line of a slide that something went wrong with, foreseen or not.

        Raises:
            OutputError: it would go wrong with every slide.
        """
        if isinstance(error, OutputError):
            raise error
        path = path_of(task.slide)
        said = error if isinstance(error, InputError) else InputError(f"{type(error).__name__}: {first_line(error)}")
        return failed_line(task, with_path(path, said))


def failed_line(task: Task, reason: str) -> SlideLine:
    return SlideLine(
        task.id, str(path_of(task.slide) or ""), FAILED, reason=" ".join(reason.split()), attempts=task.attempts
    )


def statistics(expression: np.ndarray, genes: list[str], maps: Iterable[str]) -> dict[str, list[Any]]:
    """Of each gene over the spots [N]: mean, standard deviation, and the share of spots that are exactly zero."""
    chosen = genes if len(genes) <= MOST_STATISTICS else [gene for gene in maps if gene in genes]
    if not chosen or not len(expression):
        return {}
    column = {name: index for index, name in enumerate(genes)}
    values = expression[:, [column[gene] for gene in chosen]].astype(np.float64)
    numbers = {"mean": values.mean(axis=0), "std": values.std(axis=0), "zeros": (values == 0).mean(axis=0)}
    return {"genes": chosen, **{name: [float(f"{each:.6g}") for each in found] for name, found in numbers.items()}}

"""What is done with one slide: it is read, drawn and written. Every engine calls this."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError, OutputError, as_input_error, with_path
from ..inspection import encoder_misfit
from ..model import Denoiser
from ..outputs import WRITERS, Expression, OutputConfig, as_dtype, prediction_table
from ..sampling import BlockSample, observation_of
from ..slides import Slide, SlideSource
from .inputs import path_of
from .maps import draw_map
from .settings import SamplingConfig, drawn_by, gene_names, made_by
from .state import DONE, FAILED, SlideLine

MAPS = "maps"
"""Folder of pictures, in that of the predictions."""

LEAST_BUDGET = 2**26
"""Bytes below which keeping messages between steps is not worth another try."""

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


class Step(NamedTuple):
    """How far a slide has come: what was made of it last, or the error that ended it."""

    task: Task
    made: Any
    seconds: float = 0.0
    error: Exception | None = None

    def then(self, function: Callable[[Any], Any]) -> Step:
        """The next step, and the time it took; after an error there is none."""
        if self.error is not None:
            return self
        begun, made, failure = time.perf_counter(), None, None
        try:
            made = function(self.made)
        except Exception as error:
            failure = error
        return Step(self.task, made, self.seconds + time.perf_counter() - begun, failure)


class Drawn(NamedTuple):
    """A slide, and what was drawn of it."""

    slide: Slide
    sample: BlockSample


class Worker:
    """Reads, draws and writes slides by one model. Its three steps may overlap for slides that follow each other."""

    def __init__(self, model: Denoiser, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.about = {**settings.output.describe(gene_names(model)), **made_by(model, settings.sampling)}
        self.layers = settings.output.layers(settings.sampling.draws)
        self._columns = settings.output.select(gene_names(model))
        self.genes = np.array(gene_names(model))[self._columns].tolist()
        self._sampler = settings.sampling.sampler(model)

    def read(self, task: Task) -> Slide:
        """Raises InputError as :func:`stflow_fast.slides.read`, and for features of another encoder."""
        slide = task.slide if isinstance(task.slide, Slide) else task.slide.read()
        if not self.settings.ignore_encoder and (misfit := encoder_misfit(slide, self.model)):
            raise InputError(misfit)
        return slide

    def draw(self, slide: Slide) -> Drawn:
        """The slide's prediction. Where the device runs out of memory, less is kept between steps from then on."""
        given = self._sampler.memory_budget
        while (sample := self._sample(slide)) is None:
            torch.cuda.empty_cache()
            half = self._sampler.memory_budget // 2
            self._sampler.memory_budget = half if half >= LEAST_BUDGET else 0
        if self._sampler.memory_budget < given:
            said = f"the device ran out of memory; --memory-budget was {given} bytes, is {self._sampler.memory_budget}"
            slide = dataclasses.replace(slide, notes=(*slide.notes, said))
        return Drawn(slide, sample)

    def _sample(self, slide: Slide) -> BlockSample | None:
        """None where the device has too little memory. Who called this may try again: in here, the error still holds
        what was there."""
        try:
            sampling = self.settings.sampling
            return self._sampler.prepare(slide).draw_blocks(sampling.seed, sampling.draws or 1)
        except torch.OutOfMemoryError:
            if self._sampler.memory_budget == 0:
                raise
            return None

    def write(self, task: Task, drawn: Drawn) -> SlideLine:
        """The prediction's file and its pictures, and what is to be told of them; no time yet."""
        slide, sample = drawn
        output, genes = self.settings.output, self.genes
        told = {**self.about, "reading": task.reading}
        about = {"model": self.settings.origin, **told, **drawn_by(self.model, sample)}
        path = output.path(self.settings.out, task.id)
        seen = Summary(genes, self.settings.maps, slide.n_spots)
        shape = slide.n_spots, len(genes)
        expression = Expression(shape, output.dtype, seen.of(self._blocks(drawn)), self.layers)
        WRITERS[output.to](path, prediction_table(slide, genes, about), expression)
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
            maps={gene: self._map(task.id, slide, gene, seen.maps[gene]) for gene in self.settings.maps},
            statistics=seen.statistics(),
        )

    def _blocks(self, drawn: Drawn) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """Of X and the layers, as they are written."""
        layers_of: Callable[[np.ndarray], Iterable[np.ndarray]]
        layers_of = self._layers(drawn.slide) if self.layers else lambda mean: []
        for rows, part in drawn.sample.blocks():
            mean = part.float().numpy()
            parts = (each[:, self._columns] for each in (mean, *layers_of(mean)))
            yield rows, [as_dtype(drawn.slide.id, each, self.settings.output.dtype) for each in parts]

    def _layers(self, slide: Slide) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
        """What makes the layers [n, all genes] of the mean of the next n spots of a slide."""
        law, sampling, output = observation_of(self.model), self.settings.sampling, self.settings.output
        kept = sampling.draws if output.keep_draws and sampling.draws else 0
        draw = law.drawer(sampling.seed, slide.id, kept, slide.coords)

        def layers(mean: np.ndarray) -> Iterator[np.ndarray]:
            yield law.std(mean)
            yield from (law.quantile(mean, percent) for percent in output.quantiles)
            yield from draw(mean)

        return layers

    def _map(self, name: str, slide: Slide, gene: str, values: np.ndarray) -> dict[str, Any]:
        number = self.settings.maps.index(gene)  # a gene's name may be no file's
        path = self.settings.out / MAPS / f"{name}.{number}.png"
        micron = draw_map(path, values.astype(np.float32), slide.coords, slide.micron_per_pixel)
        return {"path": f"{MAPS}/{path.name}", "micron": micron}

    def line(self, step: Step, computing: float) -> SlideLine:
        """That of a slide whose last step this is, also where something went wrong with it, foreseen or not.

        Args:
            computing: seconds, of those of the step.

        Raises:
            OutputError: it would go wrong with every slide.
        """
        line = step.made if step.error is None else _failed(step.task, step.error)
        return dataclasses.replace(line, seconds=round(step.seconds, 3), computing=round(computing, 3))


def _failed(task: Task, error: Exception) -> SlideLine:
    if isinstance(error, OutputError):
        raise error
    return failed_line(task, with_path(path_of(task.slide), as_input_error(error)))


def failed_line(task: Task, reason: str) -> SlideLine:
    return SlideLine(
        task.id, str(path_of(task.slide) or ""), FAILED, reason=" ".join(reason.split()), attempts=task.attempts
    )


class Summary:
    """What is to be told of a prediction's numbers, gathered while they are written.

    Attributes:
        maps: [N] float32 of each gene that a picture is drawn of.
    """

    def __init__(self, genes: Sequence[str], maps: Sequence[str], n_spots: int) -> None:
        column = {name: index for index, name in enumerate(genes)}
        self.maps = {gene: np.empty(n_spots, np.float32) for gene in maps}
        self._genes = list(genes if len(genes) <= MOST_STATISTICS else maps)
        self._columns = [column[gene] for gene in self._genes]
        self._of_maps = [column[gene] for gene in maps]
        self._n, self._sums = n_spots, np.zeros((3, len(self._columns)))
        self._first = np.zeros(len(self._columns))

    def of(self, blocks: Iterator[tuple[slice, list[np.ndarray]]]) -> Iterator[tuple[slice, list[np.ndarray]]]:
        """The blocks of X and layers, as they pass; X is looked at."""
        for rows, parts in blocks:
            part = parts[0]
            for values, column in zip(self.maps.values(), self._of_maps, strict=True):
                values[rows] = part[:, column]
            numbers = part[:, self._columns].astype(np.float64)
            zeros = (numbers == 0).sum(axis=0)
            if rows.start == 0:
                self._first = numbers[0].copy()
            numbers -= self._first  # so that numbers which hardly differ lose no digits in a difference of squares
            self._sums += numbers.sum(axis=0), np.square(numbers).sum(axis=0), zeros
            yield rows, parts

    def statistics(self) -> dict[str, list[Any]]:
        """Of each gene over the spots: mean, standard deviation, and the share of spots that are exactly zero."""
        if not self._genes or not self._n:
            return {}
        mean, square, zeros = self._sums / self._n
        std = np.sqrt(np.maximum(square - mean**2, 0.0))
        numbers = {"mean": self._first + mean, "std": std, "zeros": zeros}
        told = {name: [float(f"{each:.6g}") for each in found] for name, found in numbers.items()}
        return {"genes": self._genes, **told}

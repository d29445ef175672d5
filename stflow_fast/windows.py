"""What training sees: its settings, its slides, and the windows of slides that make a step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .flow import DEFAULT_SAMPLE_STEPS, time_grid
from .graph import SpotGraph
from .priors import PRIORS, SOURCES, Prior, Source, check_seed, fit_source
from .slides import Slide
from .threads import in_turn


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; the defaults are the published ones where the paper or its code states one.

    Attributes:
        epochs: at most; when None 100, or :data:`FIXED_EPOCHS` with nothing to choose the epoch on.
        patience: epochs without a better selection score before stopping.
        batch_size: windows per step and process.
        windows_per_slide: windows of each slide per epoch; a window is the nearest uniform(0, 1) fraction of the
            slide's spots around a random spot, at least K + 1 of them.
        learning_rate: of Adam.
        clip_norm: largest norm of the gradient.
        prior: name of the source distribution, one of :data:`.priors.SOURCES`; what is to be fitted is fitted on the
            slides that train. The three after it are the parameters of ``zinb``, see Prior.
        n_sample_steps: times of the sampler that scores an epoch.
        validation_fraction: share of the training slides that is held out to choose the epoch by; with too few
            slides for that, one region of every slide, this share of its spots.
        ema_decay: the model that is scored and kept is a running mean of the weights, with this share of the old per
            step (less in the first steps); 0, as published, is the weights themselves, 1 their uniform mean from the
            first step on. When None 0, or 1 with nothing to choose the epoch on.
        seed: of the initial weights, the windows, the noise and the dropout.

    Raises:
        InputError: a value out of its range, with the field's name.
    """

    epochs: int | None = None
    patience: int = 20
    batch_size: int = 2
    windows_per_slide: int = 10
    learning_rate: float = 5e-4
    clip_norm: float = 1.0
    prior: str = Prior.name
    prior_total_count: float = Prior.total_count
    prior_logits: float = Prior.logits
    prior_zi_logits: float = Prior.zi_logits
    n_sample_steps: int = DEFAULT_SAMPLE_STEPS
    validation_fraction: float = 0.15
    ema_decay: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("epochs", "patience", "batch_size", "windows_per_slide"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise InputError(f"{field}: must be at least 1, not {getattr(self, field)}")
        for field in ("learning_rate", "clip_norm"):
            if not (math.isfinite(getattr(self, field)) and getattr(self, field) > 0):
                raise InputError(f"{field}: must be above 0, not {getattr(self, field)}")
        if self.ema_decay is not None and not 0 <= self.ema_decay <= 1:
            raise InputError(f"ema_decay: must be in [0, 1], not {self.ema_decay}")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction: must be between 0 and 1, not {self.validation_fraction}")
        time_grid(self.n_sample_steps)
        check_seed(self.seed)
        if self.prior not in SOURCES:
            raise InputError(f"prior: must be one of {', '.join(SOURCES)}, not {self.prior!r}")
        Prior.of_training({**dataclasses.asdict(self), "prior": Prior.name})

    def filled_in(self, selected_on: str) -> TrainingConfig:
        """With what is None as it is where the epoch is chosen on ``selected_on``."""
        epochs, decay = (FIXED_EPOCHS, 1.0) if selected_on == NOTHING else (100, 0.0)
        return dataclasses.replace(
            self,
            epochs=epochs if self.epochs is None else self.epochs,
            ema_decay=decay if self.ema_decay is None else self.ema_decay,
        )


TEST, HELD_OUT_SLIDES, HELD_OUT_REGIONS, NOTHING = "TEST", "held-out slides", "held-out regions", "nothing"
"""What an epoch is chosen on, as it is called wherever it shows: the published way in capitals. With nothing, the
number of epochs is fixed beforehand, and the model is the mean of the weights on the way."""

FIXED_EPOCHS = 8
"""Fixed before any fold was scored with it (benchmarks/results/her2st_notes.md, "The rule")."""


def selection_words(selected_on: str) -> str:
    """How the weights of a model were chosen."""
    return "no epoch chosen, weights averaged" if selected_on == NOTHING else f"epoch chosen on {selected_on}"


@dataclass(frozen=True)
class TrainingData:
    """What a model learns from and what its epoch is chosen on.

    Attributes:
        train: slides with counts.
        selection: slides with counts, disjoint from ``train`` in spots; none with NOTHING.
        selected_on: what ``selection`` is: HELD_OUT_REGIONS, HELD_OUT_SLIDES, TEST (the published way) or NOTHING.
        genes: the panel, in the order of the model's output.
        encoder: name of the patch encoder.
        normalize: see ``stflow_fast.slides.NORMALIZATIONS``.
        description: where the data came from, kept in run.json and in the model (plain JSON types).
    """

    train: list[Slide]
    selection: list[Slide]
    selected_on: str
    genes: tuple[str, ...]
    encoder: str
    normalize: str = "log1p"
    description: dict[str, Any] = dataclasses.field(default_factory=dict)


def source_of(config: TrainingConfig, data: TrainingData) -> Source:
    """The distribution of x_0; fitted on the slides that train, where it is one that is fitted."""
    if config.prior in PRIORS:
        return Prior.of_training(dataclasses.asdict(config))
    return fit_source(config.prior, data.train, data.genes, data.normalize)


def hold_out_slides(slides: list[Slide], fraction: float, seed: int) -> tuple[list[Slide], list[Slide]]:
    """Split off ``round(fraction * n)`` random slides, but not all: (the others, those). None with few slides.

    What a model must do is predict a slide that it has not seen. Regions of training slides say less about that: their
    surroundings, stain and depth are known.
    """
    n = min(round(fraction * len(slides)), len(slides) - 1)
    chosen = set(np.random.default_rng([seed, len(slides)]).permutation(len(slides))[:n].tolist())
    return (
        [slide for index, slide in enumerate(slides) if index not in chosen],
        [slide for index, slide in enumerate(slides) if index in chosen],
    )


def hold_out_regions(slides: list[Slide], fraction: float, seed: int) -> tuple[list[Slide], list[Slide]]:
    """Split every slide into the region nearest to a random spot (``fraction`` of its spots) and the rest.

    A region, not scattered spots: the neighbours of a scattered spot would give it away.

    Returns:
        (what is left of each slide, the regions). A slide too small to give up a spot stays whole.
    """
    rest, regions = [], []
    for index, slide in enumerate(slides):
        n = int(fraction * slide.n_spots)
        if n < 1:
            rest.append(slide)
            continue
        rng = np.random.default_rng([seed, index])
        nearest = _nearest(slide.coords, int(rng.integers(slide.n_spots)), slide.n_spots)
        regions.append(slide.subset(np.sort(nearest[:n])))
        rest.append(slide.subset(np.sort(nearest[n:])))
    if not regions:
        raise InputError(
            f"validation_fraction: {fraction} of every training slide is less than a spot; raise it or give a val split"
        )
    return rest, regions


def _nearest(coords: np.ndarray, spot: int, n: int) -> np.ndarray:
    return np.argsort(((coords - coords[spot]) ** 2).sum(axis=1), kind="stable")[:n]


class WindowBatch(NamedTuple):
    """Windows packed as the slides of one graph; rows in the graph's order."""

    graph: SpotGraph
    features: Tensor  # [N, F]
    x_0: Tensor  # [N, G]
    x_1: Tensor  # [N, G]
    t: Tensor  # [S]
    slide_seed: Tensor  # [S] of the dropout

    def to(self, device: torch.device) -> WindowBatch:
        return WindowBatch(
            self.graph.to(device),
            self.features.to(device),
            self.x_0.to(device),
            self.x_1.to(device),
            self.t.to(device),
            self.slide_seed.to(device),
        )


class _Window(NamedTuple):
    """One of them; see :class:`WindowBatch`."""

    coords: np.ndarray  # [n, 2]
    features: np.ndarray
    x_0: np.ndarray
    x_1: np.ndarray
    t: float
    slide_seed: int


class Windows:
    """The windows of an epoch. Each is a function of (seed, epoch, slide, number), whatever the batches.

    Attributes:
        source: what x_0 is drawn from.
    """

    def __init__(self, data: TrainingData, config: TrainingConfig, n_neighbors: int) -> None:
        self._slides = data.train
        self._targets = [slide.panel(data.genes, data.normalize) for slide in data.train]
        self.source = source_of(config, data)
        self._config = config
        self._n_neighbors = n_neighbors

    def batches(self, epoch: int) -> list[list[tuple[int, int]]]:
        """(slide, number) of the windows of each step, shuffled."""
        windows = [
            (slide, number) for slide in range(len(self._slides)) for number in range(self._config.windows_per_slide)
        ]
        order = np.random.default_rng([self._config.seed, 1, epoch]).permutation(len(windows))
        size = self._config.batch_size
        return [[windows[i] for i in order[start : start + size]] for start in range(0, len(windows), size)]

    def make(self, epoch: int, batch: list[tuple[int, int]]) -> WindowBatch:
        """The windows of a step, drawn by the threads that there are."""
        made: list[_Window] = []
        in_turn(lambda window: self._window(epoch, *window), batch, torch.device("cpu"), made.append)
        coords, features, x_0, x_1, t, seeds = zip(*made, strict=True)
        slide_ptr = np.cumsum([0, *map(len, coords)])
        graph = SpotGraph.build(np.concatenate(coords), self._n_neighbors, slide_ptr)

        def rows(parts: tuple[np.ndarray, ...]) -> Tensor:
            return graph.to_rows(torch.from_numpy(np.concatenate(parts)))

        return WindowBatch(graph, rows(features), rows(x_0), rows(x_1), torch.tensor(t), torch.tensor(seeds))

    def _window(self, epoch: int, index: int, number: int) -> _Window:
        slide = self._slides[index]
        sequence = np.random.SeedSequence([self._config.seed, 2, epoch, index, number])
        for_window, for_noise, for_dropout = sequence.spawn(3)
        rng = np.random.default_rng(for_window)
        size = min(slide.n_spots, max(self._n_neighbors + 1, math.ceil(rng.uniform() * slide.n_spots)))
        # In the slide's order: ties between neighbours are broken by it, here as in the whole slide.
        spots = np.sort(_nearest(slide.coords, int(rng.integers(slide.n_spots)), size))
        assert slide.features is not None  # what trains has them
        features, x_1 = slide.features[spots], self._targets[index][spots]
        x_0 = self.source.draw(size, x_1.shape[1], for_noise, features)
        seed = int(for_dropout.generate_state(1, np.uint64)[0] >> np.uint64(2))
        return _Window(slide.coords[spots], features, x_0, x_1, rng.uniform(), seed)

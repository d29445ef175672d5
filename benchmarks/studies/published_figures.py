"""What ours and the published code make of a slide: how far apart they are, and how long each takes."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stflow_fast import Denoiser, DenoiserConfig, Sampler, accelerate
from stflow_fast.checkpoints import shapes_to_config
from stflow_fast.flow import FIRST_TIME

from ..opponents.eager_stflow import eager_sample
from ..suite import measure
from ..suite.slides import BenchmarkSlide, benchmark_slide
from ..suite.workload import SAMPLE_STEPS
from .published_code import PublishedCode

LIMIT = 1e-5
"""Of a difference over the largest entry of the published result."""

LAYOUTS = {"uniform": "random", "visium_jittered": "lattice"}
"""Of the slides, and their names in the table."""

DTYPES = (torch.float64, torch.float32)
QUANTITIES = ("prediction", "sample", "loss", "gradients")
THROUGH = PUBLISHED, DENOISER, ACCELERATE, SAMPLER = ("published", "Denoiser", "accelerate", "native sampler")

RACERS = 4

TRAINING_TIME = 0.3
"""Flow time of the loss."""

NO_GRADIENT = 1e-9
"""Of the largest entry of all gradients: below it, in float64, a parameter's is rounding (1e-15), and none is really so
small. The last biases in front of a softmax are such parameters: they shift all its inputs alike."""

Row = dict[str, Any]

Slides = dict[DenoiserConfig, list[tuple[int, str]]]
"""Of every variant, the one that the code is by itself first: spots and layout of its slides."""


class Plan(NamedTuple):
    network: dict[str, int]  # settings of DenoiserConfig
    spots: list[int]  # ascending
    gradient_spots: int  # most, for loss and gradients
    rounds: int


class Result(NamedTuple):
    """What one implementation makes of a slide."""

    values: dict[str, Tensor]  # prediction and sample [N, G]; loss [] where it was asked for
    gradients: dict[str, Tensor]  # of each parameter, by name


Implementation = Callable[[BenchmarkSlide, bool], Result]
"""A slide, in the dtype of the weights, and whether loss and gradients are wanted."""


def ours(config: DenoiserConfig, published: nn.Module) -> Denoiser:
    """Our Denoiser with the parameters of the published one, in their dtype.

    Raises:
        InputError: it has other parameters.
    """
    state = published.state_dict()
    model = Denoiser(shapes_to_config(state, **config.to_dict())).to(next(published.parameters()).dtype)
    model.load_state_dict(state, strict=True)
    return model.eval()


def implementations(code: PublishedCode, config: DenoiserConfig, dtype: torch.dtype) -> dict[str, Implementation]:
    """One network each, for all slides: what is kept from one of them must not be taken for another's."""
    published = code.build(config, dtype)
    denoiser = ours(config, published)
    models = {PUBLISHED: published, DENOISER: denoiser, ACCELERATE: accelerate(copy.deepcopy(published))}
    sampler = Sampler(ours(config, published), SAMPLE_STEPS)
    by_calls: dict[str, Implementation] = {name: functools.partial(result_of, model) for name, model in models.items()}
    return {**by_calls, SAMPLER: functools.partial(sampled, sampler)}


def result_of(model: Any, slide: BenchmarkSlide, with_gradients: bool) -> Result:
    """By the published calls. The prediction is that of the first step of the sample."""
    predictions: list[Tensor] = []

    def inference(*inputs: Tensor) -> Tensor:
        predictions.append(model.inference(*inputs))
        return predictions[-1]

    loop: Any = SimpleNamespace(inference=inference)
    sample = eager_sample(loop, slide.features, slide.coords, slide.x_0, SAMPLE_STEPS)
    values = {"prediction": predictions[0][0], "sample": sample}
    if not with_gradients:
        return Result(values, {})
    batch = [part.unsqueeze(0) for part in (slide.x_0, slide.features, slide.coords, slide.x_1)]
    model.train()
    _, loss = model(*batch, torch.tensor([TRAINING_TIME], dtype=torch.float64))
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    model.eval()
    return Result(values | {"loss": loss.detach()}, gradients)


def sampled(sampler: Sampler, slide: BenchmarkSlide, with_gradients: bool) -> Result:
    """The sampler has neither loss nor gradients."""
    prepared = sampler.prepare((slide.features, slide.coords))
    prediction = prepared.denoise(slide.x_0, FIRST_TIME)
    return Result({"prediction": prediction, "sample": prepared.draw(x_0=slide.x_0).expression}, {})


def differences(found: Result, expected: Result) -> Row:
    """Of each quantity the largest, over the largest entry that is expected; of gradients the parameter's that is
    farthest, and its name."""
    row: Row = {name: _apart(value, expected.values[name]) for name, value in found.values.items()}
    if found.gradients:
        apart = gradient_differences(found.gradients, expected.gradients)
        farthest = max(apart, key=apart.__getitem__)
        row |= {"gradients": apart[farthest], "farthest_gradient": farthest}
    return row


def gradient_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By parameter. In float64 each over its own largest entry. In float32 all over the largest entry of any, as one
    vector: of small gradients, rounding leaves the published code fewer digits than the limit asks for."""
    largest = {name: gradient.abs().max().item() for name, gradient in expected.items()}
    of_all = max(largest.values())

    def scale(name: str) -> float:
        own = found[name].dtype == torch.float64 and largest[name] > NO_GRADIENT * of_all
        return largest[name] if own else of_all

    return {name: _apart(gradient, expected[name], scale(name)) for name, gradient in found.items()}


def _apart(found: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Infinite where something is not finite."""
    largest = (found.double() - expected.double()).abs().max().item()
    apart = largest / (expected.double().abs().max().item() if scale is None else scale)
    return apart if math.isfinite(apart) else math.inf


def is_judged(row: Row, quantity: str) -> bool:
    """All of ours but float32 gradients through a ReLU. Its derivative jumps at zero, so where rounding decides on
    which side an input lies, a gradient is off by a whole edge or spot: by up to 7e-4 of the largest, and as often the
    published code's as ours. On a slide of 500 spots, 18 of 7M inputs lie within rounding of zero."""
    through_relu = row["non_negative"] or row["activation"] == "relu"
    return row["through"] != PUBLISHED and not (quantity == "gradients" and row["dtype"] == "float32" and through_relu)


def is_apart(row: Row, quantity: str) -> bool:
    return quantity in row and is_judged(row, quantity) and not row[quantity] <= LIMIT


def compare(code: PublishedCode, planned: Slides, gradient_spots: int, begin: Callable[[str], None]) -> Iterator[Row]:
    """A row per variant, slide, precision and implementation; ``begin`` is told which is under way."""
    for config, slides in planned.items():
        by_dtype = {dtype: implementations(code, config, dtype) for dtype in DTYPES}
        for spots, layout in slides:
            slide = benchmark_slide(layout, spots, n_genes=config.n_genes, feature_dim=config.feature_dim)
            expected = None
            for dtype, through in itertools.product(DTYPES, THROUGH):
                row: Row = {"activation": config.activation, "non_negative": config.non_negative, "layout": layout}
                row |= {"spots": spots, "dtype": str(dtype).removeprefix("torch."), "through": through}
                begin(f"{variant_of(row)}, {layout}, {spots:,} spots, {row['dtype']}, {through}")
                cast = BenchmarkSlide(*(part.to(dtype) for part in slide))
                found = by_dtype[dtype][through](cast, spots <= gradient_spots)
                if expected is None:
                    expected = found
                else:
                    yield row | differences(found, expected)


def variant_of(row: Row) -> str:
    return str(row["activation"]) + (", ReLU" if row["non_negative"] else "")


def racers(code: PublishedCode, config: DenoiserConfig, slide: BenchmarkSlide) -> dict[str, Callable[[], Tensor]]:
    """A five-step sample each, in float32. Coordinates are a new tensor for each, as those of a new slide are."""
    published = code.build(config, torch.float32)
    accelerated = accelerate(copy.deepcopy(published))
    slide = BenchmarkSlide(*(part.float() for part in slide))
    sampler = Sampler(ours(config, published), SAMPLE_STEPS)
    prepared = sampler.prepare((slide.features, slide.coords))

    def published_loop(model: Any) -> Tensor:
        return eager_sample(model, slide.features, slide.coords.clone(), slide.x_0, SAMPLE_STEPS)

    def native() -> Tensor:
        drawn: Tensor = sampler.prepare((slide.features, slide.coords.clone())).draw(x_0=slide.x_0).expression
        return drawn

    return {
        PUBLISHED: lambda: published_loop(published),
        ACCELERATE: lambda: published_loop(accelerated),
        SAMPLER: native,
        f"{SAMPLER}, prepared before": lambda: prepared.draw(x_0=slide.x_0).expression,
    }


def race(code: PublishedCode, config: DenoiserConfig, plan: Plan, begin: Callable[[str], None]) -> Iterator[Row]:
    """A row per size and racer, on a random slide; all have run on that size before."""
    for spots in plan.spots if plan.rounds else []:
        slide = benchmark_slide(next(iter(LAYOUTS)), spots, n_genes=config.n_genes, feature_dim=config.feature_dim)
        named = racers(code, config, slide)
        times: dict[str, list[float]] = {name: [] for name in named}
        for turn, (name, run) in itertools.product(range(plan.rounds), named.items()):
            begin(f"round {turn + 1} of {plan.rounds}, {spots:,} spots, {name}")
            times[name].append(1e3 * measure.clocked(run, torch.device("cpu"))[1])
        quantiles = {name: measure.times_of(taken) for name, taken in times.items()}
        for name, (median, low, high) in quantiles.items():
            figures = {"median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": plan.rounds}
            yield {"spots": spots, "through": name, **figures, "times_as_fast": quantiles[PUBLISHED][0] / median}

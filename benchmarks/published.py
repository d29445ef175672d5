"""Is what we compute what the published code computes? Ours held against a checkout of it, and timed in turns.

python -m benchmarks.published --code FOLDER [--spots 500,3000,10000] [--rounds 3] [--json FILE] [--quick]

FOLDER is a checkout of the published code or of a fork. Its model/denoiser.py is imported, so its code is executed.
The smallest size runs every variant, the others the one that the code is by itself, with random weights, on random
slides and on jittered lattices: prediction, five-step sample, training loss and every gradient, by our Denoiser, by
accelerate and by the native sampler.

All are held against the published code in float64, which says what it means: ours in float64 and in float32, and the
published code in float32, whose rounding is its own. The exit code is 0 where ours are within the limit, 1 where
something is not, 2 for bad input, 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from stflow_fast import Denoiser, DenoiserConfig, Sampler, accelerate
from stflow_fast.checkpoints import shapes_to_config
from stflow_fast.config import ACTIVATIONS
from stflow_fast.errors import InputError, first_line
from stflow_fast.files import write_json
from stflow_fast.flow import FIRST_TIME
from stflow_fast.progress import figures_bar

from . import measure
from .baselines.eager_stflow import eager_sample
from .looks import seconds
from .providers import over_budget
from .published_code import PublishedCode, load
from .slides import BenchmarkSlide, benchmark_slide
from .workload import FEATURE_DIM, N_GENES, SAMPLE_STEPS, parse_sizes

LIMIT = 1e-5
"""Of a difference over the largest entry of the published result."""

LAYOUTS = {"uniform": "random", "visium_jittered": "lattice"}
"""Of the slides, and their names in the table."""

DTYPES = (torch.float64, torch.float32)
QUANTITIES = ("prediction", "sample", "loss", "gradients")
HEADINGS = {"prediction": "predict", "gradients": "gradient"}
THROUGH = PUBLISHED, DENOISER, ACCELERATE, SAMPLER = ("published", "Denoiser", "accelerate", "native sampler")
APART, NOT_JUDGED = "!", "*"

RACERS = 4

TRAINING_TIME = 0.3
"""Flow time of the loss."""

NO_GRADIENT = 1e-9
"""Of the largest entry of all gradients: below it, in float64, a parameter's is rounding (1e-15), and none is really so
small. The last biases in front of a softmax are such parameters: they shift all its inputs alike."""

PAIR_BYTES = 32
"""Of the published code in float64, per pair of spots: offsets and distances of all pairs. 3.3 GB at 10,000 spots."""

NO_DROPOUT = {"dropout": 0.0, "attn_dropout": 0.0}
NETWORK = {"n_genes": N_GENES, "feature_dim": FEATURE_DIM}
SMALL_NETWORK = {
    "n_genes": N_GENES,
    "feature_dim": 9,
    "hidden_dim": 32,
    "pairwise_hidden_dim": 32,
    "n_layers": 2,
    "n_neighbors": 4,
}
"""With as many genes: the published code knows no other number."""

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


def slides_of(plan: Plan, code: PublishedCode) -> Slides:
    by_itself = DenoiserConfig(**plan.network, **NO_DROPOUT)
    default = dataclasses.replace(by_itself, non_negative=code.is_non_negative(by_itself))
    others = [
        dataclasses.replace(by_itself, activation=activation, non_negative=non_negative)
        for activation, non_negative in itertools.product(ACTIVATIONS, (False, True))
    ]
    small = list(itertools.product(plan.spots[:1], LAYOUTS))
    return dict.fromkeys([default, *others], small) | {default: list(itertools.product(plan.spots, LAYOUTS))}


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
    return {name: functools.partial(result_of, model) for name, model in models.items()} | {
        SAMPLER: functools.partial(sampled, sampler)
    }


def result_of(model: nn.Module, slide: BenchmarkSlide, with_gradients: bool) -> Result:
    """By the published calls. The prediction is that of the first step of the sample."""
    predictions: list[Tensor] = []

    def inference(*inputs: Tensor) -> Tensor:
        predictions.append(model.inference(*inputs))
        return predictions[-1]

    loop = SimpleNamespace(inference=inference)
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
    return row["activation"] + (", ReLU" if row["non_negative"] else "")


def racers(code: PublishedCode, config: DenoiserConfig, slide: BenchmarkSlide) -> dict[str, Callable[[], Tensor]]:
    """A five-step sample each, in float32. Coordinates are a new tensor for each, as those of a new slide are."""
    published = code.build(config, torch.float32)
    accelerated = accelerate(copy.deepcopy(published))
    slide = BenchmarkSlide(*(part.float() for part in slide))
    sampler = Sampler(ours(config, published), SAMPLE_STEPS)
    prepared = sampler.prepare((slide.features, slide.coords))

    def published_loop(model: nn.Module) -> Tensor:
        return eager_sample(model, slide.features, slide.coords.clone(), slide.x_0, SAMPLE_STEPS)

    def native() -> Tensor:
        return sampler.prepare((slide.features, slide.coords.clone())).draw(x_0=slide.x_0).expression

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


def difference_table(rows: list[Row]) -> Table:
    """Per variant and slide, what each implementation is off by."""
    narrow = {"box": SIMPLE_HEAD, "padding": 0, "show_edge": False}  # fits 120 columns
    table = Table(title="differences from the published code in float64", title_justify="left", **narrow)
    for name in ("variant", "layout", "spots", "through"):
        table.add_column(name, no_wrap=True, justify="right" if name == "spots" else "left")
    columns = list(itertools.product([str(dtype).removeprefix("torch.") for dtype in DTYPES], QUANTITIES))
    for dtype, quantity in columns:
        table.add_column(f"{dtype}\n{HEADINGS.get(quantity, quantity)}", justify="right", no_wrap=True)
    slides: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        slide = (variant_of(row), LAYOUTS[row["layout"]], f"{row['spots']:,}")
        slides.setdefault(slide, {})[row["through"], row["dtype"]] = row
    for slide, members in slides.items():
        for index, through in enumerate(THROUGH):
            cells = [_cell(members.get((through, dtype), {}), quantity) for dtype, quantity in columns]
            table.add_row(*(slide if index == 0 else [""] * len(slide)), through, *cells)
        table.add_section()
    return table


def _cell(row: Row, quantity: str) -> Text:
    if quantity not in row:
        return Text("")
    said = f"{row[quantity]:.1e}"
    if is_apart(row, quantity):
        return Text(f"{said}{APART}", style="bold red")
    return Text(said if row["through"] == PUBLISHED or is_judged(row, quantity) else f"{said}{NOT_JUDGED}")


def time_table(rows: list[Row]) -> Table:
    table = Table(title="a five-step sample", title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("spots", "through", "median", "times as fast"):
        table.add_column(name, justify="left" if name == "through" else "right")
    for spots, members in itertools.groupby(rows, key=lambda row: row["spots"]):
        for index, row in enumerate(members):
            cells = (row["through"], seconds(row["median_ms"]), f"{row['times_as_fast']:.2f}")
            table.add_row("" if index else f"{spots:,}", *cells)
        table.add_section()
    return table


def notes(code: PublishedCode, plan: Plan) -> list[str]:
    missing = ", ".join(code.stood_in)
    threads = torch.get_num_threads()
    return [
        f"published: {code.path} in float32, against itself in float64",
        f"over the largest entry of the published result; {APART}: ours, above {LIMIT:.0e}; {NOT_JUDGED}: not judged",
        "gradients: the farthest parameter, in float64 over its own largest entry, in float32 over the largest of all",
        "float32 gradients through a ReLU are not judged: its derivative jumps where rounding decides the side of zero",
        *([f"not installed, and stood in for by benchmarks/published_code.py: {missing}"] if missing else []),
        *([f"times: medians of {plan.rounds} rounds, float32, {threads} threads"] if plan.rounds else []),
    ]


def commit_of(path: Path) -> str:
    """Of the checkout that tracks a file, and whether that has changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(path.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    if not shutil.which("git") or not git("ls-files", path.name):
        return measure.UNKNOWN
    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + (measure.WITH_CHANGES if changed else "")


def plan_of(options: argparse.Namespace) -> Plan:
    """Raises InputError, which names the option, for what cannot be run."""
    try:
        spots = sorted(set(parse_sizes(options.spots or ("40,60" if options.quick else "500,3000,10000"))))
    except ValueError as error:
        raise InputError(f"--spots: {first_line(error)}") from error
    if options.rounds < 0:
        raise InputError(f"--rounds: must be at least 0, not {options.rounds}")
    network = SMALL_NETWORK if options.quick else NETWORK
    neighbors = DenoiserConfig(**network).n_neighbors
    if spots[0] <= neighbors:
        raise InputError(f"--spots: the published code wants more than {neighbors} spots, not {spots[0]}")
    if lacks := over_budget(PAIR_BYTES * spots[-1] ** 2, measure.free_memory(torch.device("cpu"))):
        raise InputError(f"--spots: the published code on {spots[-1]:,}: {lacks} of free memory; lower it")
    return Plan(network, spots, options.gradient_spots, options.rounds)


def written(rows: list[Row]) -> list[Row]:
    """JSON has no infinity."""
    return [
        {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in row.items()}
        for row in rows
    ]


def run(options: argparse.Namespace) -> int:
    plan, code = plan_of(options), load(options.code)
    planned = slides_of(plan, code)
    n_compared = len(THROUGH) * len(DTYPES) * sum(map(len, planned.values()))
    with figures_bar(n_compared + RACERS * plan.rounds * len(plan.spots)) as (begin, done):

        def counted(what: str) -> None:
            begin(what)
            done()

        rows = list(compare(code, planned, plan.gradient_spots, counted))
        times = list(race(code, next(iter(planned)), plan, counted))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(difference_table(rows))
    if times:
        console.print(time_table(times))
    for note in notes(code, plan):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if options.json:
        about = {**measure.provenance(torch.device("cpu")), "threads": torch.get_num_threads()}
        published = {"published_commit": commit_of(code.path), "stood_in": code.stood_in, "limit": LIMIT}
        write_json(options.json, {**about, **published, "differences": written(rows), "times": times})
    apart = [(row, quantity) for row in rows for quantity in QUANTITIES if is_apart(row, quantity)]
    judged = sum(quantity in row and is_judged(row, quantity) for row in rows for quantity in QUANTITIES)
    said = f"{len(apart)} of {judged} figures of ours differ from the published code by more than {LIMIT:.0e}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    return int(bool(apart))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, metavar="FOLDER", help="a checkout of the published code")
    parser.add_argument("--spots", help="sizes, by default 500,3000,10000")
    parser.add_argument("--gradient-spots", type=int, default=3000, help="most spots for loss and gradients")
    parser.add_argument("--rounds", type=int, default=3, help="of the timing; 0 for none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="a small network, by default on 40 and 60 spots")
    options = parser.parse_args(arguments)
    try:
        return run(options)
    except InputError as error:
        print(f"benchmarks.published: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.published: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""Is what we compute what the published code computes? Ours held against a checkout of it, and timed in turns.

python -m benchmarks published --code FOLDER [--spots 500,3000,10000] [--rounds 3] [--json FILE] [--quick]

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
import dataclasses
import itertools
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stflow_fast import DenoiserConfig
from stflow_fast.config import ACTIVATIONS
from stflow_fast.errors import InputError, first_line
from stflow_fast.files import write_json
from stflow_fast.progress import figures_bar

from ..pages.looks import seconds
from ..suite import measure
from ..suite.providers import over_budget
from ..suite.workload import FEATURE_DIM, N_GENES, parse_sizes
from .published_code import PublishedCode, load
from .published_figures import (
    DTYPES,
    LAYOUTS,
    LIMIT,
    PUBLISHED,
    QUANTITIES,
    RACERS,
    THROUGH,
    Plan,
    Row,
    Slides,
    compare,
    is_apart,
    is_judged,
    race,
    variant_of,
)

HEADINGS = {"prediction": "predict", "gradients": "gradient"}
APART, NOT_JUDGED = "!", "*"

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


def slides_of(plan: Plan, code: PublishedCode) -> Slides:
    by_itself = DenoiserConfig(**plan.network, **NO_DROPOUT)
    default = dataclasses.replace(by_itself, non_negative=code.is_non_negative(by_itself))
    others = [
        dataclasses.replace(by_itself, activation=activation, non_negative=non_negative)
        for activation, non_negative in itertools.product(ACTIVATIONS, (False, True))
    ]
    small = list(itertools.product(plan.spots[:1], LAYOUTS))
    return dict.fromkeys([default, *others], small) | {default: list(itertools.product(plan.spots, LAYOUTS))}


def difference_table(rows: list[Row]) -> Table:
    """Per variant and slide, what each implementation is off by."""
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": 0, "show_edge": False}  # fits 120 columns
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
    for place, members in slides.items():
        for index, through in enumerate(THROUGH):
            cells = [_cell(members.get((through, dtype), {}), quantity) for dtype, quantity in columns]
            table.add_row(*(place if index == 0 else [""] * len(place)), through, *cells)
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
        *([f"not installed, and stood in for by benchmarks/studies/published_code.py: {missing}"] if missing else []),
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
        print(f"benchmarks published: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks published: interrupted; nothing was written", file=sys.stderr)
        return 130

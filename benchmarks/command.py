"""``stflow-fast benchmark``: options to cases, a bar while they run, then a table and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console

from stflow_fast.config import parse_bytes
from stflow_fast.devices import choose_device
from stflow_fast.errors import InputError, OutputError
from stflow_fast.progress import figures_bar

from .pages import report
from .pages.lines import WORKLOADS, load, out_of_memory, read
from .pages.pictures import write_pictures
from .pages.terminal import terminal_table
from .suite import measure
from .suite.cases import CHECK_SPOTS, NETWORK, PRECISION, Case, Plan
from .suite.jobs import input_bytes, job_of, providers_of, why_not
from .suite.operations import OPERATIONS
from .suite.providers import OVER_BUDGET, class_of
from .suite.run import TOO_LONG, Suite
from .suite.slides import LAYOUTS
from .suite.workload import parse_sizes

CPU_PROVIDERS = ("reference", "reference_compiled", "eager_stflow", "flash_attention")
CPU_GRAPHS = ("scipy_kdtree", "dense_cdist")
CPU_OPERATIONS = ("reference",)
"""What runs on a CPU unless others are asked for. Kernels need a GPU; all pairs' attention of the published kind takes
minutes, materialised dot products more than flash attention's, and an edge list about as long as the published code."""

INTERRUPTED = 130
MANY = 1_000
"""Threads or busy processes; more are a mistyped number."""

REHEARSAL = "rehearsal"
"""In place of a device's name."""

TINY_WIDTHS = {"hidden_dim": 32, "pairwise_hidden_dim": 32, "n_layers": 1, "n_heads": 2}
TINY = dataclasses.replace(NETWORK, feature_dim=16, **TINY_WIDTHS)
TINY_SPOTS, TINY_GENES, TINY_K = 24, 5, 4

COMMITTED = Path("benchmarks/results")
PAGE = COMMITTED.with_name("README.md")
"""Its section is drawn from the lines of the folder beside it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """As typed: lists with commas in between."""

    workload: str
    spots: str
    providers: str | None
    genes: str
    k: str
    layout: str
    dtype: str
    threads: str | None
    busy: str
    busy_nice: str
    device: str
    memory_budget: str | None
    rounds: int | None
    seconds: float
    minutes: float
    resume: bool
    rehearse: bool = False
    profile: bool = False


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be run: the options, checked."""

    plan: Plan
    cases: list[Case]
    providers: dict[str, tuple[str, ...]]

    @property
    def places(self) -> set[tuple[Any, ...]]:
        return {(*case, name) for case in self.cases for name in self.providers[case.workload]}

    def rehearsed(self) -> Order:
        """The same on one tiny slide, once: what would be compiled for every size is left out."""
        plan = dataclasses.replace(
            self.plan, rounds=1, network=TINY, check_spots=TINY_SPOTS, rehearsal=True, seconds=math.inf
        )
        cases = [case._replace(spots=TINY_SPOTS, genes=TINY_GENES, k=TINY_K) for case in self.cases]
        kept = {workload: tuple(filter(_rehearses, names)) for workload, names in self.providers.items()}
        return Order(plan, list(dict.fromkeys(cases)), kept)

    def without(self, lines: Iterable[tuple[Any, ...]]) -> Order:
        """All but the cases of which every provider has its line; the others whole, so that all take turns again, and
        with the same of other numbers of threads and busy processes, so that these are of one run."""

        def has_all(case: Case) -> bool:
            return all((*case, name) in lines for name in self.providers[case.workload])

        lacking = {_work_of(case) for case in self.cases if not has_all(case)}
        return dataclasses.replace(self, cases=[case for case in self.cases if _work_of(case) in lacking])


def _rehearses(provider: str) -> bool:
    found = class_of(provider)
    return found is None or not found.compiled_by_size


def _work_of(case: Case) -> Case:
    """The same for all numbers of threads and of busy processes."""
    return case.idle._replace(threads=0)


def order_of(options: Options) -> Order:
    """Raises InputError, which names the option, for whatever cannot be run."""
    device = choose_device(options.device)
    workloads = _names("--workload", options.workload, WORKLOADS)
    layouts, dtypes = (
        _names("--layout", options.layout, LAYOUTS),
        _names("--dtype", options.dtype, PRECISION),
    )
    if "tf32" in dtypes and device.type != "cuda" and not options.rehearse:
        raise InputError("--dtype: tf32 is the precision of a GPU, and this runs on the CPU; use float32 or bf16")
    spots, genes, ks = (_sizes(name, getattr(options, name)) for name in ("spots", "genes", "k"))
    machines = _machines(options)
    rounds = options.rounds if options.rounds is not None else 20 if device.type == "cuda" else 2
    for name in ("rounds", "seconds", "minutes"):
        if (value := getattr(options, name)) is not None and not value > 0:
            raise InputError(f"--{name}: must be more than 0, not {value}")
    deadline = time.monotonic() + 60 * options.minutes
    budget, profile = _budget(options.memory_budget, device), options.profile and device.type == "cuda"
    plan = Plan(device, budget, rounds, options.seconds, deadline=deadline, profile=profile)
    cases = [
        Case(workload, layout, n, k, n_genes, dtype, *machine)
        for machine in machines
        for workload in workloads
        for dtype, n_genes in _settings(workload, dtypes, genes)
        for layout, k, n in itertools.product(layouts, ks, spots)
    ]
    if max(ks) >= CHECK_SPOTS:
        raise InputError(f"--k: at most {CHECK_SPOTS - 1}, for providers are checked on slides of {CHECK_SPOTS} spots")
    # If the time does not suffice for all, it is the large ones that are left out, and before them the busy ones, which
    # would also leave their load to the idle ones behind them.
    cases.sort(key=lambda case: (case.busy > 0, case.spots))
    for case in cases:
        held = case._replace(spots=max(case.spots, CHECK_SPOTS))
        if (needed := input_bytes(held)) > plan.memory_budget:
            raise InputError(
                f"--spots: the inputs of {held.spots:,} spots with {case.genes:,} genes take {needed / 2**30:.1f} GiB, "
                f"and the budget is {plan.memory_budget / 2**30:.1f} GiB; lower --spots or --genes, or raise "
                "--memory-budget"
            )
    return Order(plan, cases, _providers(options.providers, workloads, device))


def _settings(workload: str, dtypes: Iterable[str], genes: list[int]) -> Iterable[tuple[str, int]]:
    """A graph has neither genes nor a precision to choose, a single operation no genes."""
    if workload == "graph":
        return [("float32", genes[0])]
    return itertools.product(dtypes, genes[:1] if workload in OPERATIONS else genes)


def run(options: Options, out: Path, pictures: bool = True, complete: bool = False) -> int:
    """Append a line per figure to ``out``/<device>.jsonl as it is measured, and show them; the exit code, which is 1
    where a check is red, and where ``complete`` is asked for and a figure failed or was left out for the time."""
    order = order_of(options)
    if options.rehearse:
        order = order.rehearsed()
    device = REHEARSAL if options.rehearse else measure.device_name(order.plan.device)
    path = out / f"{measure.file_name(device)}.jsonl"
    earlier = read(path) if path.exists() else []  # a broken line is told before anything is measured
    before = measured_before(earlier, order.plan) if options.resume else {}
    ordered, order = order.places, order.without(before)
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with figures_bar(len(order.places)) as (begin, done), appending(path) as write:

            def keep(line: dict[str, Any]) -> None:
                write(line)
                if _place(line) not in lines:  # with a profile it comes again
                    done()
                lines[_place(line)] = line

            with torch.cuda.device(order.plan.device) if order.plan.device.type == "cuda" else contextlib.nullcontext():
                suite = Suite(order.plan, keep, begin)
                suite.recall(before.values())
                suite.run(order.cases, order.providers)
    except KeyboardInterrupt:
        console.print(f"stflow-fast: interrupted; the {len(lines)} lines measured so far are in {path}", markup=False)
        return INTERRUPTED
    known = before | lines
    show([line for place, line in known.items() if place in ordered])
    if pictures:
        _say_written(write_pictures(load(path), out))
    Console().print(f"{len(lines)} new lines in {path}", markup=False, soft_wrap=True)
    red = [line for line in lines.values() if line["check"] == "red"]
    for line in red:
        console.print(
            f"stflow-fast: {line['provider']} computes something else in {line['workload']}: relative error "
            f"{line['relative_error']}, at most {line['tolerance']} allowed",
            markup=False,
        )
    others = [line for line in lines.values() if line["check"] != "red"]
    lacking = [line for line in others if complete and not is_final(line, order.plan)]
    for line in lacking:
        console.print(f"stflow-fast: {line['workload']}, {line['provider']}: {line['note']}", markup=False)
    return int(bool(red or lacking))


def is_final(line: dict[str, Any], plan: Plan) -> bool:
    """Whether there is a time, or memory did not suffice, or another call would refuse it for the same reason."""
    return bool(line["median_ms"] or out_of_memory(line)) or _is_refused(line, plan)


def _is_refused(line: dict[str, Any], plan: Plan) -> bool:
    """Whether what has no time would have none now, for the same reason; the budget is by default what is free at the
    moment."""
    case, note = Case.of(line), line["note"]
    if expected := re.fullmatch(TOO_LONG.replace("{:.0f}", r"(\d+)"), note):
        return int(expected[1]) > plan.seconds
    now = why_not(plan, case, job_of(plan, case, line["provider"]))
    return now is not None and now.partition(OVER_BUDGET)[0] == note.partition(OVER_BUDGET)[0]


def measured_before(lines: list[dict[str, Any]], plan: Plan) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By case and provider, those of this very code and its libraries; of those without a time what is refused."""
    same_code, versions = functools.cache(measure.same_code), measure.versions()

    def stands(line: dict[str, Any]) -> bool:
        if line["versions"] != versions or not same_code(line["commit"]) or line["check"] == "red":
            return False
        return not line["note"] or _is_refused(line, plan)

    return {_place(line): line for line in lines if stands(line)}


def _place(line: dict[str, Any]) -> tuple[Any, ...]:
    """The case of a line, and its provider."""
    return (*Case.of(line), line["provider"])


def _drop_what_was_cut_off(file: BinaryIO) -> None:
    """An interruption may have left half a line, behind which the next one would be lost; or a whole one but for its
    end."""
    file.seek(0)
    content = file.read()
    begun = content.rfind(b"\n") + 1
    try:
        json.loads(content[begun:])
    except ValueError:
        file.truncate(begun)
    else:
        file.write(b"\n")


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields what to call with each line; it is in the file when the call returns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
        _drop_what_was_cut_off(file)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
    with file:

        def write(line: dict[str, Any]) -> None:
            file.write((json.dumps(line, allow_nan=False) + "\n").encode())
            file.flush()

        yield write


def show(lines: list[dict[str, Any]]) -> None:
    """A table of the lines, where there are any: a rehearsal leaves providers out."""
    if not lines:
        return
    Console(width=None if sys.stdout.isatty() else 120).print(terminal_table(lines))


def redraw(folder: Path | None, readme: Path = PAGE) -> None:
    """Show what was measured before. Where the results are those that a README has a section for, which they are where
    no folder is named, write that anew."""
    committed = readme.parent / COMMITTED.name
    folder = folder or committed
    lines = load(folder)
    show(lines)
    if folder.resolve() == committed.resolve() and readme.is_file() and report.BEGIN in readme.read_text():
        _say_written([*report.redraw(folder, readme), readme])
    else:
        _say_written(write_pictures(lines, folder))


def _say_written(paths: Iterable[Path]) -> None:
    for path in paths:
        Console().print(f"wrote {path}", markup=False, soft_wrap=True)


def _names(option: str, text: str, known: Iterable[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise InputError(f"{option}: there is no {name!r}; choose from {', '.join(known)}")
    return names


def _sizes(option: str, text: str) -> list[int]:
    try:
        return sorted(set(parse_sizes(text)))
    except ValueError as error:
        raise InputError(f"--{option}: must be whole numbers of at least 1 such as 1e3,1e4, not {text!r}") from error


def _machines(options: Options) -> list[tuple[int, int, int]]:
    """Threads, busy processes and their niceness: what is to be measured beside nothing comes first."""
    threads = [torch.get_num_threads()] if options.threads is None else _numbers("--threads", options.threads, 1, MANY)
    busy, niceness = _numbers("--busy", options.busy, 0, MANY), _numbers("--busy-nice", options.busy_nice, 0, 19)
    beside = dict.fromkeys((number, nice if number else 0) for number in busy for nice in niceness)
    return [(number, *others) for others in beside for number in threads]


def _numbers(option: str, text: str, least: int, most: int) -> list[int]:
    try:
        found = sorted({int(number) for number in text.split(",")})
        if least <= found[0] and found[-1] <= most:
            return found
    except ValueError:
        pass
    raise InputError(f"{option}: must be whole numbers of {least} to {most} such as 1,2, not {text!r}")


def _budget(text: str | None, device: torch.device) -> int:
    if text is None:
        return int(0.9 * measure.free_memory(device))
    try:
        return parse_bytes(text)
    except InputError as error:
        raise InputError(f"--memory-budget: must be a size such as 4GiB or 500MB, not {text!r}") from error


def _providers(text: str | None, workloads: tuple[str, ...], device: torch.device) -> dict[str, tuple[str, ...]]:
    """Those of each workload; of a list, each workload takes the ones it has."""
    if text is None:
        if device.type == "cpu":
            special: dict[str, tuple[str, ...]] = {**dict.fromkeys(OPERATIONS, CPU_OPERATIONS), "graph": CPU_GRAPHS}
            return {workload: special.get(workload, CPU_PROVIDERS) for workload in workloads}
        return {workload: providers_of(workload) for workload in workloads}
    known = dict.fromkeys(name for workload in (*workloads, *WORKLOADS) for name in providers_of(workload))
    names = _names("--providers", text, known)
    found = {workload: tuple(name for name in names if name in providers_of(workload)) for workload in workloads}
    for workload, of_workload in found.items():
        if not of_workload:
            raise InputError(
                f"--providers: none of {', '.join(names)} is one of {workload}; "
                f"choose from {', '.join(providers_of(workload))}"
            )
    return found

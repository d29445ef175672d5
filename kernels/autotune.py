"""Time tiles on the GPU that is there, and write what was found into the launch table.

    python -m stflow_fast.kernels.autotune [--kernels edge_attention_fwd,dropout] [--out FILE]

Of every kernel, precision and number of columns, candidates run on the same random inputs. One that fails, or whose
outputs are not those of the table's row within TOLERANCE of their largest number, is named and left out. The others
are timed in turns. The fastest is written for the architecture that is there, if it is faster than the table's row by
more than noise: the 80th percentile of its times below the 20th of the row's. Else the row is written again, confirmed.

A row holds for later architectures too, until one of their own is measured. Whether it suits others of the same age
(sm_86 has less shared memory than sm_80), ``python -m stflow_fast.kernels.aot --arch 86`` says without one.
The table is replaced at the end. The exit code is 1 where a row of the table cannot run, 2 without a CUDA device, or
where ``--rehearse`` has no interpreter that works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from stflow_fast.errors import InputError, first_line

from .autotune_cases import RUNS, Case, Numbers, Run, cases
from .conventions import MOST_COLUMNS
from .launch import (
    HEADER,
    INTERPRETED,
    KERNELS,
    OLDEST,
    TABLE,
    TABLE_PATH,
    WIDEST,
    Launch,
    Row,
    architecture,
    find_row,
    overlap,
    use_launch,
)
from .versions import why_not_interpreted

TOLERANCE = {"bf16": 2**-7, "tf32": 2**-9, "ieee": 1e-5, "float64": 0.0}
"""Two roundings, for a tile changes the order of sums alone; of float64 come neighbours, which are the same."""

_EDGES = ((16, 32), (1, 2, 4, 8))
TILES: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = {
    "edge_attention_fwd": (*_EDGES, (0,)),
    "edge_attention_bwd_query": (*_EDGES, (1, 2, 4)),
    "edge_attention_bwd_key": (*_EDGES, (1, 2, 4)),
    "edge_messages": ((16, 32, 64), (1, 2, 4), (0,)),
    "dropout": ((8, 16, 32), (4, 8), (0,)),
    "gate_norm": ((4, 8, 16), (1, 2, 4, 8), (4, 8, 16)),
    "joined_norm": ((4, 8, 16, 32), (1, 2, 4, 8), (0,)),
    "residual": ((4, 8, 16, 32), (2, 4, 8), (0,)),
    "gene_head": ((16, 32), (1, 2, 4, 8), (0,)),
    "nearest": ((8, 16, 32), (1, 2), (0,)),
}
"""Rows, warps and programs that are tried. Edge kernels with 64 rows but for OTHERS only when named."""

OTHERS: dict[tuple[str, str], tuple[Launch, ...]] = {
    ("edge_attention_fwd", "bf16"): (Launch(64, 2), Launch(64, 4)),
}
"""What else is tried, of a kernel and precision: see launch.TABLE."""

HEAD_START = 2_000_000
"""Cycles that the GPU waits before a run, so that what the host does for it is not timed."""


class Timing(NamedTuple):
    """Milliseconds: the median, 20th and 80th percentile."""

    median: float
    low: float
    high: float


class Machine(NamedTuple):
    """What is tuned for, and how much is run on it."""

    device: torch.device
    name: str
    arch: int
    spots: int
    rounds: int
    most_tiles: int


class Result(NamedTuple):
    """What was found of a case; nothing is ``chosen`` where the table's row did not run."""

    case: Case
    row: Launch
    times: dict[Launch, Timing]
    left_out: dict[Launch, str]

    @property
    def chosen(self) -> Launch | None:
        return choose(self.times, self.row) if self.times else None


def choose(times: dict[Launch, Timing], row: Launch) -> Launch:
    """The fastest if it is faster by more than noise, else the table's."""
    fastest = min(times, key=lambda launch: times[launch].median)
    return fastest if times[fastest].high < times[row].low else row


def candidates(case: Case, row: Launch, rows: Sequence[int] = (), warps: Sequence[int] = ()) -> list[Launch]:
    """The table's first; ``rows`` and ``warps`` in place of TILES and OTHERS where they are named."""
    usual = TILES[case.kernel]
    tried = [Launch(*sizes) for sizes in itertools.product(rows or usual[0], warps or usual[1], usual[2])]
    others = () if rows or warps else OTHERS.get((case.kernel, case.precision), ())
    return list(dict.fromkeys([row, *tried, *others]))


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """How float32 multiplies."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest over the outputs of the largest difference over the largest number; NaN where one is NaN."""
    pairs = zip(found, expected, strict=True)
    off = [(one - other).abs().max().double() / other.abs().max().double() for one, other in pairs]
    return torch.stack(off).max().item()  # Python's max would pass over a NaN


def tune(case: Case, machine: Machine, numbers: Numbers, tried: list[Launch]) -> Result:
    """Run all candidates; the first is the table's."""
    with multiplying(case.precision):
        run = RUNS[case.kernel](case, numbers)
        runs, left_out = sound(case, run, tried)
        times = timed(case.kernel, run, runs, machine) if tried[0] in runs else {}
    return Result(case, tried[0], times, left_out)


def sound(case: Case, run: Run, tried: list[Launch]) -> tuple[list[Launch], dict[Launch, str]]:
    """Those that give what the first gives, and why others do not."""
    expected: tuple[Tensor, ...] = ()
    found, left_out = [], {}
    for launch in tried:
        try:
            with use_launch(case.kernel, launch):
                outputs = run()
            expected = expected or outputs
            off = difference(outputs, expected)
        except Exception as error:  # of the compiler, the launch or the driver
            left_out[launch] = f"{type(error).__name__}: {first_line(error)}"
        else:
            if off <= TOLERANCE[case.precision]:
                found.append(launch)
            else:
                left_out[launch] = f"its outputs are {off:.1g} off"
        if not expected:
            break
    return found, left_out


def timed(kernel: str, run: Run, launches: list[Launch], machine: Machine) -> dict[Launch, Timing]:
    """In turns, so that a drifting clock hits all alike."""
    found: dict[Launch, list[float]] = {launch: [] for launch in launches}
    clock = gpu_clock if machine.device.type == "cuda" else cpu_clock
    for _, launch in itertools.product(range(machine.rounds), launches):
        with use_launch(kernel, launch):
            found[launch].append(clock(run))
    return {launch: Timing(*np.quantile(times, [0.5, 0.2, 0.8]).tolist()) for launch, times in found.items()}


def gpu_clock(run: Run) -> float:
    """Milliseconds between two CUDA events."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    elapsed: float = start.elapsed_time(stop)
    return elapsed


def cpu_clock(run: Run) -> float:
    """Milliseconds of a rehearsal."""
    begun = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begun)


def row_of(result: Result, chosen: Launch, machine: Machine) -> Row:
    """What goes into the table."""
    case, row, times = result.case, result.row, result.times
    others = [launch for launch in times if launch != row]
    if chosen != row:
        found = f"measured on {machine.name}: {times[chosen].median:.4g} ms (was {row}: {times[row].median:.4g} ms)"
    else:
        found = f"confirmed on {machine.name}: {times[row].median:.4g} ms"
        next_best = min(others, key=lambda launch: times[launch].median, default=None)
        found += f" ({next_best}: {times[next_best].median:.4g} ms)" if next_best else " (no other ran)"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("triton", "torch"))
    day = datetime.now(timezone.utc).date().isoformat()
    reason = f"{found}, {machine.spots} spots, {versions}, {day}"
    return Row(case.kernel, machine.arch, case.precisions, case.columns, chosen, reason)


def with_row(table: Sequence[Row], new: Row) -> list[Row]:
    """The table with a row in it, which changes no launch of fewer columns than were measured."""
    taken = new.precisions.split()
    found: list[Row] = []
    for row in table:
        others = [precision for precision in row.precisions.split() if precision not in taken]
        if not overlap(row, new):
            found.append(row)
        elif others:
            found.append(row._replace(precisions=" ".join(others)))
        # A newer architecture goes before fewer columns: without a copy, the new row would hold for them as well.
        older = row.kernel == new.kernel and row.arch < new.arch and row.columns < new.columns
        shared = [each for each in taken if older and applies(row, table, new.arch, each)]
        if shared:
            found.append(row._replace(arch=new.arch, precisions=" ".join(shared)))
    place = max((i for i, row in enumerate(found) if row.kernel == new.kernel), default=len(found) - 1)
    return [*found[: place + 1], new, *found[place + 1 :]]


def applies(row: Row, table: Sequence[Row], arch: int, precision: str) -> bool:
    """Whether an architecture is launched by a row where it has as many columns as the row."""
    return precision in row.precisions.split() and find_row(table, row.kernel, arch, precision, row.columns) is row


def write_table(path: Path, table: Sequence[Row]) -> None:
    """In the place of another at once: nobody reads half a table."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file, lineterminator="\n")
            lines.writerow(HEADER)
            for row in table:
                columns, programs = "" if row.columns == WIDEST else row.columns, row.launch.programs or ""
                sizes = (row.launch.rows, row.launch.warps, programs)
                lines.writerow((row.kernel, row.arch, row.precisions, columns, *sizes, row.reason))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def summary(results: Sequence[Result]) -> Table:
    """For a person."""
    table = Table("kernel", "row", "ms", "chosen", "ms", "left out")
    for result in results:
        row, chosen = result.row, result.chosen
        before, after = "", ("none", "")
        if chosen:
            before = f"{result.times[row].median:.4g}"
            after = ("confirmed", "") if chosen == row else (str(chosen), f"{result.times[chosen].median:.4g}")
        table.add_row(str(result.case), str(row), before, *after, ", ".join(map(str, result.left_out)))
    return table


def tune_all(arguments: argparse.Namespace, machine: Machine) -> Iterator[Result]:
    """Behind a progress bar, below what was left out."""
    plan = cases(arguments.kernels, arguments.precisions, arguments.columns)
    rows = [find_row(TABLE, case.kernel, machine.arch, case.precisions.split()[0], case.columns) for case in plan]
    numbers = Numbers(machine.spots, machine.device)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("inputs", total=len(plan))
        for case, row in zip(plan, rows, strict=True):
            progress.update(task, description=str(case))
            tried = candidates(case, row.launch, arguments.rows, arguments.warps)[: machine.most_tiles]
            result = tune(case, machine, numbers, tried)
            for launch, why in result.left_out.items():
                progress.console.print(f"{case}: {launch} is left out: {why}", markup=False)
            progress.advance(task)
            yield result


def machine_of(arguments: argparse.Namespace) -> Machine:
    """The CUDA device, or the interpreter, which has no architecture: it rehearses the oldest's rows.

    Raises:
        InputError: there is none, or it cannot do what is asked for, or the table cannot be written.
    """
    if arguments.spots < 0:
        raise InputError(f"--spots: must be a number of spots, not {arguments.spots}")
    if arguments.rehearse and arguments.out.resolve() == TABLE_PATH.resolve():
        raise InputError("--out: is the installed table, where a rehearsal has no place; name another file")
    if not os.access(arguments.out.resolve().parent, os.W_OK):
        raise InputError(f"--out: {arguments.out} cannot be written; name another file")
    if arguments.rehearse:
        if lacks := why_not_interpreted():
            raise InputError(f"--rehearse: {lacks}")
        return Machine(torch.device("cpu"), "Triton's interpreter", OLDEST, arguments.spots or 10, 1, 2)
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA device; --rehearse runs the same path on the CPU")
    if INTERPRETED:
        raise InputError("TRITON_INTERPRET: is 1, and interpreted kernels are not timed; unset it")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    return Machine(device, name, architecture(device), arguments.spots or 200_000, 15, 99)


def listed(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of names with commas."""

    def parse(text: str) -> list[str]:
        if not set(text.split(",")) <= set(allowed):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, not {text}")
        return text.split(",")

    return parse


def powers(least: int, most: int) -> Callable[[str], list[int]]:
    """A parser of powers of two with commas."""
    allowed = [str(2**i) for i in range(20) if least <= 2**i <= most]
    return lambda text: [int(each) for each in listed(allowed)(text)]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=listed(KERNELS), default=KERNELS, help="all of them unless named")
    parser.add_argument(
        "--precisions", type=listed(("bf16", "tf32", "ieee")), default=["bf16", "tf32", "ieee"], help="fp16 is as bf16"
    )
    parser.add_argument("--columns", type=powers(16, MOST_COLUMNS), help="of a message: 64 is the default model's")
    parser.add_argument("--spots", type=int, default=0, help="200000 unless given")
    parser.add_argument("--rows", type=powers(1, 128), default=(), help="of tiles, in place of each kernel's own")
    parser.add_argument("--warps", type=powers(1, 16), default=(), help="in place of each kernel's own")
    parser.add_argument("--out", type=Path, default=TABLE_PATH, help="the installed table unless given")
    parser.add_argument("--rehearse", action="store_true", help="tiny, interpreted, on the CPU; into another file")
    arguments = parser.parse_args()
    arguments.columns = arguments.columns or ([16] if arguments.rehearse else [64, 128])
    return arguments


def main() -> int:
    arguments = parsed()
    if arguments.rehearse and not INTERPRETED:  # which is decided when a kernel's file is loaded
        command = [sys.executable, "-m", "stflow_fast.kernels.autotune", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "TRITON_INTERPRET": "1"})
    try:
        machine = machine_of(arguments)
        results = list(tune_all(arguments, machine))
    except InputError as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autotune: was interrupted; the table is as it was", file=sys.stderr)
        return 130
    table = list(TABLE)
    for result in results:
        if result.chosen:
            table = with_row(table, row_of(result, result.chosen, machine))
    write_table(arguments.out, table)
    Console().print(summary(results))
    return 0 if all(result.chosen for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Whether a commit is slower than another, beyond the noise of this machine.

python -m benchmarks compare BASE [HEAD] [--rounds 7] [--rehearse]      HEAD: the working tree where none is named

Both are checked out into temporary folders and timed in processes of their own that take turns, the order shuffled in
each pair, with one thread and plain torch. The noise is what pairs of processes differ by: a workload is slower where
the lower end of the 95 % bootstrap interval of the median log ratio, head over base, is above log(1.02).

The exit code is 0 where nothing is slower, 1 where something is, 2 for bad input, 130 where it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

import stflow_fast
from stflow_fast import Denoiser, DenoiserConfig, SpotGraph, sample
from stflow_fast.errors import InputError, first_line

ROOT = Path(__file__).resolve().parents[2]
CODE = ("stflow_fast", "kernels")
SIZES = {"sample": 3_000, "train step": 1_000, "graph": 100_000}
REHEARSED = {"sample": 40, "train step": 40, "graph": 100}
ALLOWED, CONFIDENCE, RESAMPLES = 1.02, 0.95, 10_000
ROUNDS, LEAST_ROUNDS = 7, 5
"""With five pairs the lower end is the least of five ratios, and equal commits have 1 chance in 32 at most that it is
above 1; with seven it is the second least, 1 in 16, and one pair that was disturbed does no harm. That is of one
workload; that any of the three is called slower, and so by 2 %, has 3 chances in 100 where pairs differ by 6 %
(simulated)."""

CALLS = 3
CHILD_SECONDS = 600
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "STFLOW_BACKEND": "reference", "STFLOW_COMPILE": "off"}

Milliseconds = dict[str, float]
"""Of one process: workload -> median of its calls."""


class Tree(NamedTuple):
    name: str
    path: Path


class Verdict(NamedTuple):
    workload: str
    base: float
    head: float
    ratio: float
    low: float
    high: float

    @property
    def slower(self) -> bool:
        return self.low > ALLOWED

    @property
    def word(self) -> str:
        if self.slower:
            return "slower"
        return "faster" if self.high < 1 / ALLOWED else "within noise"


def judge(base: list[Milliseconds], head: list[Milliseconds]) -> list[Verdict]:
    """A verdict per workload; the two lists are the pairs' processes, in order."""
    rng, verdicts = np.random.default_rng(0), []
    for workload in base[0]:
        before, after = (np.array([round_[workload] for round_ in side]) for side in (base, head))
        logs = np.log(after / before)
        resampled = np.median(rng.choice(logs, size=(RESAMPLES, len(logs))), axis=1)
        low, high = np.exp(np.quantile(resampled, (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)))
        ratio = float(np.exp(np.median(logs)))
        verdicts.append(
            Verdict(workload, float(np.median(before)), float(np.median(after)), ratio, float(low), float(high))
        )
    return verdicts


def take_turns(
    trees: tuple[Tree, Tree], rounds: int, time_tree: Callable[[Tree], Milliseconds]
) -> tuple[list[Milliseconds], list[Milliseconds]]:
    """Time base and head ``rounds`` times each: pairs in which chance says who is first."""
    shuffled = random.Random(0)
    turns = [side for _ in range(rounds) for side in shuffled.sample((0, 1), 2)]
    found: tuple[list[Milliseconds], list[Milliseconds]] = ([], [])
    for side in track(turns, "process", console=Console(stderr=True)):
        found[side].append(time_tree(trees[side]))
    return found


def verdict_table(trees: tuple[Tree, Tree], verdicts: list[Verdict], rounds: int) -> Table:
    base, head = (tree.name for tree in trees)
    caption = (
        f"Medians of {rounds} processes each. Ratio: head over base, median of the pairs. "
        f"Slower: the interval's lower end is above {ALLOWED}."
    )
    title = Text(f"base {base}, head {head}")
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 0, 0, 1), "pad_edge": False}  # fits 80 columns
    table = Table(title=title, caption=caption, caption_justify="left", **look)
    table.add_column("workload", no_wrap=True)
    for name in ("base ms", "head ms", "ratio", f"{CONFIDENCE:.0%} interval"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for verdict in verdicts:
        times = (f"{verdict.base:,.4g}", f"{verdict.head:,.4g}")
        interval = f"{verdict.low:.3f} to {verdict.high:.3f}"
        style = "bold red" if verdict.slower else None
        table.add_row(verdict.workload, *times, f"{verdict.ratio:.3f}", interval, verdict.word, style=style)
    return table


def git(*arguments: str) -> str:
    """Raises InputError with git's own first line where it refuses."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"git: cannot be run ({error.strerror}); comparing commits needs it") from error
    if done.returncode:
        raise InputError(f"{ROOT}: git {arguments[0]}: {next(iter(done.stderr.splitlines()), 'failed')}")
    return done.stdout.strip()


def commit_of(name: str) -> str:
    """Twelve digits of the commit that ``name`` names."""
    git("rev-parse", "--show-toplevel")  # says so where this is no checkout
    with contextlib.suppress(InputError):
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")[:12]
    raise InputError(f"{name or '(empty)'}: names no commit of {ROOT}; say BASE=<commit>, such as BASE=HEAD~1")


@contextlib.contextmanager
def checked_out(base: str, head: str | None) -> Iterator[tuple[Tree, Tree]]:
    """Base and head in folders of their own that are gone afterwards, also after Ctrl-C.

    The working tree is copied: what somebody edits meanwhile is not timed.
    """
    commits = [commit_of(name) for name in (base, head) if name is not None]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stflow-compare-")))
        trees = []
        for side, commit in zip(("base", "head"), commits, strict=False):
            stack.callback(_remove_worktree, folder / side)
            git("worktree", "add", "--detach", str(folder / side), commit)
            trees.append(Tree(commit, folder / side))
        if head is None:
            for name in CODE:
                shutil.copytree(ROOT / name, folder / "head" / name, ignore=shutil.ignore_patterns("__pycache__"))
            trees.append(Tree("working tree", folder / "head"))
        for tree in trees:
            _link_kernels(tree.path)
        yield trees[0], trees[1]


def _remove_worktree(path: Path) -> None:
    with contextlib.suppress(InputError):  # an interruption may have come before it was one
        git("worktree", "remove", "--force", "--force", str(path))


def _link_kernels(tree: Path) -> None:
    """Make kernels/ importable as stflow_fast.kernels from there; the installed package's would be found otherwise."""
    link = tree / "stflow_fast" / "kernels"
    if (tree / "kernels").is_dir() and not link.exists():
        link.symlink_to("../kernels")


def time_in_process(tree: Tree, sizes: dict[str, int] = SIZES) -> Milliseconds:
    """Run this file on the code of ``tree``.

    Raises:
        InputError: that code is too old (or too broken) to run what is timed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--time", str(tree.path), json.dumps(sizes)]
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(tree.path)}
    pipes: dict[str, Any] = {"capture_output": True, "text": True, "timeout": CHILD_SECONDS, "check": False}
    try:
        done = subprocess.run(command, cwd=tree.path, env=environment, **pipes)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{tree.name}: took more than {CHILD_SECONDS} s") from error
    if done.returncode:
        said = next(reversed(done.stderr.strip().splitlines()), "nothing said")
        raise InputError(f"{tree.name}: cannot be timed ({said}); choose a commit that has what is timed")
    times: Milliseconds = json.loads(done.stdout.splitlines()[-1])
    return times


def time_here(tree: str, sizes: dict[str, int]) -> Milliseconds:
    """In the process of :func:`time_in_process`: the regular set by the public API alone, so that old code runs it."""
    kernels = importlib.util.find_spec("stflow_fast.kernels") if (Path(tree) / "kernels").is_dir() else None
    for file in (stflow_fast.__file__, *([kernels.origin] if kernels else [])):
        if not Path(str(file)).is_relative_to(tree):
            raise RuntimeError(f"{file} is not of {tree}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {
        f"{name}, {sizes[name]:,} spots": median_ms(prepare(sizes[name]))
        for name, prepare in (("sample", sampling), ("train step", training), ("graph", graph))
    }


def median_ms(call: Callable[[], object]) -> float:
    """Of some calls, after one that pays for first touches."""
    times = []
    for _ in range(CALLS + 1):
        begun = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times[1:])


def sampling(n_spots: int) -> Callable[[], object]:
    model, features, coords = network(), torch.randn(n_spots, 1024), positions(n_spots)
    return lambda: sample(model, (features, coords), seed=0)


def training(n_spots: int) -> Callable[[], object]:
    model = network().train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-4)
    features, coords = torch.randn(1, n_spots, 1024), positions(n_spots).unsqueeze(0)
    noise, labels = torch.rand(2, 1, n_spots, 50)

    def step() -> None:
        optimizer.zero_grad()
        _, loss = model(exp=noise, img_features=features, coords=coords, labels=labels, t_steps=torch.tensor([0.5]))
        loss.backward()
        optimizer.step()

    return step


def graph(n_spots: int) -> Callable[[], object]:
    coords = positions(n_spots)
    return lambda: SpotGraph.build(coords, 8)


def network() -> Denoiser:
    return Denoiser(DenoiserConfig(n_genes=50, feature_dim=1024)).eval()


def positions(n_spots: int) -> torch.Tensor:
    """Independent spots, one per square of 100."""
    return 100 * math.sqrt(n_spots) * torch.rand(n_spots, 2)


def main(
    arguments: list[str] | None = None, time_tree: Callable[[Tree, dict[str, int]], Milliseconds] = time_in_process
) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a commit")
    parser.add_argument("head", metavar="HEAD", nargs="?", help="another; the working tree where none is named")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"pairs of processes, at least {LEAST_ROUNDS}")
    parser.add_argument("--rehearse", action="store_true", help="the same path, tiny, any --rounds; never fails")
    options = parser.parse_args(arguments)
    sizes = REHEARSED if options.rehearse else SIZES
    try:
        if options.rounds < LEAST_ROUNDS and not options.rehearse:
            raise InputError(f"--rounds: must be at least {LEAST_ROUNDS}, not {options.rounds}")
        with checked_out(options.base, options.head or None) as trees:
            found = take_turns(trees, options.rounds, lambda tree: time_tree(tree, sizes))
    except InputError as error:
        print(f"benchmarks compare: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks compare: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    verdicts = judge(*found)
    Console().print(verdict_table(trees, verdicts, options.rounds))
    # A rehearsal's calls are over before a clock means anything.
    return int(any(verdict.slower for verdict in verdicts) and not options.rehearse)


if __name__ == "__main__":  # by its path, on the code of any commit
    if sys.argv[1:2] == ["--time"]:
        print(json.dumps(time_here(sys.argv[2], json.loads(sys.argv[3]))))
    else:
        sys.exit(main())

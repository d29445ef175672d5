"""Every GPU figure in one run of some minutes: tests of the kernels, then timings, each behind its own check.

python -m benchmarks.gpu --out DIR [--skip-tests]     on a CUDA device; writes DIR/<device>-sections.jsonl and .md, and
                                                      the suite's lines (benchmarks.suite) to DIR/<device>.jsonl
python -m benchmarks.gpu --out DIR --rehearse         the same path, tiny, interpreted on the CPU: rehearsal.*

The exit code is 1 where a test or a check is red, a part failed or the tests had no end, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from stflow_fast import DenoiserConfig, use_backend
from stflow_fast.errors import first_line

from .command import appending
from .gpu_measure import Figure, Scale, scale_of
from .gpu_sections import Case, plan
from .jobs import GRAPHS, Plan
from .jobs import Case as SuiteCase
from .measure import commit, file_name, free_memory
from .suite import Suite
from .summarize import table

TESTS = ("tests/test_kernel_gpu.py", "tests/test_kernel_neighbors.py", "tests/test_flow.py")

# Seconds from the begin, one clock for all: `make gpu` interrupts after 465, and then its exit code says nothing of the
# checks. By these, tests are ended, the last section begins, the suite ends; which has a time of its own at most.
TESTS_SECONDS, LAST_SECTION, ALL_SECONDS = 200, 320, 455
SUITE_SECONDS = 120
OURS = ("triton", "triton_graph", "triton_kept_edges")
# Where time is short, the last are left out first.
SUITE_PROVIDERS = (
    *("eager_stflow", *OURS, "flash_attention", "flex_attention", "message_passing"),
    *("dense_softmax", "dense_attention"),
)
SUITE_WORKLOADS = ("sample", "train_step", "denoise", "graph")
NO_END = f"no end within {TESTS_SECONDS} s"
FAILURE = re.compile(r"^[.sxX]*[FE]", re.MULTILINE)
"""In pytest's dots."""

CLOCKS = "clocks.sm,clocks.mem,temperature.gpu"

LEGEND = """Times: median (20th to 80th percentile) between CUDA events, cold L2 (flushed before every call), random
inputs; "first" is the first call, compilation and all. Kernels are replays of a CUDA graph, so without host work; their
floor is by counts and an H100's rates, and "of floor" is the floor over the median, 1 at best. A sample is
`PreparedSlide.draw(x_0)`, x_0 on the device, the result on the host, from the third draw of a slide on; the second
captures the CUDA graph. Prepare and the graphs of spots are wall-clock. Memory: peak above what was there before; of a
sample that of the prepare and two draws, features on the host. Our training step has its graph from outside, as the
loader of windows makes it; eager's is part of its forward. Error: norm of the difference over the norm, of the kernels
against float64, of samples and gradients against the published code (eager) in float32; a red check gives no time. ieee
and tf32 are float32 in torch's precision "highest" and "high", bf16 is torch.autocast, under which the published code
does not run: there it runs in tf32."""


class Report:
    """Lines as they come, and the page anew after every case."""

    def __init__(self, out: Path, rehearse: bool, tests: str) -> None:
        device = "rehearsal" if rehearse else torch.cuda.get_device_name()
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"{file_name(device)}-sections.jsonl"
        self.path.write_text("")
        self.rehearse, self.tests = rehearse, tests
        self.records: list[dict[str, Any]] = []
        self.verdicts: list[str] = []
        self.common = {
            "tests": tests,
            "device": "CPU, kernels interpreted" if rehearse else device,
            "versions": {
                **{"python": platform.python_version(), "torch": torch.__version__},
                **{"triton": importlib.metadata.version("triton"), "driver": nvidia_smi("driver_version")},
            },
            "commit": commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }

    @property
    def red(self) -> bool:
        tests = self.tests.startswith(("red", NO_END))
        return tests or any(line["check"] == "red" or line["error"] for line in self.records)

    def add(self, figure: Figure, k: int, clocks: str) -> None:
        values = dataclasses.asdict(figure)
        times, met = values.pop("times"), values.pop("met")
        median, p20, p80 = times if times and figure.check != "red" else (None, None, None)
        if figure.check == "red" and not math.isfinite(figure.relative_error):
            values["relative_error"] = None  # JSON has no NaN
        record = {
            **values,
            "k": k,
            "check": figure.check,
            **{"median_ms": median, "p20_ms": p20, "p80_ms": p80},
            "of_floor": figure.floor_ms / median if median and figure.floor_ms else None,
            "target": list(met),
            "met": [None if self.rehearse or figure.check == "red" else value for value in met.values()],
            **{"clocks_before": clocks, "clocks_after": nvidia_smi(CLOCKS)},
            **self.common,
        }
        self.records.append(record)
        with self.path.open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def judge(self, case: Case, records: list[dict[str, Any]], lacks: str) -> None:
        """A verdict on every goal of a case."""
        found = {goal: met for record in records for goal, met in zip(record["target"], record["met"], strict=True)}
        for goal in case.goals:
            said = {True: "met", False: "missed"}.get(found.get(goal), f"not reached{lacks and f' ({lacks})'}")
            self.verdicts.append(f"{'rehearsed' if self.rehearse and goal in found else said}: {case.name}: {goal}")

    def write_page(self, missing: list[str]) -> str:
        common = self.common
        versions = ", ".join(f"{name} {version}" for name, version in common["versions"].items() if version)
        parts = [
            "# Rehearsal on the CPU: nothing here is a figure of a GPU" if self.rehearse else f"# {common['device']}",
            f"{common['date']}, commit {common['commit']}; {versions}. Tests of the kernels: {self.tests}.",
            LEGEND,
        ]
        for workload in dict.fromkeys(record["workload"] for record in self.records):
            rows = [row_of(record) for record in self.records if record["workload"] == workload]
            parts += [f"## {workload[:1].upper()}{workload[1:]}", table(HEAD, rows)]
        for title, lines in (("Not reached in the time", missing), ("Targets", self.verdicts)):
            parts += [f"## {title}", "\n".join(f"* {line}" for line in lines)] if lines else []
        page = "\n\n".join(parts) + "\n"
        self.path.with_suffix(".md").write_text(page)
        return page


HEAD = ["", "spots", "arithmetic", "ms", "of floor", "peak GB", "first s", "error", ""]


def row_of(record: dict[str, Any]) -> list[str]:
    def cell(name: str, form: str, unit: float = 1.0) -> str:
        return "" if record[name] is None else format(record[name] / unit, form)

    spread = f"{cell('median_ms', '.4g')} ({cell('p20_ms', '.4g')} to {cell('p80_ms', '.4g')})"
    return [
        record["provider"] + (" (tests red)" if record["tests"].startswith("red") else ""),
        f"{record['spots']:,}",
        record["dtype"],
        "" if record["median_ms"] is None else spread,
        cell("of_floor", ".2f"),
        cell("peak_bytes", ".3f", 1e9),
        cell("first_call_s", ".1f"),
        cell("relative_error", ".1e") + (" RED" if record["check"] == "red" else ""),
        record["error"] or record["note"],
    ]


def nvidia_smi(query: str) -> str:
    """What it says of the first GPU; nothing where it is absent or hangs."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0]


def run_tests() -> str:
    """The closing line of the GPU tests behind ``green`` or ``red``, or that they had no end, which is neither of both;
    what else they said goes to standard error."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-m", "gpu", "-q"]
    root, pipes = Path(__file__).resolve().parents[1], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, cwd=root, text=True, timeout=TESTS_SECONDS, check=False, **pipes)
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        print(said[-6000:], file=sys.stderr)
        return f"red: failures, and {NO_END}" if FAILURE.search(said) else f"{NO_END}; none had failed until then"
    print(done.stdout[-6000:], file=sys.stderr)
    closing = next(reversed(done.stdout.strip().splitlines()), "nothing said")
    passed = not done.returncode and " passed" in closing  # were all skipped, nothing would be known
    return f"{'green' if passed else 'red'}: {closing.strip('= ')}"


def run_case(report: Report, scale: Scale, case: Case) -> str:
    """Its figures into the report; what went wrong, in one line."""
    clocks, k, what = nvidia_smi(CLOCKS), scale.config.n_neighbors, ""
    try:
        for figure in case.section(scale, case.precision):
            report.add(figure, k, clocks)
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, torch.OutOfMemoryError):
            what = f"out of memory at {torch.cuda.max_memory_allocated():,} bytes"
        report.add(Figure(case.name, "", 0, case.precision, error=what), k, clocks)
    gc.collect()
    if scale.device.type == "cuda":
        torch.cuda.empty_cache()
    return what


def suite_cases(config: DenoiserConfig, sizes: Sequence[int], dtypes: Sequence[str]) -> list[SuiteCase]:
    """Of all workloads; if the time does not suffice, it is the large ones that are left out."""
    cases = [
        SuiteCase(workload, "visium", n, config.n_neighbors, config.n_genes, dtype)
        for workload in SUITE_WORKLOADS
        for dtype in (dtypes if workload != "graph" else ("float32",))
        for n in sizes
    ]
    return sorted(cases, key=lambda case: case.spots)


def run_suite(path: Path, scale: Scale, rehearse: bool, deadline: float) -> bool:
    """The suite's providers for a GPU, as far as the time goes; whether a check was red."""
    plan = Plan(scale.device, int(0.9 * free_memory(scale.device)), 20, 10.0, scale.config, deadline=deadline)
    sizes, dtypes, names = (10_000, 100_000, 1_000_000), ("float32", "bf16"), SUITE_PROVIDERS
    if rehearse:
        plan = dataclasses.replace(plan, rounds=1, check_spots=24, seconds=math.inf, deadline=math.inf)
        sizes, dtypes, names = (24,), ("float32",), ("eager_stflow", "triton")
    providers = {workload: tuple(GRAPHS) if workload == "graph" else names for workload in SUITE_WORKLOADS}
    checks = []
    with appending(path) as write:

        def keep(line: dict[str, Any]) -> None:
            write(line)
            checks.append(line["check"])

        suite = Suite(plan, keep, lambda what: print(f"suite: {what}", file=sys.stderr, flush=True))
        suite.run(suite_cases(scale.config, sizes, dtypes), providers)
    return "red" in checks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--skip-tests", action="store_true")
    arguments = parser.parse_args()
    begun = time.monotonic()
    if arguments.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # as a new process: torch's compiler has loaded Triton already
        os.execv(sys.executable, sys.orig_argv)
    if not arguments.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device; --rehearse runs the same path on the CPU", file=sys.stderr)
        return 2
    tests = "skipped" if arguments.rehearse or arguments.skip_tests else run_tests()
    report, scale = Report(arguments.out, arguments.rehearse, tests), scale_of(arguments.rehearse)
    missing, page = [], ""
    torch.manual_seed(0)
    with use_backend("triton"):
        # Interpreted, tf32 is ieee.
        for case in plan(("bf16", "ieee") if arguments.rehearse else ("bf16", "tf32", "ieee")):
            print(f"{time.monotonic() - begun:5.0f} s  {case.name}", file=sys.stderr, flush=True)
            before, lacks = len(report.records), "no time left"
            if time.monotonic() < begun + LAST_SECTION:
                lacks = run_case(report, scale, case)
            else:
                missing.append(case.name)
            report.judge(case, report.records[before:], lacks)
            page = report.write_page(missing)
    path = arguments.out / f"{'rehearsal' if arguments.rehearse else file_name(torch.cuda.get_device_name())}.jsonl"
    print(page, flush=True)  # before what may be interrupted
    deadline = min(time.monotonic() + SUITE_SECONDS, begun + ALL_SECONDS)
    red = run_suite(path, scale, arguments.rehearse, deadline)
    return int(report.red or red)


if __name__ == "__main__":
    sys.exit(main())

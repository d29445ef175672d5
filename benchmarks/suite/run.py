"""Runs cases: every provider of a workload at every size, each behind its own check, one line per figure.

A case is a workload at one size. Its providers are first checked on a small slide against the float64 reference; on
the CPU their peak of memory is taken, each in a process of its own; then all are prepared and timed in turns, so that a
busy machine slows all of them alike: what else it does, or what a case has beside it (:mod:`benchmarks.suite.busy`).
A sample is the published loop with everything made once per slide made before.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from stflow_fast import ops
from stflow_fast.errors import first_line

from . import floor, measure
from .busy import beside, busy_processes
from .cases import PRECISION, STEADY_STEPS, Case, Job, Plan
from .jobs import (
    FEW_SPOTS,
    Verdict,
    check,
    compile_seconds,
    job_of,
    small_call,
    why_not,
)

LEFT_OUT = "left out: "
TIME_IS_UP = f"{LEFT_OUT}the time is up; raise --minutes"
TOO_LONG = LEFT_OUT + "some {:.0f} s expected; raise --seconds"

LINE: dict[str, Any] = {
    **dict.fromkeys(("workload", "provider", "layout", "spots", "k", "genes", "dtype", "arithmetic")),
    **dict.fromkeys(("threads", "busy", "busy_nice")),
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "rounds", "cold_l2_ms", "device_ms", "device_kernels")),
    **dict.fromkeys(("prepare_ms", "compile_s", "peak_bytes", "reserved_bytes", "device_bytes", "spots_per_s")),
    **dict.fromkeys(("floor_ms", "of_floor", "peak_flops_per_s", "peak_copy_bytes_per_s")),
    **{"alone": False, "relative_error": None, "tolerance": None, "check": "not compared", "note": "", "load": None},
}
"""The fields of a line beside those of :func:`benchmarks.suite.measure.provenance`, empty.

``arithmetic`` is the dtype that was computed in: the asked one, but for the published code, which has no bf16.
``busy`` processes of that niceness counted beside what was timed, but not beside its check and its peak of memory.
``alone`` is what lacked memory beside the others of its case, and took no turns with them.
``compile_s``, of what compiles, is how much longer its first call in the run took than a second one: on the small slide
of the check, or at its own size where every size is compiled anew. It is in no other figure.
``device_ms`` is what a GPU computed and copied in one call, by its own clock; the rest of the median is the host's. It
comes, where it was asked for, with a second line of the same figure.
``device_kernels`` are the most costly of its kernels: name, launches, milliseconds.
``peak_bytes``, ``reserved_bytes`` and ``device_bytes`` are above what was there before.
``of_floor`` is ``floor_ms`` over the median (of a single operation on a GPU: over ``device_ms``), 1 at best.
``floor_ms`` is by :mod:`benchmarks.suite.floor`, of what computes the published function; ``peak_flops_per_s`` and
``peak_copy_bytes_per_s`` are the rates behind it, of that run and arithmetic. Of a single operation it is by
:mod:`benchmarks.suite.h100`, with rates of an H100.
"""


def peak_of(plan: Plan, case: Case, name: str) -> dict[str, Any]:
    """Fields of a line: the peak above the inputs on the CPU, of what is made once per slide and of a call, or that
    memory does not suffice. Only for a process of its own."""
    torch.set_num_threads(case.threads)
    try:
        with measure.limited(plan.memory_budget):
            compile_s = _load_code(plan, case, name)
            job = job_of(plan, case, name)
            job.sample_steps = STEADY_STEPS
            job.load(case.spots, case.layout)

            def run() -> None:
                job.prepare(case.spots, case.layout)
                job.call(0)

            return {"peak_bytes": measure.resident_peak(run)} | compile_s
    except Exception as error:
        return {"note": what_failed(error, plan.device)}


def _load_code(plan: Plan, case: Case, name: str) -> dict[str, float]:
    """By a call that is not counted; what is compiled wants a whole block. Of what every size compiles anew, which is
    then on the disk for the process that times it, a field of the line."""
    job = job_of(plan, case, name)
    job.sample_steps = STEADY_STEPS
    if job.compiled_by_size:
        job.prepare(case.spots, case.layout)
        return {"compile_s": compile_seconds(job.warm_up, plan.device)[1]}
    few = ops.COMPILED_BLOCK if job.judged else FEW_SPOTS
    job.prepare(min(few, case.spots), case.layout)
    job.call(0)
    return {}


def what_failed(error: Exception, device: torch.device) -> str:
    """A note of one line."""
    if not measure.lacked_memory(error):
        return f"{type(error).__name__}: {first_line(error)}"
    cuda = device.type == "cuda"
    there = torch.cuda.max_memory_allocated() if cuda else measure.resident_bytes("VmHWM")
    return f"out of memory at {there:,} bytes"


def expected_seconds(points: list[tuple[int, float]], spots: int) -> float | None:
    """Of a call, by the line through the last two (spots, seconds) on log-log paper; linear from a single one."""
    if not points:
        return None
    (before, less), (n, seconds) = points[-2:] if len(points) > 1 else ((1, points[0][1] / points[0][0]), points[0])
    slope = math.log(seconds / less) / math.log(n / before) if n > before else 1.0
    return float(seconds * (spots / n) ** max(0.0, slope))


class Entrant:
    """A provider in a case, and the line that becomes of it."""

    def __init__(self, plan: Plan, case: Case, name: str) -> None:
        self.plan, self.case, self.name = plan, case, name
        self.job: Job | None = None
        self.line = {**LINE, **case._asdict(), "provider": name, "arithmetic": case.dtype}
        self.warm: list[float] = []
        self.cold: list[float] = []
        self.floor: tuple[float, floor.Rates] | None = None
        self.lacked_memory = False
        self.owed = 0.0  # seconds until its first turn is over, as far as a trend tells

    @property
    def runs(self) -> bool:
        return not self.line["note"] and self.line["check"] != "red"

    def _started(self) -> Job:
        """Its job, between :meth:`start` and the end of its turns."""
        assert self.job is not None
        return self.job

    def attempt(self, part: Callable[[], None]) -> None:
        """What goes wrong costs this line alone."""
        if not self.runs:
            return
        try:
            part()
        except Exception as error:
            self.line["note"] = what_failed(error, self.plan.device)
            self.lacked_memory = measure.lacked_memory(error)
        if not self.runs:
            self.job = None  # type: ignore[unreachable]  # the part may have changed it

    def begin_anew(self) -> None:
        self.line |= {"note": "", "alone": True}
        self.lacked_memory = False
        self.warm.clear()
        self.cold.clear()

    def start(self) -> None:
        """Everything that is made before the rounds, on a GPU with an eye on its memory."""
        self.job = job = job_of(self.plan, self.case, self.name)
        if self.plan.device.type != "cuda":
            return self._make(job)
        job.load(self.case.spots, self.case.layout)
        torch.cuda.empty_cache()
        reserved = torch.cuda.memory_reserved()
        with measure.device_memory(self.plan.device) as most:
            # With a second call, in which a CUDA graph is captured; its memory shows in no replay.
            self.line["peak_bytes"] = measure.peak(lambda: self._make_and_call(job), self.plan.device)
        self.line |= {"device_bytes": most(), "reserved_bytes": torch.cuda.max_memory_reserved() - reserved}

    def _make_and_call(self, job: Job) -> None:
        self._make(job)
        job.call(0)

    def _make(self, job: Job) -> None:
        job.prepare(self.case.spots, self.case.layout)
        self.line["prepare_ms"] = None if job.prepare_s is None else 1e3 * job.prepare_s
        if job.compiled_by_size and self.line["compile_s"] is None:
            self.line["compile_s"] = compile_seconds(job.warm_up, self.plan.device)[1]
        else:
            job.warm_up()

    def time(self, turn: int) -> None:
        device, job = self.plan.device, self._started()
        if device.type != "cuda":
            self.warm.append(1e3 * measure.clocked(lambda: job.call(turn), device)[1])
            return
        measure.flush_l2(device)
        self.cold.append(measure.event_ms(lambda: job.call(turn)))
        self.warm.append(measure.event_ms(lambda: job.call(turn)))  # the same inputs again

    def finish(self) -> None:
        median, p20, p80 = measure.times_of(self.warm)
        self.line |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(self.warm)}
        self.line |= {"spots_per_s": 1e3 * self.case.spots / median}
        if self.cold:
            self.line["cold_l2_ms"] = measure.times_of(self.cold)[0]
        self._share_of_floor()

    def profile(self) -> None:
        """Behind the times: a profiler slows what is launched after it."""
        job = self._started()
        self.line |= measure.device_profile(lambda: job.call(0))
        self._share_of_floor()

    def _share_of_floor(self) -> None:
        if self.floor is None:
            return
        least, rates = self.floor
        reached = (self._started().by_device and self.line["device_ms"]) or self.line["median_ms"]
        self.line |= {"floor_ms": least, "of_floor": least / reached, "peak_flops_per_s": rates.flops_per_s}
        self.line["peak_copy_bytes_per_s"] = rates.bytes_per_s


class Suite:
    """Runs cases; ``begin`` is told what comes next, and ``write`` gets every line as soon as it is known."""

    def __init__(self, plan: Plan, write: Callable[[dict[str, Any]], None], begin: Callable[[str], None]) -> None:
        self.plan, self._write, self._begin = plan, write, begin
        self.common = measure.provenance(plan.device)
        self._rates = functools.cache(lambda precision, threads: floor.measured_rates(plan.device, precision))
        self._verdicts: dict[tuple[Any, ...], Verdict] = {}
        self._peaks: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._trends: dict[tuple[Any, ...], dict[int, float]] = {}  # seconds by spots

    def run(self, cases: Iterable[Case], providers: dict[str, tuple[str, ...]]) -> None:
        """Cases of a kind in the order of their sizes; ``providers`` of each workload."""
        for case in cases:
            self.run_case(case, providers[case.workload])

    def recall(self, lines: Iterable[dict[str, Any]]) -> None:
        """Let figures of an earlier run tell how long larger ones take."""
        for line in sorted(lines, key=lambda line: line["spots"]):
            if line["median_ms"]:
                self._note_time(Case.of(line), line["provider"], line["median_ms"])

    def run_case(self, case: Case, names: Iterable[str]) -> None:
        entrants: list[Entrant] = []
        with measure.torch_threads(case.threads):
            for name in names:
                if entrant := self._admitted(case, name, sum(other.owed for other in entrants)):
                    entrants.append(entrant)
            fitting = self._fitting(entrants)
            self._measure(case, entrants[:fitting])
            for entrant in entrants[fitting:]:
                self._measure_alone(case, entrant)

    def _fitting(self, entrants: list[Entrant]) -> int:
        """How many, from the first on, the budget holds together by their peaks: beyond it, a system may end the
        process."""
        peaks: Iterable[int] = itertools.accumulate(entrant.line["peak_bytes"] or 0 for entrant in entrants)
        return max(1, sum(together <= self.plan.memory_budget for together in peaks))

    def _measure_alone(self, case: Case, entrant: Entrant) -> None:
        entrant.begin_anew()
        self._measure(case, [entrant])

    def _measure(self, case: Case, entrants: list[Entrant]) -> None:
        """Those for which memory does not suffice beside the others are measured once more, by themselves."""
        try:
            with busy_processes(case.busy, case.busy_nice):
                for entrant in entrants:
                    self._tell(case, entrant.name)
                    entrant.attempt(entrant.start)
                self._tell(case, "all in turns")
                self._take_turns(entrants)
        except KeyboardInterrupt:
            self._finish(case, [entrant for entrant in entrants if entrant.warm], profile=False)
            raise
        crowded = [entrant for entrant in entrants if entrant.lacked_memory and len(entrants) > 1]
        self._finish(case, [entrant for entrant in entrants if entrant not in crowded], self.plan.profile)
        for entrant in crowded:
            self._measure_alone(case, entrant)

    def _take_turns(self, entrants: list[Entrant]) -> None:
        """Each time another one begins, so that nobody always follows the same."""
        begun = time.monotonic()
        for turn in range(self.plan.rounds):
            if turn and not self._time_for_another(begun, turn):
                break
            first = turn % max(1, len(entrants))
            for entrant in entrants[first:] + entrants[:first]:
                entrant.attempt(functools.partial(entrant.time, turn))

    def _finish(self, case: Case, entrants: list[Entrant], profile: bool) -> None:
        for entrant in entrants:
            entrant.attempt(entrant.finish)
            if entrant.runs:
                # The shortest: on a busy machine a median bends the trend.
                self._note_time(case, entrant.name, min(entrant.warm))
            self._end(entrant.line)
        for entrant in entrants:
            if entrant.runs and profile:
                entrant.profile()
                self._end(entrant.line)
            entrant.job = None

    def _note_time(self, case: Case, name: str, milliseconds: float) -> None:
        trend = self._trends.setdefault(_kind(case, name), {})
        trend[case.spots] = milliseconds / 1e3

    def _time_for_another(self, begun: float, turns: int) -> bool:
        """Whether one more turn of all fits, by the mean of those made since ``begun``."""
        now = time.monotonic()
        each = (now - begun) / turns
        return now - begun + each <= self.plan.seconds and now + each <= self.plan.deadline

    def _admitted(self, case: Case, name: str, owed: float) -> Entrant | None:
        """None where its line is written already: it cannot run, or is wrong. ``owed`` to those before it."""
        entrant = Entrant(self.plan, case, name)
        self._tell(case, name)
        leave_out = functools.partial(self._leave_out, owed=owed)
        parts: list[Callable[[Entrant], None]] = [self._refuse, leave_out, self._judge, self._begin_trend, leave_out]
        if not self.plan.rehearsal:
            parts.append(self._find_floor)
            if self.plan.device.type == "cpu" and measure.STATUS.exists():
                parts.append(self._measure_peak)
        for part in parts:
            entrant.attempt(functools.partial(part, entrant))
        if entrant.runs:
            return entrant
        self._end(entrant.line)
        return None

    def _refuse(self, entrant: Entrant) -> None:
        job = job_of(self.plan, entrant.case, entrant.name)
        entrant.line["arithmetic"] = job.arithmetic
        entrant.line["note"] = why_not(self.plan, entrant.case, job) or ""

    def _leave_out(self, entrant: Entrant, owed: float) -> None:
        """By the trend, as far as there is one."""
        plan, case = self.plan, entrant.case
        job = job_of(plan, case, entrant.name)
        trend = sorted(self._trends.get(_kind(case, entrant.name), {}).items())
        call = expected_seconds(trend, case.spots) or 0.0
        cuda = plan.device.type == "cuda"
        turn_calls = 2 if cuda else 1  # with cold and with warm L2
        memory_calls = 0.0 if (case.idle, entrant.name) in self._peaks else job.memory_calls
        seconds = call * (memory_calls + job.warm_calls + turn_calls)
        # On the CPU, memory is measured before another provider is asked.
        entrant.owed = seconds if cuda else seconds - call * memory_calls
        if time.monotonic() + owed + seconds > plan.deadline:
            entrant.line["note"] = TIME_IS_UP
        elif seconds > plan.seconds:
            entrant.line["note"] = TOO_LONG.format(seconds)

    def _judge(self, entrant: Entrant) -> None:
        """Once for all sizes, and beside nothing."""
        kind = _kind(entrant.case.idle, entrant.name)
        if kind not in self._verdicts:
            self._verdicts[kind] = check(self.plan, entrant.case, entrant.name)
        entrant.line |= self._verdicts[kind]._asdict()

    def _begin_trend(self, entrant: Entrant) -> None:
        """Where the first size is a large one."""
        case, kind = entrant.case, _kind(entrant.case, entrant.name)
        if kind not in self._trends and case.spots > self.plan.check_spots:
            with busy_processes(case.busy, case.busy_nice):
                self._trends[kind] = dict([small_call(self.plan, case, entrant.name)])

    def _find_floor(self, entrant: Entrant) -> None:
        """While there is memory for it; rates are measured once for each number of threads."""
        job, threads = job_of(self.plan, entrant.case, entrant.name), entrant.case.threads
        entrant.floor = job.floor(entrant.case.spots, lambda: self._rates(PRECISION[job.arithmetic], threads))

    def _measure_peak(self, entrant: Entrant) -> None:
        """Before anything large is made here: what dies of it does so elsewhere. Once, whatever is beside the case."""
        case, name = entrant.case.idle, entrant.name
        if (case, name) not in self._peaks:
            killed = {"note": f"out of memory: the system ended it, at a budget of {self.plan.memory_budget:,} bytes"}
            self._peaks[case, name] = measure.in_own_process(peak_of, self.plan, case, name) or killed
        entrant.line |= self._peaks[case, name]

    def _tell(self, case: Case, name: str) -> None:
        others = f" {beside(case.busy, case.busy_nice)}" if case.busy else ""
        self._begin(f"{case.workload}, {case.spots:,} spots{others}: {name}")

    def _end(self, line: dict[str, Any]) -> None:
        if line["note"] or line["check"] == "red":
            kept = {key: line[key] for key in (*Case._fields, "provider", "arithmetic", "note")}
            kept |= {key: line[key] for key in ("relative_error", "tolerance", "check")}
            line = {**LINE, **kept}
        self._write({**line, "load": round(os.getloadavg()[0], 2), **self.common})


def _kind(case: Case, name: str) -> tuple[Any, ...]:
    """Everything but the size."""
    return (name, *case._replace(spots=0))

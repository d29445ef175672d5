"""What is measured: every provider of a workload at every size, each behind its own check, one line per figure.

A case is a workload at one size. Its providers are first checked on a small slide against the float64 reference; on
the CPU their peak of memory is taken, each in a process of its own; then they are timed in turns, so that a busy
machine slows all of them alike. A sample is the published loop with everything made once per slide made before.

All calls of a sample do the same work on the same sizes. On the CPU, where they take seconds, a sample is therefore
warmed up by one of its four calls, and its peak of memory is that of a loop of two: the first call from which
something is kept, and one that has it beside it. What is timed is whole samples.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stflow_fast import DenoiserConfig, SpotGraph, ops
from stflow_fast.errors import first_line
from stflow_fast.ops.backend import Workload as Wanted
from stflow_fast.ops.backend import use_backend, why_not_triton

from . import floor, measure
from .baselines.eager_stflow import dense_neighbors
from .providers import PROVIDERS
from .slides import LAYOUTS, BenchmarkSlide, benchmark_slide
from .workload import FEATURE_DIM, SAMPLE_STEPS

NETWORK = DenoiserConfig(n_genes=1, feature_dim=FEATURE_DIM)
"""The default one; a case has genes and neighbours of its own."""

CHECK_SPOTS = 600
"""More than one block of what is compiled."""

FEW_SPOTS = 64
"""For a first call of what takes the square of them."""

CHECK_SEED = 101
INPUT_SETS = 3
STEADY_STEPS = 4
"""Times of the loop that holds as much memory as a whole sample: from the second step on there are the source, x_t, a
prediction, and the next x_t."""

TIME = 0.3
"""Of one denoiser call and of a training step."""

PRECISION = {"float32": "ieee", "tf32": "tf32", "bf16": "bf16"}
WITHOUT_AUTOCAST = ("eager_stflow",)
"""The published code does not run under it."""

GRAPH_TOLERANCE = 1e-6
"""Of the geometry; one wrong neighbour is an error of 1."""

LEFT_OUT = "left out: "
TIME_IS_UP = f"{LEFT_OUT}the time is up; raise --minutes"

LINE: dict[str, Any] = {
    **dict.fromkeys(("workload", "provider", "layout", "spots", "k", "genes", "dtype", "threads")),
    **dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "rounds", "cold_l2_ms", "prepare_ms", "first_call_s")),
    **dict.fromkeys(("peak_bytes", "reserved_bytes", "device_bytes", "spots_per_s")),
    **dict.fromkeys(("of_floor", "peak_flops_per_s", "peak_copy_bytes_per_s")),
    **{"relative_error": None, "tolerance": None, "check": "not compared", "note": "", "load": None},
}
"""The fields of a line beside those of :func:`benchmarks.measure.provenance`, empty.

``of_floor`` is the floor of :mod:`benchmarks.floor` over the median, 1 at best, of what computes the published
function; ``peak_flops_per_s`` and ``peak_copy_bytes_per_s`` are the rates behind it, of that run and arithmetic.
"""


class Case(NamedTuple):
    """One workload at one size."""

    workload: str
    layout: str
    spots: int
    k: int
    genes: int
    dtype: str

    @classmethod
    def of(cls, line: dict[str, Any]) -> Case:
        """That a line is of."""
        return cls(*(line[field] for field in cls._fields))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a suite is run.

    Attributes:
        memory_budget: bytes that one provider may take.
        rounds: calls of each provider that are timed, at most.
        seconds: a figure that would take longer is left out, by the trend of the smaller sizes; and as long may the
            turns of a case take together, after the first, which is always made.
        network: the denoiser but for its genes and neighbours, which are a case's.
        deadline: of ``time.monotonic``; what would end behind it is left out.
    """

    device: torch.device
    memory_budget: int
    rounds: int = 5
    seconds: float = 30.0
    network: DenoiserConfig = NETWORK
    check_spots: int = CHECK_SPOTS
    deadline: float = math.inf
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)

    def config(self, case: Case) -> DenoiserConfig:
        return dataclasses.replace(self.network, n_genes=case.genes, n_neighbors=case.k)


class Job(abc.ABC):
    """One provider of one case: what is made once per slide, what is timed, and what judges it."""

    dtype: str
    prepare_s: float | None = None
    judged = True
    """Whether a reference computes the same."""

    memory_calls, warm_calls = 1.0, 1.0
    """What a figure takes beside its timed calls, in such calls."""

    sample_steps = SAMPLE_STEPS
    """Of samples prepared from now on."""

    @abc.abstractmethod
    def why_not(self, spots: int, memory_budget: int) -> str | None:
        """One line that says why it cannot run there, or None."""

    @abc.abstractmethod
    def load(self, spots: int, layout: str) -> None:
        """Have the inputs in memory, for :meth:`prepare` to find."""

    @abc.abstractmethod
    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        """Make the sets of inputs, and what is made once per slide: :attr:`prepare_s`."""

    @abc.abstractmethod
    def call(self, turn: int) -> Any:
        """What is timed, on one of the sets of inputs."""

    def warm_up(self) -> None:
        """Once before anything is timed."""
        self.call(0)

    @abc.abstractmethod
    def result(self) -> Tensor:
        """What the check compares, once prepared."""


class NetworkJob(Job):
    """A provider of :data:`PROVIDERS` in one of the workloads denoise, sample and train_step."""

    def __init__(self, plan: Plan, case: Case, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.provider = PROVIDERS[name](plan.config(case)).to(plan.device, dtype)
        self.judged = self.provider.same_function
        self.device, self.workload = plan.device, case.workload
        self.genes, self.feature_dim = case.genes, plan.network.feature_dim
        plain = "tf32" if plan.device.type == "cuda" else "float32"
        self.dtype = plain if case.dtype == "bf16" and name in WITHOUT_AUTOCAST else case.dtype
        self._step = None
        # On a GPU, the first sample captures what the others replay.
        self._warmed_by_one = case.workload == "sample" and plan.device.type == "cpu"
        if self._warmed_by_one:
            calls = SAMPLE_STEPS - 1
            self.memory_calls, self.warm_calls = (STEADY_STEPS - 1) / calls, 1 / calls

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        lacks = self.provider.why_not(self.device, spots, memory_budget)
        if self.workload == "train_step":
            lacks = lacks or self.provider.why_not_training(self.device)
        if self.workload == "denoise":
            lacks = lacks or self.provider.why_not_one_call()
        return lacks

    def load(self, spots: int, layout: str) -> None:
        slide_of(layout, spots, 0, self.genes, self.feature_dim)
        noises(spots, self.genes, 0)

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        slide = slide_of(layout, spots, seed, self.genes, self.feature_dim)
        dtype = self.provider.weight.dtype
        self.sets = [noise.to(self.device, dtype) for noise in noises(spots, self.genes, seed)]
        if self.workload == "train_step":
            slide = slide.to(self.device)
            self.target = slide.x_1.to(dtype)
        self.provider.sample_steps = self.sample_steps
        with self._precision():
            _, self.prepare_s = measure.clocked(lambda: self.provider.prepare(slide), self.device)

    def call(self, turn: int) -> Any:
        x = self.sets[turn % len(self.sets)]
        with self._precision():
            if self.workload == "denoise":
                return self.provider.denoise(x, TIME)
            if self.workload == "sample":
                return self.provider.sample(x)
            if self._step is None:
                self._step = measure.adam_step(self.provider.model, lambda: self._loss(self._x_t))
            self._x_t = x
            return self._step()

    def warm_up(self) -> None:
        if not self._warmed_by_one:
            return super().warm_up()
        with self._precision():
            self.provider.denoise(self.sets[0], TIME)

    def result(self) -> Tensor:
        if self.workload == "train_step":
            with self._precision():
                return measure.gradients(self.provider.model, lambda: self._loss(self.sets[0]))
        if self.workload == "sample" and self.device.type == "cuda":
            for turn in range(2):  # before a CUDA graph is replayed, which is what is timed
                self.call(turn)
        return self.call(0)

    def _loss(self, x: Tensor) -> Tensor:
        return self.provider.loss(x, self.target, TIME)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        precision = PRECISION[self.dtype]
        with measure.matrix_products(precision), measure.autocast(precision, self.device):
            yield


def _by_tree(coords: Tensor, k: int, device: torch.device) -> SpotGraph:
    return SpotGraph.build(coords, k).to(device)


def _by_kernel(coords: Tensor, k: int, device: torch.device) -> SpotGraph:
    with use_backend("triton"):
        return ops.build_graph(coords, k, None, torch.float32, device)


def _by_distances(coords: Tensor, k: int, device: torch.device) -> Tensor:
    """[N, k] as the published code finds them, in float32."""
    return dense_neighbors(coords.to(device, torch.float32), torch.zeros(len(coords), device=device), k)


GRAPHS: dict[str, Callable[[Tensor, int, torch.device], SpotGraph | Tensor]] = {
    "scipy_kdtree": _by_tree,
    "triton": _by_kernel,
    "dense_cdist": _by_distances,
}


class GraphJob(Job):
    """One of :data:`GRAPHS`, from coordinates on the host to the table of neighbours on the device."""

    def __init__(self, plan: Plan, case: Case, name: str) -> None:
        self.device, self.name, self.k, self.dtype = plan.device, name, case.k, case.dtype

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        if self.name == "triton":
            return why_not_triton(Wanted(self.device, k=self.k), interpreted=True)
        if self.name == "scipy_kdtree":
            return None
        if spots <= self.k:
            return f"it wants more than {self.k} spots"
        needed = 9 * spots * spots  # the distances, a masked copy and its mask, as in EagerSTFlow
        if needed <= memory_budget:
            return None
        return f"it needs {needed / 2**30:.1f} GiB, over the budget of {memory_budget / 2**30:.1f} GiB"

    def load(self, spots: int, layout: str) -> None:
        """Nothing: coordinates are made in a moment, with what is prepared."""

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        # The regular lattice is the same in every set, elsewhere in memory.
        self.sets = [coordinates(layout, spots, seed + i) for i in range(INPUT_SETS)]

    def call(self, turn: int) -> SpotGraph | Tensor:
        return GRAPHS[self.name](self.sets[turn % len(self.sets)], self.k, self.device)

    def result(self) -> Tensor:
        """[1], its error: neighbours that differ from the nearest by float64 distances, and the geometry's error."""
        coords, found = self.sets[0], self.call(0)
        expected = torch.cdist(coords, coords, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
        expected = expected.sort(dim=1, stable=True).indices[:, : self.k]
        error = 0.0
        if isinstance(found, SpotGraph):
            exact = SpotGraph.build(coords, self.k, dtype=torch.float64)
            error = measure.relative_error(found.geometry, exact.geometry)
            found = found.to_spots(found.order[found.neighbors])
        return torch.tensor([int((found.cpu() != expected).sum()) + error])


def providers_of(workload: str) -> tuple[str, ...]:
    return tuple(GRAPHS if workload == "graph" else PROVIDERS)


def job_of(plan: Plan, case: Case, name: str) -> Job:
    return GraphJob(plan, case, name) if case.workload == "graph" else NetworkJob(plan, case, name)


@functools.lru_cache(maxsize=1)
def slide_of(layout: str, spots: int, seed: int, genes: int, feature_dim: int) -> BenchmarkSlide:
    """The providers of a case read the same one."""
    return benchmark_slide(layout, spots, seed, genes, feature_dim)


@functools.lru_cache(maxsize=1)
def noises(spots: int, genes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.rand(spots, genes, generator=generator) for _ in range(INPUT_SETS)]


def coordinates(layout: str, spots: int, seed: int) -> Tensor:
    """[N, 2] as :func:`benchmark_slide` makes them, without the rest of a slide."""
    return LAYOUTS[layout](spots, torch.Generator().manual_seed(seed)).float().double()


def input_bytes(case: Case, feature_dim: int = FEATURE_DIM) -> int:
    """What a case holds of inputs alone."""
    if case.workload == "graph":
        return INPUT_SETS * 16 * case.spots
    return case.spots * (16 + 4 * feature_dim + 4 * (2 + INPUT_SETS) * case.genes)


class Verdict(NamedTuple):
    check: str
    relative_error: float | None
    tolerance: float | None
    seconds: float  # of the first preparation and call


def check(plan: Plan, case: Case, name: str) -> Verdict:
    """A provider's result on a small slide without ties, against the float64 reference. Red without a number is NaN."""
    layout = "visium_jittered" if case.layout == "visium" else case.layout
    job = job_of(plan, case, name)
    if not job.judged:
        return Verdict("not compared", None, None, 0.0)

    def first_result() -> Tensor:
        job.prepare(plan.check_spots, layout, CHECK_SEED)
        return job.result()

    found, seconds = measure.clocked(first_result, plan.device)
    if case.workload == "graph":
        error, tolerance = found.item(), GRAPH_TOLERANCE
    else:
        tolerance = measure.NETWORK_TOLERANCE[PRECISION[job.dtype]]
        exact = dataclasses.replace(plan, device=torch.device("cpu"))
        expected = expected_result(exact, case._replace(layout=layout, spots=plan.check_spots, dtype="float32"))
        error = measure.relative_error(found, expected)
    return Verdict(
        "green" if error <= tolerance else "red", error if math.isfinite(error) else None, tolerance, seconds
    )


@functools.lru_cache(maxsize=1)
def expected_result(plan: Plan, case: Case) -> Tensor:
    """By the float64 reference; the providers of a workload are held to the same one."""
    job = NetworkJob(plan, case, "reference", torch.float64)
    job.prepare(case.spots, case.layout, CHECK_SEED)
    return job.result()


def peak_of(plan: Plan, case: Case, name: str) -> dict[str, Any]:
    """Fields of a line: the peak above the inputs on the CPU, of what is made once per slide and of a call, or that
    memory does not suffice. Only for a process of its own."""
    torch.set_num_threads(plan.threads)
    try:
        with measure.limited(plan.memory_budget):
            job = job_of(plan, case, name)
            job.sample_steps = STEADY_STEPS
            # Code first, which is not counted; what is compiled wants a whole block.
            few = ops.COMPILED_BLOCK if job.judged else FEW_SPOTS
            job.prepare(min(few, case.spots), case.layout)
            job.call(0)
            job.load(case.spots, case.layout)

            def run() -> None:
                job.prepare(case.spots, case.layout)
                job.call(0)

            return {"peak_bytes": measure.resident_peak(run)}
    except Exception as error:
        return {"note": what_failed(error, plan.device)}


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
    return seconds * (spots / n) ** max(0.0, slope)


class Entrant:
    """A provider in a case, and the line that becomes of it."""

    def __init__(self, plan: Plan, case: Case, name: str) -> None:
        self.plan, self.case, self.name = plan, case, name
        self.job: Job | None = None
        self.line = {**LINE, **case._asdict(), "provider": name, "threads": plan.threads}
        self.warm: list[float] = []
        self.cold: list[float] = []
        self.rates: floor.Rates | None = None  # where there is a floor
        self.owed = 0.0  # seconds of warming it up and its first turn, as far as a trend tells

    @property
    def runs(self) -> bool:
        return not self.line["note"] and self.line["check"] != "red"

    def attempt(self, part: Callable[[], None]) -> None:
        """What goes wrong costs this line alone."""
        if not self.runs:
            return
        try:
            part()
        except Exception as error:
            self.line["note"] = what_failed(error, self.plan.device)
        if not self.runs:
            self.job = None

    def start(self) -> None:
        """Everything that is made before the rounds."""
        plan, case = self.plan, self.case
        self.job = job_of(plan, case, self.name)
        self.job.prepare(case.spots, case.layout)
        _, seconds = measure.clocked(self.job.warm_up, plan.device)
        self.line["prepare_ms"] = None if self.job.prepare_s is None else 1e3 * self.job.prepare_s
        self.line["first_call_s"] = (self.line["first_call_s"] or 0.0) + (self.job.prepare_s or 0.0) + seconds

    def time(self, turn: int) -> None:
        device = self.plan.device
        if device.type != "cuda":
            self.warm.append(1e3 * measure.clocked(lambda: self.job.call(turn), device)[1])
            return
        measure.flush_l2(device)
        self.cold.append(measure.event_ms(lambda: self.job.call(turn)))
        self.warm.append(measure.event_ms(lambda: self.job.call(turn)))  # the same inputs again

    def measure_device_memory(self) -> None:
        """Of the second call, in which a CUDA graph is captured; its memory shows in no replay."""
        device = self.plan.device
        torch.cuda.empty_cache()
        self.line["peak_bytes"] = measure.peak(lambda: self.job.call(0), device)
        self.line["reserved_bytes"] = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        self.line["device_bytes"] = measure.device_peak(lambda: self.job.call(0), device)

    def finish(self) -> None:
        median, p20, p80 = measure.times_of(self.warm)
        self.line |= {"median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(self.warm)}
        self.line |= {"spots_per_s": 1e3 * self.case.spots / median, "dtype": self.job.dtype}
        if self.cold:
            self.line["cold_l2_ms"] = measure.times_of(self.cold)[0]
        if self.rates:
            counted = floor.work(self.case.workload, self.plan.config(self.case), self.case.spots)
            least = floor.floor_ms(counted, self.rates, 2 if self.job.dtype == "bf16" else 4)
            self.line |= {"of_floor": least / median, "peak_flops_per_s": self.rates.flops_per_s}
            self.line["peak_copy_bytes_per_s"] = self.rates.bytes_per_s


class Suite:
    """Runs cases; ``begin`` is told what comes next, and ``write`` gets every line as soon as it is known."""

    def __init__(self, plan: Plan, write: Callable[[dict[str, Any]], None], begin: Callable[[str], None]) -> None:
        self.plan, self._write, self._begin = plan, write, begin
        self.common = measure.provenance(plan.device)
        self._rates = functools.cache(functools.partial(floor.measured_rates, plan.device))
        self._verdicts: dict[tuple, Verdict] = {}
        self._trends: dict[tuple, dict[int, float]] = {}  # seconds by spots

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
        for name in names:
            if entrant := self._admitted(case, name, sum(other.owed for other in entrants)):
                entrants.append(entrant)
        for entrant in entrants:
            self._tell(case, entrant.name)
            entrant.attempt(entrant.start)
            if self.plan.device.type == "cuda":
                entrant.attempt(entrant.measure_device_memory)
        self._tell(case, "all in turns")
        begun = time.monotonic()
        for turn in range(self.plan.rounds):
            if turn and not self._time_for_another(begun, turn):
                break
            for entrant in entrants:
                entrant.attempt(functools.partial(entrant.time, turn))
        for entrant in entrants:
            entrant.attempt(entrant.finish)
            entrant.job = None
            if entrant.runs:
                # The shortest: on a busy machine a median bends the trend.
                self._note_time(case, entrant.name, min(entrant.warm))
            self._end(entrant.line)

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
        parts = [functools.partial(self._leave_out, owed=owed), self._judge, self._measure_rates]
        if self.plan.device.type == "cpu" and measure.STATUS.exists():
            parts.append(self._measure_peak)
        for part in parts:
            entrant.attempt(functools.partial(part, entrant))
        if entrant.runs:
            return entrant
        self._end(entrant.line)
        return None

    def _leave_out(self, entrant: Entrant, owed: float) -> None:
        plan, case = self.plan, entrant.case
        job = job_of(plan, case, entrant.name)
        entrant.line["note"] = job.why_not(case.spots, plan.memory_budget) or ""
        if entrant.line["note"]:
            return
        trend = sorted(self._trends.get(_kind(case, entrant.name), {}).items())
        call = expected_seconds(trend, case.spots) or 0.0
        entrant.owed = call * (1 + job.warm_calls)
        seconds = entrant.owed + call * job.memory_calls
        if time.monotonic() + owed + seconds > plan.deadline:
            entrant.line["note"] = TIME_IS_UP
        elif seconds > plan.seconds:
            entrant.line["note"] = f"{LEFT_OUT}some {seconds:.0f} s expected; raise --seconds"

    def _judge(self, entrant: Entrant) -> None:
        """Once for all sizes."""
        kind = _kind(entrant.case, entrant.name)
        is_first = kind not in self._verdicts
        if is_first:
            self._verdicts[kind] = check(self.plan, entrant.case, entrant.name)
        verdict = self._verdicts[kind]
        entrant.line |= verdict._asdict()
        del entrant.line["seconds"]
        if is_first:  # what is compiled was compiled there
            entrant.line["first_call_s"] = verdict.seconds

    def _measure_rates(self, entrant: Entrant) -> None:
        """While there is memory for it."""
        job = job_of(self.plan, entrant.case, entrant.name)
        if job.judged and entrant.case.workload != "graph":
            entrant.rates = self._rates(PRECISION[job.dtype])

    def _measure_peak(self, entrant: Entrant) -> None:
        """Before anything large is made here: what dies of it does so elsewhere."""
        killed = {"note": f"out of memory: the system ended it, at a budget of {self.plan.memory_budget:,} bytes"}
        entrant.line |= measure.in_own_process(peak_of, self.plan, entrant.case, entrant.name) or killed

    def _tell(self, case: Case, name: str) -> None:
        self._begin(f"{case.workload}, {case.spots:,} spots: {name}")

    def _end(self, line: dict[str, Any]) -> None:
        if line["note"] or line["check"] == "red":
            kept = {key: line[key] for key in (*Case._fields, "provider", "threads", "note")}
            kept |= {key: line[key] for key in ("relative_error", "tolerance", "check")}
            line = {**LINE, **kept}
        self._write({**line, "load": round(os.getloadavg()[0], 2), **self.common})


def _kind(case: Case, name: str) -> tuple:
    """Everything but the size."""
    return (name, *case._replace(spots=0))

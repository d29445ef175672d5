"""What is measured: a provider in a workload, behind one call that is timed and a check that comes before.

All calls of a sample do the same work on the same sizes. On the CPU, where they take seconds, a sample is therefore
warmed up by one of its four calls, and its peak of memory is that of a loop of three (:data:`STEADY_STEPS`). What is
timed is whole samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stflow_fast import SpotGraph, ops
from stflow_fast.ops.backend import Workload as Wanted
from stflow_fast.ops.backend import use_backend, why_not_triton

from ..opponents.eager_stflow import dense_neighbors
from . import floor, measure
from .cases import CHECK_SEED, INPUT_SETS, PRECISION, STEADY_STEPS, Case, Job, Plan
from .floor import Rates
from .operations import OPERATIONS, OperationJob, operation_providers
from .providers import PROVIDERS, distance_bytes, over_budget
from .slides import BenchmarkSlide, benchmark_slide, coordinates
from .workload import FEATURE_DIM, SAMPLE_STEPS

FEW_SPOTS = 64
"""For a first call of what takes the square of them."""

TIME = 0.3
"""Of one denoiser call and of a training step."""

WITHOUT_AUTOCAST = ("eager_stflow",)
"""The published code does not run under it."""

GRAPH_TOLERANCE = 1e-6
"""Of the geometry; one wrong neighbour is an error of 1."""


class NetworkJob(Job):
    """A provider of :data:`PROVIDERS` in one of the workloads denoise, sample and train_step."""

    def __init__(self, plan: Plan, case: Case, name: str, dtype: torch.dtype = torch.float32) -> None:
        self.provider = PROVIDERS[name](plan.config(case)).to(plan.device, dtype)
        self.judged, self.compiles = self.provider.same_function, self.provider.compiles
        self.compiled_by_size = self.provider.compiled_by_size
        self.device, self.workload, self.config = plan.device, case.workload, plan.config(case)
        self.genes, self.feature_dim = case.genes, plan.network.feature_dim
        plain = "tf32" if plan.device.type == "cuda" else "float32"
        self.arithmetic = plain if case.dtype == "bf16" and name in WITHOUT_AUTOCAST else case.dtype
        self._step: Callable[[], None] | None = None
        self._loaded: tuple[int, str, int] | None = None
        # On a GPU, the first sample captures what the others replay.
        self._warmed_by_one = case.workload == "sample" and plan.device.type == "cpu"
        if self._warmed_by_one:
            calls = SAMPLE_STEPS - 1
            self.memory_calls, self.warm_calls = (STEADY_STEPS - 1) / calls, 1 / calls
        if self.compiled_by_size:
            self.memory_calls += 2 * self.warm_calls  # see compile_seconds

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        lacks = self.provider.why_not(self.device, spots, memory_budget)
        if self.workload == "train_step":
            lacks = lacks or self.provider.why_not_training(self.device)
        if self.workload == "denoise":
            lacks = lacks or self.provider.why_not_one_call()
        return lacks

    def load(self, spots: int, layout: str, seed: int = 0) -> None:
        slide_of(layout, spots, seed, self.genes, self.feature_dim)
        dtype = self.provider.weight.dtype
        self.sets = [noise.to(self.device, dtype) for noise in noises(spots, self.genes, seed)]
        self._loaded = spots, layout, seed

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        if self._loaded != (spots, layout, seed):
            self.load(spots, layout, seed)
        slide = slide_of(layout, spots, seed, self.genes, self.feature_dim)
        dtype = self.provider.weight.dtype
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
        result: Tensor = self.call(0)
        return result

    def floor(self, spots: int, measured: Callable[[], Rates]) -> tuple[float, Rates] | None:
        if not self.judged:
            return None
        counted, rates = floor.work(self.workload, self.config, spots), measured()
        return floor.floor_ms(counted, rates, 2 if self.arithmetic == "bf16" else 4), rates

    def _loss(self, x: Tensor) -> Tensor:
        return self.provider.loss(x, self.target, TIME)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        precision = PRECISION[self.arithmetic]
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

    tolerance = GRAPH_TOLERANCE

    def __init__(self, plan: Plan, case: Case, name: str) -> None:
        self.device, self.name, self.k, self.arithmetic = plan.device, name, case.k, case.dtype
        self.compiles = name == "triton"

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        if self.name == "triton":
            return why_not_triton(Wanted(self.device, k=self.k), interpreted=True)
        if self.name == "scipy_kdtree":
            return None
        if spots <= self.k:
            return f"it wants more than {self.k} spots"
        return over_budget(distance_bytes(spots), memory_budget)

    def load(self, spots: int, layout: str, seed: int = 0) -> None:
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
    if workload in OPERATIONS:
        return operation_providers(workload)
    return tuple(GRAPHS if workload == "graph" else PROVIDERS)


def job_of(plan: Plan, case: Case, name: str) -> Job:
    if case.workload in OPERATIONS:
        return OperationJob(plan, case, name)
    return GraphJob(plan, case, name) if case.workload == "graph" else NetworkJob(plan, case, name)


def why_not(plan: Plan, case: Case, job: Job) -> str | None:
    """One line that says why it cannot run, or cannot be checked, within the plan's memory; or None."""
    lacks = job.why_not(case.spots, plan.memory_budget)
    return lacks or (job.why_not(plan.check_spots, plan.memory_budget) if job.judged else None)


@functools.lru_cache(maxsize=1)
def slide_of(layout: str, spots: int, seed: int, genes: int, feature_dim: int) -> BenchmarkSlide:
    """The providers of a case read the same one."""
    return benchmark_slide(layout, spots, seed, genes, feature_dim)


@functools.lru_cache(maxsize=1)
def noises(spots: int, genes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.rand(spots, genes, generator=generator) for _ in range(INPUT_SETS)]


def input_bytes(case: Case, feature_dim: int = FEATURE_DIM) -> int:
    """What a case holds of inputs alone."""
    if case.workload == "graph":
        return INPUT_SETS * 16 * case.spots
    if case.workload in OPERATIONS:
        return OperationJob.input_bytes(case)
    return case.spots * (16 + 4 * feature_dim + 4 * (2 + INPUT_SETS) * case.genes)


class Verdict(NamedTuple):
    """Fields of a line."""

    check: str
    relative_error: float | None
    tolerance: float | None
    compile_s: float | None


def compile_seconds(first_call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result of a call that compiles, and how much longer it takes than a second one."""
    result, first_s = measure.clocked(first_call, device)
    return result, max(0.0, first_s - measure.clocked(first_call, device)[1])


def check(plan: Plan, case: Case, name: str) -> Verdict:
    """A provider's result on a small slide without ties, against the float64 reference. Red without a number is NaN."""
    layout = "visium_jittered" if case.layout == "visium" else case.layout
    job = job_of(plan, case, name)
    if not job.judged:
        return Verdict("not compared", None, None, None)

    def result() -> Tensor:
        job.prepare(plan.check_spots, layout, CHECK_SEED)
        return job.result()

    job.load(plan.check_spots, layout, CHECK_SEED)
    if job.compiles:
        found, compile_s = compile_seconds(result, plan.device)
    else:
        found, compile_s = result(), None
    if job.tolerance is not None:
        error, tolerance = found.item(), job.tolerance
    else:
        tolerances = measure.GRADIENT_TOLERANCE if case.workload == "train_step" else measure.NETWORK_TOLERANCE
        tolerance = tolerances[PRECISION[job.arithmetic]]
        exact = dataclasses.replace(plan, device=torch.device("cpu"))
        expected = expected_result(exact, case._replace(layout=layout, spots=plan.check_spots, dtype="float32"))
        error = measure.relative_error(found, expected)
    told = error if math.isfinite(error) else None
    return Verdict("green" if error <= tolerance else "red", told, tolerance, compile_s)


def small_call(plan: Plan, case: Case, name: str) -> tuple[int, float]:
    """Spots of a small slide, and seconds of its third call: the second may capture a CUDA graph."""
    job = job_of(plan, case, name)
    spots = plan.check_spots if job.judged else FEW_SPOTS
    job.prepare(spots, case.layout)
    for turn in range(2):
        job.call(turn)
    return spots, measure.clocked(lambda: job.call(2), plan.device)[1]


@functools.lru_cache(maxsize=1)
def expected_result(plan: Plan, case: Case) -> Tensor:
    """By the float64 reference; the providers of a workload are held to the same one."""
    job = NetworkJob(plan, case, "reference", torch.float64)
    job.prepare(case.spots, case.layout, CHECK_SEED)
    return job.result()

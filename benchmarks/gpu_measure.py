"""What the GPU benchmarks measure with: sizes, clocks, peaks, and the figure that comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stflow_fast import DenoiserConfig

from .workload import FEATURE_DIM, N_GENES


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of a run: spots, those of a window in training, side of the corner of a large slide that is checked."""

    device: torch.device
    config: DenoiserConfig
    kernel_spots: tuple[int, ...]
    slide_spots: int
    large_spots: int
    window: int
    patch: int = 100


def scale_of(rehearse: bool) -> Scale:
    if not rehearse:
        config = DenoiserConfig(n_genes=N_GENES, feature_dim=FEATURE_DIM)
        return Scale(torch.device("cuda"), config, (10_000, 100_000, 1_000_000), 10_000, 1_000_000, 1_000)
    widths = {"hidden_dim": 32, "pairwise_hidden_dim": 32, "n_layers": 1, "n_heads": 2, "n_neighbors": 4}
    return Scale(torch.device("cpu"), DenoiserConfig(n_genes=5, feature_dim=16, **widths), (24,), 24, 30, 12)


@dataclasses.dataclass
class Figure:
    """One line of the report. ``times`` are the median, 20th and 80th percentile in milliseconds; ``met`` the goals."""

    workload: str
    provider: str
    spots: int
    dtype: str
    times: list[float] | None = None
    relative_error: float | None = None
    tolerance: float = 0.0
    peak_bytes: int | None = None
    floor_ms: float | None = None
    first_call_s: float | None = None
    met: dict[str, bool | None] = dataclasses.field(default_factory=dict)
    note: str = ""
    error: str = ""

    @property
    def check(self) -> str:
        if self.relative_error is None:
            return "none"
        return "green" if self.relative_error <= self.tolerance else "red"  # NaN is red


def at_most(value: float | None, limit: float | None) -> bool | None:
    return None if value is None or limit is None else value <= limit


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().to(expected.device).double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()


def clocked(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result, and wall-clock seconds until the device is done."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - begun


def times_of(milliseconds: list[float]) -> list[float]:
    return np.quantile(milliseconds, [0.5, 0.2, 0.8]).tolist()


def wall_times(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    return times_of([1e3 * clocked(function, device)[1] for _ in range(repeats if device.type == "cuda" else 1)])


def in_turns(functions: dict[str, Callable[[], Any]], device: torch.device, rep: int) -> dict[str, list[float]]:
    """Times of each, ``rep`` milliseconds in each of three turns, so that a drifting clock hits all alike."""
    if device.type != "cuda":
        return {name: wall_times(function, device, 1) for name, function in functions.items()}
    from triton.testing import do_bench

    found: dict[str, list[float]] = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(3), functions.items()):
        found[name] += do_bench(function, rep=rep, return_mode="all")
    return {name: times_of(each) for name, each in found.items()}


def peak(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes allocated at the highest of one call, above what was allocated before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as a CUDA graph, so that its replays are timed without the host; itself on the CPU."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def out_of_memory(function: Callable[[], Any]) -> str:
    """Runs it once; what to note where the device is too small for it."""
    try:
        function()
    except torch.OutOfMemoryError:
        return f"out of memory at {torch.cuda.max_memory_allocated():,} bytes"
    return ""


@contextlib.contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """How float32 multiplies."""
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

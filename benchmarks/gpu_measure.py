"""What the sections of the GPU benchmarks share: sizes, turns, and the figure that comes out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch

from stflow_fast import DenoiserConfig

from .measure import clocked, times_of
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

"""What is measured: a case is a workload at one size, a plan how a suite is run, a job one provider of one case."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stflow_fast import DenoiserConfig

from .floor import Rates
from .workload import FEATURE_DIM, SAMPLE_STEPS

NETWORK = DenoiserConfig(n_genes=1, feature_dim=FEATURE_DIM)
"""The default one; a case has genes and neighbours of its own."""

CHECK_SPOTS = 1_100
"""More than one block of what is compiled, and of what treats every spot alone."""

CHECK_SEED = 101
INPUT_SETS = 3
STEADY_STEPS = 4
"""Times of the loop that holds as much memory as a whole sample: from the second step on there are the source, x_t, a
prediction, and the next x_t."""

PRECISION = {"float32": "ieee", "tf32": "tf32", "bf16": "bf16"}


class Case(NamedTuple):
    """One workload at one size, with so many threads of torch, beside so many busy processes of that niceness."""

    workload: str
    layout: str
    spots: int
    k: int
    genes: int
    dtype: str
    threads: int = torch.get_num_threads()
    busy: int = 0
    busy_nice: int = 0

    @property
    def idle(self) -> Case:
        """The same with nothing beside it."""
        return self._replace(busy=0, busy_nice=0)

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
        profile: on a GPU, ask its profiler too, behind the times of a case.
        rehearsal: sizes are tiny and kernels interpreted, so that neither peaks of memory nor rates are taken.
    """

    device: torch.device
    memory_budget: int
    rounds: int = 5
    seconds: float = 30.0
    network: DenoiserConfig = NETWORK
    check_spots: int = CHECK_SPOTS
    deadline: float = math.inf
    rehearsal: bool = False
    profile: bool = False

    def config(self, case: Case) -> DenoiserConfig:
        return dataclasses.replace(self.network, n_genes=case.genes, n_neighbors=case.k)


class Job(abc.ABC):
    """One provider of one case: what is made once per slide, what is timed, and what judges it."""

    arithmetic: str
    """Of :data:`PRECISION`: a case's dtype, but for what does not run in it."""

    prepare_s: float | None = None
    judged = True
    """Whether a reference computes the same."""

    compiles = False
    """Whether its first call compiles something."""

    compiled_by_size = False
    """Whether another number of spots is compiled anew."""

    memory_calls, warm_calls = 1.0, 1.0
    """What measuring memory and warming up take, in timed calls."""

    sample_steps = SAMPLE_STEPS
    """Of samples prepared from now on."""

    tolerance: float | None = None
    """Of what judges itself: its result is [1], its error."""

    by_device = False
    """Whether its share of the floor is that of the device's own time: a single operation's launch by the host takes
    longer than a small one."""

    @abc.abstractmethod
    def why_not(self, spots: int, memory_budget: int) -> str | None:
        """One line that says why it cannot run there, or None."""

    @abc.abstractmethod
    def load(self, spots: int, layout: str, seed: int = 0) -> None:
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

    def floor(self, spots: int, measured: Callable[[], Rates]) -> tuple[float, Rates] | None:
        """Least milliseconds, and the rates that they rest on, such as ``measured`` gives; None of what is not
        counted."""
        return None

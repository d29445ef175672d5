"""The workers of :mod:`.crew` as actors of a Ray cluster. Imported only when asked for."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from ..errors import InputError, OutputError, first_line
from ..model import Denoiser
from .crew import Member, beside_each_other
from .state import SlideLine
from .worker import Settings, Step, Task, Worker

SECONDS_TO_STOP = 30
"""For what actors are doing when the run ends."""


class _Actor:
    """A worker in a process of the cluster."""

    def __init__(self, model: Denoiser, settings: Settings, folder: str) -> None:
        os.chdir(folder)  # where paths of slides and of the results begin
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        self._worker, self._computing = Worker(model.to(device), settings), threading.Lock()

    def is_there(self) -> bool:
        return True

    def predict(self, task: Task) -> SlideLine | OutputError:
        """Called by two threads: one reads or writes while the other computes."""
        read = Step(task, task).then(self._worker.read)
        with self._computing:
            drawn = read.then(self._worker.draw)
        written = drawn.then(functools.partial(self._worker.write, task))
        try:
            return self._worker.line(written, drawn.seconds - read.seconds)
        except OutputError as error:
            return error


class _Remote(Member):
    """An actor, as the process that gives it slides sees it."""

    def __init__(self, start: functools.partial[Any]) -> None:
        super().__init__()
        self._start, self._actor, self._end = start, start(), ""
        self._lines: deque[Any] = deque()  # references to what comes of the slides

    def again(self) -> _Remote:
        return _Remote(self._start)

    def check(self) -> None:
        """Wait for it.

        Raises:
            InputError: it does not start.
        """
        try:
            ray.get(self._actor.is_there.remote())
        except RayError as error:
            reason = first_line(getattr(error, "cause", None) or error)
            raise InputError(f"engine: an actor of the Ray cluster does not start ({reason})") from error

    @staticmethod
    def wait(members: Sequence[_Remote]) -> list[_Remote]:
        ready, _ = ray.wait([line for member in members for line in member._lines])
        return [member for member in members if not set(ready).isdisjoint(member._lines)]

    def send(self, task: Task) -> None:
        self._lines.append(self._actor.predict.remote(task))

    def receive(self) -> SlideLine | OutputError | None:
        [line], _ = ray.wait(list(self._lines))
        self._lines.remove(line)
        try:
            return ray.get(line)
        except RayError as error:
            self._end = type(error).__name__
            return None

    def stop(self) -> None:
        if self._lines and not self._end:  # it writes nothing half
            ray.wait(list(self._lines), num_returns=len(self._lines), timeout=SECONDS_TO_STOP)
        ray.kill(self._actor)

    @property
    def end(self) -> str:
        return self._end


def on_cluster(
    model: Denoiser, settings: Settings, tasks: Sequence[Task], workers: int | None, address: str | None
) -> Iterator[SlideLine]:
    """The lines of slides as they come, from actors that write their predictions themselves: the folder of the results
    and the slides lie where all nodes see them by the same paths.

    Args:
        model: is sent to the cluster once. Where it is on a GPU, each actor gets one, else a core.
        workers: actors; as many as the cluster has GPUs or cores when None.
        address: of a running cluster, or "auto"; see ``ray.init``. When None, and where no cluster is joined yet, one
            is started on this machine for the time of the run.

    Raises:
        InputError: no cluster there, one with fewer GPUs or cores than ``workers``, actors that do not start.
        OutputError: what would go wrong with every slide.
    """
    joined = ray.is_initialized()
    if not joined:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"address: no Ray cluster there ({first_line(error)}); see ray status") from error
    try:
        yield from beside_each_other(_actors(model, settings, len(tasks), workers), tasks)
    finally:
        if not joined:
            ray.shutdown()


def _actors(model: Denoiser, settings: Settings, n_slides: int, workers: int | None) -> list[_Remote]:
    kind = "GPU" if next(model.parameters()).is_cuda else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if not 1 <= (workers or 1) <= there:
        raise InputError(f"workers: the Ray cluster has {there} {kind}s, {workers or 1} are wanted")
    needs = {"num_cpus": 1, "num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    actor = ray.remote(max_concurrency=2, **needs)(_Actor)
    start = functools.partial(actor.remote, ray.put(copy.deepcopy(model).cpu()), settings, os.getcwd())
    members = [_Remote(start) for _ in range(min(workers or there, n_slides))]
    for member in members:
        member.check()
    return members

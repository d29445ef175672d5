"""The workers of :mod:`.crew` as actors of a Ray cluster. Imported only when asked for."""

from __future__ import annotations

import copy
import functools
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from ..errors import InputError, OutputError, first_line
from ..model import Denoiser
from ..sampling import check_precision
from .crew import Member, Word, beside_each_other
from .state import SlideLine
from .worker import Settings, Step, Task, Worker

SECONDS_TO_STOP = 30
"""For what actors are doing when the run ends."""

SECONDS_TO_CONNECT = 5


class _Actor:
    """A worker in a process of the cluster."""

    def __init__(self, model: Denoiser, settings: Settings, folder: str) -> None:
        os.chdir(folder)  # where paths of slides and of the results begin
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        self._worker, self._computing = Worker(model.to(device), settings), threading.Lock()

    def is_ready(self) -> Word:
        return Word.READY

    def predict(self, task: Task) -> SlideLine | InputError:
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
        self._said = deque([self._actor.is_ready.remote()])  # references to what comes

    def again(self) -> _Remote:
        return _Remote(self._start)

    @classmethod
    def wait(cls, members: Sequence[_Remote]) -> list[_Remote]:
        ready, _ = ray.wait([said for member in members for said in member._said])
        return [member for member in members if not set(ready).isdisjoint(member._said)]

    def send(self, task: Task) -> None:
        self._said.append(self._actor.predict.remote(task))

    def receive(self) -> SlideLine | InputError | Word:
        [coming], _ = ray.wait(list(self._said))
        self._said.remove(coming)
        try:
            said: SlideLine | InputError | Word = ray.get(coming)
        except RayError as error:
            why = getattr(error, "cause", None) or error
            self._end = f"{type(why).__name__}: {first_line(why)}" if not self.ready else type(error).__name__
            return Word.DEAD
        return said

    def stop(self) -> None:
        if self.tasks and not self._end:  # nothing stays half written
            ray.wait(list(self._said), num_returns=len(self._said), timeout=SECONDS_TO_STOP)
        ray.kill(self._actor)

    @property
    def end(self) -> str:
        return self._end


def on_cluster(
    model: Denoiser, settings: Settings, tasks: Sequence[Task], device: str, workers: int | None, address: str | None
) -> Iterator[SlideLine]:
    """The lines of slides as they come, from actors that write their predictions themselves: the folder of the results
    and the slides lie where all nodes see them by the same paths.

    Args:
        model: is sent to the cluster once.
        device: "cuda" for a GPU for each actor, "cpu" for a core, "auto" for GPUs where the cluster has any.
        workers: actors; as many as the cluster has GPUs or cores when None. Those that it has no room for yet wait.
        address: of a running cluster, or "auto"; see ``ray.init``. When None, and where no cluster is joined yet, one
            is started on this machine for the time of the run.

    Raises:
        InputError: no cluster there, one with fewer GPUs or cores than ``workers``, actors that do not start, or what
            would go wrong with every slide.
    """
    joined = ray.is_initialized()
    if not joined:
        _join(address)
    try:
        yield from beside_each_other(_actors(model, settings, len(tasks), device, workers), tasks)
    finally:
        if not joined:
            ray.shutdown()


def _join(address: str | None) -> None:
    try:
        host, colon, port = (address or "").rpartition(":")
        if colon and "/" not in host:  # ray.init itself tries for minutes
            socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
        own: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"address: no Ray cluster at {address} ({first_line(error)}); see ray status") from error


def _actors(model: Denoiser, settings: Settings, n_slides: int, device: str, workers: int | None) -> list[_Remote]:
    there = ray.cluster_resources()
    kind = "GPU" if device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) >= 1) else "CPU"
    most = int(there.get(kind, 0))
    if not 1 <= (workers or 1) <= most:
        raise InputError(f"workers: the Ray cluster has {most} {kind}s, {workers or 1} are wanted")
    model = copy.deepcopy(model).cpu()
    if kind == "CPU":
        check_precision(settings.sampling.precision, model)
    options: dict[str, Any] = {"max_concurrency": 2, "num_cpus": 1, **({"num_gpus": 1} if kind == "GPU" else {})}
    actor = ray.remote(**options)(_Actor)
    start = functools.partial(actor.remote, ray.put(model), settings, os.getcwd())
    return [_Remote(start) for _ in range(min(workers or most, n_slides))]

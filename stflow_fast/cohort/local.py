"""Slides on this machine: one after another with reading and writing beside the computation, or in processes of their
own, one thread each (or one GPU each)."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch

from ..errors import OutputError
from .crew import Member
from .settings import load_model
from .state import SlideLine
from .worker import Settings, Step, Task, Worker

SECONDS_TO_STOP = 30
"""For what a process is doing when the run ends."""

SLIDES_PER_PROCESS = 4
"""So many slides are worth the seconds that a process takes to start."""


def overlapped(worker: Worker, tasks: Iterable[Task]) -> Iterator[SlideLine]:
    """The lines of slides in their order: the next one is read, and the last one written, while one is computed.

    Raises:
        OutputError: what would go wrong with every slide. What was begun before is finished.
    """
    coming, written = iter(tasks), deque[tuple[float, Future[Step]]]()

    def read_next() -> Step | None:
        task = next(coming, None)
        return None if task is None else Step(task, task).then(worker.read)

    def lines(kept: int) -> Iterator[SlideLine]:
        while len(written) > kept:
            computing, writes = written.popleft()
            yield worker.line(writes.result(), computing)

    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(1) as writing:
        coming_step = reading.submit(read_next)
        while True:
            if not coming_step.done():  # nothing is there to be computed: what is written may be told
                yield from lines(0)
            step = coming_step.result()
            if step is None:
                break
            coming_step = reading.submit(read_next)
            drawn = step.then(worker.draw)
            writes = writing.submit(drawn.then, functools.partial(worker.write, drawn.task))
            written.append((drawn.seconds - step.seconds, writes))
            yield from lines(1)
        yield from lines(0)


class Place(NamedTuple):
    """Where a process computes."""

    device: str
    threads: int | None  # of torch; None for its own choice


def places_of(device: torch.device, n_slides: int, workers: int | None, gpus: Sequence[int] | None) -> list[Place]:
    """One for each process; none where slides are to be predicted in this one.

    A GPU has one process. On a CPU there are as many as cores, where there are slides enough for them.
    """
    if gpus is not None:
        return [Place(f"cuda:{number}", None) for number in gpus]
    if device.type != "cpu":
        return []
    cores = len(os.sched_getaffinity(0))
    if workers is None:
        workers = cores if n_slides >= SLIDES_PER_PROCESS * cores else 1
    return [Place("cpu", max(1, cores // workers))] * workers if workers > 1 else []


class Process(Member):
    """A process of this machine that works for this one."""

    def __init__(self, place: Place, run: str, settings: Settings) -> None:
        super().__init__()
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._given = place, run, settings
        self.process = context.Process(target=_serve, args=(theirs, *self._given), daemon=True)
        self.process.start()
        theirs.close()

    def again(self) -> Process:
        return Process(*self._given)

    @staticmethod
    def wait(members: Sequence[Process]) -> list[Process]:
        ready = set(wait([each for member in members for each in (member.pipe, member.process.sentinel)]))
        return [member for member in members if not ready.isdisjoint((member.pipe, member.process.sentinel))]

    def send(self, task: Task) -> None:
        with contextlib.suppress(OSError):  # it died, and its end is seen next
            self.pipe.send(task)

    def receive(self) -> SlideLine | OutputError | None:
        try:
            return self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            return None

    def stop(self) -> None:
        """It removes what it has half written."""
        self.pipe.close()
        if self.tasks and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)
        self.process.join(SECONDS_TO_STOP)
        self.process.kill()
        self.process.join()

    @property
    def end(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}: out of memory?" if name == "SIGKILL" else name


def _serve(pipe: Connection, place: Place, run: str, settings: Settings) -> None:
    """A process's work: tasks from the pipe, lines back, until the pipe is closed."""
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):  # the run has ended
        try:
            worker = Worker(load_model(run, place.device), settings)
            for line in overlapped(worker, _received(pipe)):
                pipe.send(line)
        except OutputError as error:
            pipe.send(error)


def _received(pipe: Connection) -> Iterator[Task]:
    with contextlib.suppress(EOFError, OSError):  # closed: there are no more
        while True:
            yield pipe.recv()

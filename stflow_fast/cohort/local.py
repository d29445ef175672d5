"""Slides on this machine: one after another with reading and writing beside the computation, or several at once in
processes of their own, one thread each (or one GPU each)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from ..errors import OutputError
from .settings import load_model
from .state import SlideLine
from .worker import Settings, Task, Worker, failed_line

AHEAD = 2
"""Slides that a process has at a time: one is read while the other is computed."""

MOST_DEATHS = 2
"""Of processes over one slide; then it is the slide's fault."""

SECONDS_TO_STOP = 30
"""For what a process is doing when the run ends."""

SLIDES_PER_PROCESS = 4
"""So many slides are worth the seconds that a process takes to start."""


class _Step(NamedTuple):
    """How far a slide has come: what was made of it last, or the error that ended it."""

    task: Task
    made: Any
    seconds: float = 0.0
    error: Exception | None = None

    def then(self, function: Callable[[Any], Any]) -> _Step:
        """The next step, and the time it took; after an error there is none."""
        if self.error is not None:
            return self
        begun, made, failure = time.perf_counter(), None, None
        try:
            made = function(self.made)
        except Exception as error:
            failure = error
        return _Step(self.task, made, self.seconds + time.perf_counter() - begun, failure)


def overlapped(worker: Worker, tasks: Iterable[Task]) -> Iterator[SlideLine]:
    """The lines of slides in their order: the next one is read, and the last one written, while one is computed.

    Raises:
        OutputError: what would go wrong with every slide. What was begun before is finished.
    """
    coming, written = iter(tasks), deque[tuple[float, Future[_Step]]]()

    def read_next() -> _Step | None:
        task = next(coming, None)
        return None if task is None else _Step(task, task).then(worker.read)

    def lines(kept: int) -> Iterator[SlideLine]:
        while len(written) > kept:
            computing, writes = written.popleft()
            step = writes.result()
            line = step.made if step.error is None else worker.failed(step.task, step.error)
            yield dataclasses.replace(line, seconds=round(step.seconds, 3), computing=round(computing, 3))

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


class _Process:
    """A worker of its own memory, and the slides that it has; ``alone``: one slide at a time, for one may kill it."""

    def __init__(self, place: Place, run: str, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.place, self.tasks, self.alone = place, deque[Task](), False
        self.process = context.Process(target=_serve, args=(theirs, place, run, settings), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def is_ready(self) -> list[Any]:
        """What to wait for: a line, or its end."""
        return [self.pipe, self.process.sentinel]

    def give(self, task: Task) -> None:
        self.tasks.append(task)
        with contextlib.suppress(OSError):  # it died, and its end is seen next
            self.pipe.send(task)

    def take(self) -> SlideLine | None:
        """The next line; None where it has died.

        Raises:
            OutputError: that it met.
        """
        try:
            said = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            return None
        if isinstance(said, OutputError):
            raise said
        if said is not None:
            self.tasks = deque(task for task in self.tasks if task.id != said.slide)
        return said

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
        """How it died."""
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


def beside_each_other(
    places: Sequence[Place], run: str, settings: Settings, tasks: Iterable[Task]
) -> Iterator[SlideLine]:
    """The lines of slides as they come, from a process for each place. One that dies is replaced, and the slides that
    it had are tried again, alone; a slide that a process dies over twice has failed.

    Raises:
        OutputError: what would go wrong with every slide.
    """
    coming, suspects, deaths = deque(tasks), deque[Task](), Counter[str]()
    running = [_Process(place, run, settings) for place in places[: len(coming)]]
    try:
        for process in running:
            _feed(process, coming, suspects)
        while any(process.tasks for process in running):
            ready = wait([each for process in running for each in process.is_ready])
            for index, process in enumerate(running):
                if set(ready).isdisjoint(process.is_ready):
                    continue
                line = process.take()
                if line is not None:
                    yield line
                else:
                    yield from _bury(process, deaths, suspects)
                    running[index] = process = _Process(process.place, run, settings)
                _feed(process, coming, suspects)
    finally:
        for process in running:
            process.stop()


def _feed(process: _Process, coming: deque[Task], suspects: deque[Task]) -> None:
    """As many slides as it may have."""
    if process.tasks and (process.alone or suspects):
        return
    process.alone = bool(suspects)
    if process.alone:
        process.give(suspects.popleft())
    while not process.alone and coming and len(process.tasks) < AHEAD:
        process.give(coming.popleft())


def _bury(process: _Process, deaths: Counter[str], suspects: deque[Task]) -> Iterator[SlideLine]:
    """What becomes of the slides of a process that has died."""
    tasks = process.tasks
    if len(tasks) == 1:
        deaths[tasks[0].id] += 1
    for task in tasks:
        if deaths[task.id] >= MOST_DEATHS:
            yield failed_line(task, f"{task.slide.path}: the process that predicted it died ({process.end})")
        else:
            suspects.append(dataclasses.replace(task, attempts=task.attempts + 1))
    tasks.clear()
    process.stop()

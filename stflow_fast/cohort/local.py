"""Slides on this machine: one after another with reading and writing beside the computation, or in processes of their
own, one thread each (or one GPU each)."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NamedTuple

import torch

from ..errors import InputError, as_input_error
from .crew import Member, Word
from .settings import load_model
from .state import SlideLine
from .worker import Settings, Step, Task, Worker

SECONDS_TO_STOP = 30

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
    """A process of this machine that works for this one, and ends with it.

    It is a program of its own: what ``multiprocessing`` starts would run a script that calls ``predict`` once more.
    """

    def __init__(self, place: Place, run: str, settings: Settings) -> None:
        super().__init__()
        self._given = place, run, settings
        self.pipe, theirs = Pipe()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-c", f"from {__name__} import serve; serve({number})"]
            # A session of its own: what a terminal interrupts is this process, which then ends it.
            self._process = subprocess.Popen(
                command, pass_fds=[number], stdin=subprocess.DEVNULL, env=_same_modules(), start_new_session=True
            )
        self.send(self._given)

    def again(self) -> Process:
        return Process(*self._given)

    @classmethod
    def wait(cls, members: Sequence[Process]) -> list[Process]:
        ready = wait([member.pipe for member in members])
        return [member for member in members if member.pipe in ready]

    def send(self, task: Any) -> None:
        with contextlib.suppress(OSError):  # it died, and its end is seen next
            self.pipe.send(task)

    def receive(self) -> SlideLine | InputError | Word:
        try:
            said: SlideLine | InputError | Word = self.pipe.recv()
        except (EOFError, OSError):
            return Word.DEAD
        return said

    def stop(self) -> None:
        self.pipe.close()  # by which it ends, whatever it is doing
        try:
            self._process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def end(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"{name}: out of memory?" if name == "SIGKILL" else name


def _same_modules() -> dict[str, str]:
    """The environment of a process that finds the modules that this one does."""
    paths = [os.environ.get("PYTHONPATH", ""), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def serve(number: int) -> None:
    """A process's work, by the file descriptor of its pipe: where and by what, then tasks; lines back."""
    pipe, received = Connection(number), queue.SimpleQueue[Any]()
    threading.Thread(target=_receive, args=(pipe, received), daemon=True).start()
    place, run, settings = received.get()
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    with contextlib.suppress(BrokenPipeError):  # see _receive
        try:
            worker = Worker(load_model(run, place.device), settings)
            pipe.send(Word.READY)
            for line in overlapped(worker, iter(received.get, None)):
                pipe.send(line)
        except BrokenPipeError:
            raise
        except InputError as error:
            pipe.send(error)
        except Exception as error:  # what is no slide's, the next process would meet too
            pipe.send(InputError(f"{place.device}: a process cannot go on ({as_input_error(error)})"))


def _receive(pipe: Connection, received: queue.SimpleQueue[Any]) -> None:
    """Until the pipe is closed: then the run is over, and this process too, with what it has half done. Who started it
    may be gone, and another run be writing there."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            received.put(pipe.recv())
    os._exit(0)

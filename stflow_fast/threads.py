"""Threads of the CPU path: they take blocks of spots in turn, and no operation of a block is split.

torch splits every operation over its intra-op threads and ends it by a barrier. Beside another busy program a barrier
waits for the thread that was pushed off its core, some sixty times a layer: a sample took 40 times as long. Blocks are
independent within a layer, so here each is computed by one thread with one intra-op thread, and a layer has as many
barriers as it has passes over the spots. They are as many as torch would use; with one, all stays in the caller's.

Blocks have fixed bounds and sums over blocks a fixed order, so the number of threads changes no bit of a result: of a
forward, and of a whole step where backward and optimiser are inside :func:`spread` too, as those of ``fit`` are.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Block = TypeVar("Block")
Made = TypeVar("Made")

_local = threading.local()
_leaving: set[int] = set()  # system ids of threads that ended for Python, and perhaps not yet for the system


def thread_count() -> int:
    """Threads that blocks of the calling thread are spread over: its intra-op threads, ``torch.get_num_threads()``."""
    crew = _present_crew()
    return torch.get_num_threads() if crew is None else crew.size


def blocks_of(n: int, size: int) -> list[slice]:
    """Slices of ``size`` that cover 0 to ``n``."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


@contextlib.contextmanager
def spread(device: torch.device) -> Iterator[None]:
    """Inside, all calls of :func:`in_turn` share threads that are made once, and no operation of the caller is split.

    Not where the device is no CPU. Nothing of it is left afterwards: the threads have ended, and torch's numbers of
    threads are as they were.
    """
    size = torch.get_num_threads()
    if size == 1 or device.type != "cpu" or _present_crew() is not None or _thread_is_watched():
        yield
        return
    _local.crew = crew = _Crew(size)
    try:
        _split_no_operation(size)
        yield
    finally:
        _local.crew = None
        try:
            crew.close()
        finally:
            torch.set_num_threads(size)


def in_turn(
    task: Callable[[Block], Any],
    blocks: Sequence[Block],
    device: torch.device,
    then: Callable[[Any], None] | None = None,
) -> None:
    """``task(block)`` for all blocks, by several threads, each taking the next block when it is free.

    Args:
        task: writes to memory of its own block alone. Gradient mode, inference mode, autocast and context variables are
            the caller's.
        blocks: what a task works on.
        device: of their tensors; where it is not the CPU, one block comes after the other in the caller's thread.
        then: receives what tasks return, one at a time and in the order of the blocks.

    An error in a block is raised here, as is an interrupt, once no thread works on a block any more; blocks that were
    not begun by then are left out.
    """
    with spread(device):
        crew, job = _present_crew(), _Job(task, blocks, then)
        _local.crew = None  # what a task itself calls stays in its thread
        try:
            if crew is not None and len(blocks) > 1:
                crew.call(job)
            job.work()
        finally:
            _local.crew = crew
            job.end()


def ahead(task: Callable[[Block], Made], blocks: Sequence[Block], device: torch.device) -> Generator[Made, None, None]:
    """``task(block)`` of one block after another, made by a thread of its own while the caller works on ``device`` with
    the one before. With one thread all stays in the caller's. To be closed where it is left before its end.
    Unlike :func:`in_turn`, the thread has modes (gradients, autocast) of its own."""
    others = thread_count()
    if others == 1 or len(blocks) < 2 or _thread_is_watched():
        yield from map(task, blocks)
        return
    begun: list[int] = []

    def begin() -> None:
        begun.append(threading.get_native_id())
        if device.type == "cpu":  # the caller's threads have its cores already
            _split_no_operation(others)

    try:
        with ThreadPoolExecutor(1, "stflow-fast-ahead", begin) as maker:
            coming = maker.submit(task, blocks[0])
            for block in blocks[1:]:
                made, coming = coming.result(), maker.submit(task, block)
                yield made
            yield coming.result()
    finally:
        _are_leaving(begun)


def _present_crew() -> _Crew | None:
    """None in a process that was forked inside :func:`spread`: the threads are its parent's."""
    crew = getattr(_local, "crew", None)
    return crew if crew is not None and crew.process == os.getpid() else None


def _thread_is_watched() -> bool:
    """By what belongs to its thread, and would not see the operations of others: a dispatch mode (a counter of
    operations, say), or hooks on saved tensors (``torch.utils.checkpoint``, ``save_on_cpu``)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return _get_current_dispatch_mode() is not None or hooks is not None


def _split_no_operation(others: int) -> None:
    """One intra-op thread for the calling thread; as many as before for threads that begin to compute later.

    ``torch.set_num_threads`` sets both, and the second is the last caller's, whichever thread that is.
    """
    torch.get_num_threads()  # a thread takes over the second when it first computes, which must be behind it
    torch.set_num_threads(1)
    last = threading.Thread(target=torch.set_num_threads, args=(others,))
    last.start()
    last.join()


class _Job:
    """The blocks of one call of :func:`in_turn`."""

    def __init__(self, task: Callable[[Any], Any], blocks: Sequence[Any], then: Callable[[Any], None] | None) -> None:
        self._task, self._blocks, self._then = task, blocks, then
        self._begun = self._received = 0
        self._results: dict[int, Any] = {}
        self._counting, self._receiving = threading.Lock(), threading.Lock()
        self._helpers: list[threading.Event] = []
        self._error: BaseException | None = None

    def work(self) -> None:
        """Take blocks until none is left, or one has failed."""
        try:
            while self._error is None and (index := self._take()) < len(self._blocks):
                result = self._task(self._blocks[index])
                if self._then is not None:
                    self._receive(index, result, self._then)
        except BaseException as error:
            self._error = self._error or error

    def helper(self) -> Callable[[], None]:
        """:meth:`work` for another thread, in the circumstances of this one."""
        inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        context, ended = contextvars.copy_context(), threading.Event()
        self._helpers.append(ended)

        def work() -> None:
            try:
                with (
                    torch.inference_mode(inference),
                    torch.set_grad_enabled(gradients),
                    torch.autocast("cpu", dtype=dtype, enabled=enabled),
                ):
                    context.run(self.work)
            finally:
                ended.set()

        return work

    def end(self) -> None:
        """Wait for the helpers, also where the wait is interrupted: they write to the caller's memory."""
        for ended in self._helpers:
            while not ended.is_set():
                try:
                    ended.wait()
                except BaseException as interrupt:
                    self._error = self._error or interrupt
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame

    def _take(self) -> int:
        with self._counting:
            self._begun += 1
            return self._begun - 1

    def _receive(self, index: int, result: Any, then: Callable[[Any], None]) -> None:
        with self._receiving:
            self._results[index] = result
            while self._received in self._results:
                then(self._results.pop(self._received))
                self._received += 1


class _Crew:
    """Threads that wait for jobs beside the one that opened it; they begin with the first."""

    def __init__(self, size: int) -> None:
        self.size, self.process = size, os.getpid()
        self._threads: list[threading.Thread] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def call(self, job: _Job) -> None:
        if not self._threads:
            self._begin()
        for _ in self._threads:
            self._jobs.put(job.helper())

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        _are_leaving([thread.native_id for thread in self._threads if thread.native_id is not None])

    def _begin(self) -> None:
        for index in range(1, self.size):
            thread = threading.Thread(target=self._serve, name=f"stflow-fast-{index}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self) -> None:
        _split_no_operation(self.size)
        while (work := self._jobs.get()) is not None:
            work()
            del work  # it holds the caller's tensors


def _are_leaving(threads: Sequence[int]) -> None:
    _leaving.difference_update([leaving for leaving in tuple(_leaving) if not _is_alive(leaving)])
    _leaving.update(threads)


def _is_alive(thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{thread}")


def _let_them_leave() -> None:
    """Before a fork: wait until the system has ended the threads that were joined.

    Python's ``join`` returns earlier. While such a thread gives its buffers back it holds a lock of MKL's, which a fork
    copies as held: one of seven forked processes hung in its first product, where the fork followed a sample.
    """
    patience = time.monotonic() + 1.0
    while any(map(_is_alive, tuple(_leaving))) and time.monotonic() < patience:
        time.sleep(1e-4)
    _leaving.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_let_them_leave)

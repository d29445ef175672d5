"""The refinement loop of a slide as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops


class Captured:
    """The refinement loop of a slide as a CUDA graph: the first call runs it, the second captures it, and from then on
    it is replayed. A call under another backend or precision, or after one that failed, is a first call again.

    The whole loop, because a denoiser call on 10,000 spots is some hundred launches of a few microseconds each, with
    those of an Euler step behind it, and a replay of all of them is one. From the second call on, because a capture
    wants a run before it, on its stream, that compiles the kernels and sets up the libraries: what they allocate and
    load while they do so cannot be captured. The first draw is that run, and slides that are drawn once, as those of a
    cohort are, pay neither for a capture nor for a graph's memory.
    """

    def __init__(self, loop: Callable[[Tensor], Tensor], stream: torch.cuda.Stream) -> None:
        """
        Args:
            loop: what the network reads of x_0, [N, .] on the current GPU, to the sample [N, G], without ever waiting
                for the GPU; it overwrites what it reads.
            stream: of that GPU; where the loop first runs, and is captured.
        """
        self._loop, self._stream = loop, stream
        self._known: tuple[object, ...] | None = None
        self._replay: _Replay | None = None

    def __call__(self, terms: Tensor) -> Tensor:
        """What the loop reads to the sample [N, G], which is good until the next call: a replay overwrites it."""
        circumstances = ops.circumstances(terms.device)
        known, self._known = self._known, None  # until this call has succeeded
        if circumstances != known:
            self._replay = None
            x_1 = self._run(terms)
        else:
            if self._replay is None:
                self._replay = self._capture(terms)
            x_1 = self._replay(terms)
        self._known = circumstances
        return x_1

    def _run(self, terms: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                x_1 = self._loop(terms)
        finally:  # what a failed loop has launched still reads memory of the current stream
            current.wait_stream(self._stream)
        x_1.record_stream(current)
        return x_1

    def _capture(self, terms: Tensor) -> _Replay:
        graph = torch.cuda.CUDAGraph()
        with (
            _without_autocast_cache(),
            _workspaces_of_its_own(),
            torch.cuda.stream(torch.cuda.current_stream()),  # restored also where a capture fails as it ends
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            x_1 = self._loop(terms)
        return _Replay(graph, terms, x_1)


class _Replay(NamedTuple):
    """A captured loop, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    terms: Tensor
    x_1: Tensor

    def __call__(self, terms: Tensor) -> Tensor:
        self.terms.copy_(terms)  # nothing, of those that were captured with
        self.graph.replay()
        return self.x_1


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast keeps weights that it has cast until it is left; a graph captured with them would then read memory that
    was freed. Without the cache the casts are part of the graph."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """cuBLAS works in memory that torch keeps for each stream, and frees when a graph captured on the stream is
    destroyed, also under other graphs that use it (pytorch issue 193402). So a capture finds none: what it then gets
    lies in the graph's own memory. Nor does it leave any to a stream's next user, who may outlive the graph."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()

"""A stand-in for CUDA's streams and graphs on the CPU: a capture keeps operations, and a replay runs them again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Stream:
    def __init__(self) -> None:
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)


class Graph:
    """What its operations make stays in one place, as in the memory of a CUDA graph."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, places in self.operations:
            for place, made in zip(places, _tensors(function(*args, **kwargs)), strict=True):
                place.copy_(made)  # onto itself where it is a view, or was written in place


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert function is not torch.ops.aten._local_scalar_dense.default, "a capture cannot wait for the device"
        kwargs = kwargs or {}
        before = [(written, written.clone()) for written in _written(function, args, kwargs)]
        made = function(*args, **kwargs)
        for written, value in before:
            written.copy_(value)
        places, given = _tensors(made), {_memory(tensor) for tensor in _tensors((args, kwargs))}
        for place in places:
            if place.is_floating_point() and _memory(place) not in given:
                place.fill_(torch.nan)  # a capture computes nothing
        self.graph.operations.append((function, args, kwargs, places))
        return made


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """What an operation writes to of what it is given: a capture computes nothing, and leaves it as it was."""
    named = dict(zip((each.name for each in function._schema.arguments), args, strict=False)) | kwargs
    write = [each.name for each in function._schema.arguments if each.alias_info and each.alias_info.is_write]
    return _tensors([named.get(name) for name in write])


class StandIn:
    """Takes the place of what ``torch.cuda`` has for streams and graphs.

    Attributes:
        streams: on which anything ran or was captured, in turn.
        workspaces: streams that cuBLAS has memory for.
        graphs: that were captured.
        fails: whether captures run out of memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: list[Stream] = []
        self.workspaces: set[Stream] = set()
        self.graphs: list[Graph] = []
        self.fails = False
        self._current = current = Stream()
        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "current_stream": lambda: current,
            "stream": self._on,
            "graph": self._capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(Tensor, "cpu", Tensor.clone)  # as from another device, never the same memory
        # A torch built for the CPU has none.
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", self.workspaces.clear, raising=False)

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        if stream is not self._current:
            self.streams.append(stream)
            self.workspaces.add(stream)
        yield

    @contextlib.contextmanager
    def _capture(self, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "what other threads do would make it fail"
        assert not torch.is_autocast_cache_enabled(), "a replay would read cast weights that are gone"
        assert stream not in self.workspaces, "a replay would use memory that is not the graph's"
        with self._on(stream), _Recorder(graph):
            yield
        if self.fails:
            raise torch.OutOfMemoryError
        self.graphs.append(graph)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

"""What calls of the padded encoder share: a sampling loop calls it with the same coordinates again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import SpotGraph

CALLS_BUDGET = "1GiB"
"""What an encoder may keep between calls by default: graph and messages of 120,000 spots by the default model."""

MOST_SLIDES = 4
"""Graphs that are kept at most, for loops that go over some slides in turn."""


class _Messages(NamedTuple):
    tensors: list[Tensor | None]
    weights: list[Tensor]  # copies
    circumstances: Hashable

    def are(self, weights: list[Tensor], circumstances: Hashable) -> bool:
        return circumstances == self.circumstances and all(map(_equal, weights, self.weights))


@dataclass
class _Slides:
    """Packed slides of one call."""

    coords: Tensor  # [B, N, 2], a copy
    real: Tensor  # [B, N]
    built_for: Hashable
    graph: SpotGraph
    messages: _Messages | None = None

    def are(self, coords: Tensor, real: Tensor, built_for: Hashable) -> bool:
        return built_for == self.built_for and _equal(real, self.real) and _equal(coords, self.coords)

    def bytes(self) -> int:
        messages = () if self.messages is None else (*self.messages.tensors, *self.messages.weights)
        arriving = vars(self.graph).get("arriving", ())
        fields = (getattr(self.graph, name) for name in self.graph.__dataclass_fields__)
        tensors = (*fields, *arriving, self.coords, self.real, *messages)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class KnownSlides:
    """The graphs of the last calls, found again by equal coordinates, and the edge messages of the last one, by equal
    weights. Values are compared, for ``tensor.data`` changes them behind torch's version counters.

    A copy of it, or of the module that holds it, knows none.
    """

    def __init__(self, budget: int) -> None:
        """
        Args:
            budget: bytes that all may take; the last graph is kept in any case.
        """
        self.budget = budget
        self._slides: list[_Slides] = []  # the last one first

    def graph(self, coords: Tensor, real: Tensor, built_for: Hashable, build: Callable[[], SpotGraph]) -> SpotGraph:
        """The graph of the ``real`` [B, N] spots at ``coords`` [B, N, 2], by ``build`` where it is not known.

        ``built_for`` is what it depends on beside them.
        """
        found = next((slides for slides in self._slides if slides.are(coords, real, built_for)), None)
        if found is None:
            # Training may come upon what was made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                found = _Slides(coords.clone(), real.clone(), built_for, build())
        others = [slides for slides in self._slides if slides is not found]
        kept, left = [found], self.budget - found.bytes()
        for slides in others[: MOST_SLIDES - 1]:
            slides.messages = None
            left -= slides.bytes()
            if left >= 0:
                kept.append(slides)
        self._slides = kept
        return found.graph

    def messages(
        self,
        graph: SpotGraph,
        weights: list[Tensor],
        circumstances: Hashable,
        make: Callable[[int], list[Tensor | None]],
    ) -> list[Tensor | None]:
        """Messages of a graph, by ``make(bytes that they may take)`` where they are not known.

        They depend on ``weights`` and ``circumstances`` beside the graph.
        """
        slides = next((slides for slides in self._slides if slides.graph is graph), None)
        if slides is None:  # another thread's calls have displaced it
            return make(0)
        messages = slides.messages
        if messages is None or not messages.are(weights, circumstances):
            slides.messages = None
            taken = sum(each.bytes() for each in self._slides)
            kept = [weight.detach().clone() for weight in weights]
            slides.messages = messages = _Messages(make(self.budget - taken), kept, circumstances)
        return messages.tensors

    def __deepcopy__(self, memo: dict[int, object]) -> KnownSlides:
        return KnownSlides(self.budget)

    def __reduce__(self) -> tuple[type[KnownSlides], tuple[int]]:
        return KnownSlides, (self.budget,)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

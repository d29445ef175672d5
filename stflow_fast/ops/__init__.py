"""The operations of the model and the choice of what runs them.

``reference.py`` defines each operation; :func:`edge_attention` runs it over blocks of spots, so that what is live is
O(N * d) and one block, whatever the slide's size.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import InputError
from ..kernels.conventions import context_padding
from .dropout import DropoutKeys
from .reference import (
    AttentionSpec,
    Dropouts,
    EdgeWeights,
    attend,
    attend_block,
    edge_messages,
)

BLOCK_BYTES = 8 * 2**20
"""Live bytes of one block of spots: a block near a core's cache (2 MiB of L2) beats a larger one. Default model, one
thread, 4 denoiser calls, microseconds per spot of the whole sample (least of 3): 564 at 1 MiB, 535 at 2, 520 at 4, 506
at 8, 542 at 16, 577 at 32."""

TRAINING_BLOCK_BYTES = 128 * 2**20
"""The same with gradients, where a second block means that every block is computed twice. A window of a few hundred
spots stays whole: a step takes a sixth less time than with blocks of 8 MiB."""

ROW_BLOCK = 1024
"""Spots in a block of what treats every spot alone, so that its temporaries stay in a core's cache. 10,000 spots, two
threads: 2.76 s whole, 2.44 in blocks of 512, 2.37 of 1024, 2.38 of 2048."""

COMPILED_BLOCK = 512
"""Spots in a block of the compiled path: one shape for every slide, so one compilation per configuration.

Microseconds per spot as above: 350 at 128 spots, 359 at 256, 381 at 512, 372 at 1024, 636 at 2048, on a machine whose
load moves them by a tenth."""

COMPILE_FROM_SPOTS = 200_000
"""Compiled blocks save 0.1 ms per spot with one thread (4.4 s against 3.4 s for 10,000 spots), and compiling takes some
20 s. With two threads they save nothing (2.4 s both): inductor's loops take 0.47 s with one thread, 0.66 with two."""

_compile_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("stflow_compile", default=None)


class Backend(NamedTuple):
    name: str
    reason: str


def backend_for(device: torch.device | str, n_spots: int = COMPILE_FROM_SPOTS) -> Backend:
    """What runs the edge operations without gradients for a slide of ``n_spots`` on ``device``, and why.

    Raises:
        InputError: STFLOW_COMPILE=on cannot be served.
    """
    mode = _compile_mode.get() or _checked_mode(os.environ.get("STFLOW_COMPILE", "auto"))
    on_cpu, compiler = torch.device(device).type == "cpu", cpp_compiler()
    if mode == "on" and not (on_cpu and compiler):
        lacks = "there is no C++ compiler (g++ or clang++)" if on_cpu else f"it compiles for the CPU, not for {device}"
        raise InputError(f"STFLOW_COMPILE: is on, but {lacks}; set it to auto or off")
    if not on_cpu:
        return Backend("reference", "plain torch; this version has no GPU kernels")
    if mode == "off":
        return Backend("reference", "plain torch; STFLOW_COMPILE=off")
    if compiler is None:
        return Backend("reference", "plain torch; no C++ compiler (g++ or clang++) for torch.compile")
    if mode == "auto" and torch.get_num_threads() > 1:
        return Backend("reference", "plain torch; with several threads torch.compile was measured to gain nothing")
    if mode == "auto" and n_spots < COMPILE_FROM_SPOTS:
        return Backend("reference", f"plain torch; compiling pays from {COMPILE_FROM_SPOTS} spots")
    when = "" if mode == "on" else f", for slides from {COMPILE_FROM_SPOTS:,} spots"
    return Backend("reference_compiled", f"torch.compile with {compiler}{when}")


@functools.cache
def _announce(backend: Backend) -> None:
    """Say once what runs."""
    logging.getLogger(__name__).info("edge attention by %s: %s", backend.name, backend.reason)


@contextlib.contextmanager
def use_compile(mode: str) -> Iterator[None]:
    """Choose how the CPU runs inference: ``auto`` (compiled for large slides where there is one thread), ``on``
    or ``off``. The choice is logged once, at level INFO.

    The environment variable ``STFLOW_COMPILE`` sets the same for a process. Training is never compiled, and neither
    are slides smaller than a compiled block (:data:`COMPILED_BLOCK` spots).

    Raises:
        InputError: another mode; in the computation, ``on`` where nothing can be compiled.
    """
    token = _compile_mode.set(_checked_mode(mode))
    try:
        yield
    finally:
        _compile_mode.reset(token)


def _checked_mode(mode: str) -> str:
    if mode not in ("auto", "on", "off"):
        raise InputError(f"STFLOW_COMPILE: must be auto, on or off, not {mode!r}")
    return mode


@functools.cache
def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call, or None."""
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True)


def by_rows(
    function: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], keys: DropoutKeys | None
) -> tuple[Tensor, ...]:
    """``function(*inputs, keys)``, which treats every row (spot) alone; on the CPU without gradients, rows in blocks.

    Args:
        inputs: tensors [N, ...].
        keys: [N] of the rows, or None.

    Returns:
        The function's tensors [N, ...].
    """
    n = len(inputs[0])
    if torch.is_grad_enabled() or inputs[0].device.type != "cpu" or n <= ROW_BLOCK:
        return function(*inputs, keys)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, n, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, n)
        parts = function(*(values[start:stop] for values in inputs), None if keys is None else keys.rows(start, stop))
        outputs = outputs or tuple(part.new_empty(n, *part.shape[1:]) for part in parts)
        for whole, part in zip(outputs, parts, strict=True):
            whole[start:stop] = part
    return outputs


def message_bytes(n_spots: int, k: int, weights: EdgeWeights) -> int:
    """Bytes of the messages of one layer, should a caller keep them."""
    return n_spots * k * weights.message_to_logit.shape[0] * weights.message_to_logit.element_size()


def make_messages(geometry: Tensor, weights: EdgeWeights, spec: AttentionSpec) -> Tensor:
    """All messages m_ij [N, K, E] of one layer, to be kept over several flow steps; without gradients or dropout."""
    n, k = geometry.shape[:2]
    messages = geometry.new_empty(n, k, weights.message_to_logit.shape[0])
    function, blocks = _plan(n, k, weights, edge_messages, geometry.device)
    for start, stop in blocks:
        messages[start:stop] = function(geometry[start:stop], weights, spec, Dropouts(None, 0.0, 0.0))
    return messages


def edge_attention(
    terms: Tensor,
    neighbors: Tensor,
    edges: Tensor,
    weights: EdgeWeights,
    spec: AttentionSpec,
    dropouts: Dropouts,
    edges_are_messages: bool = False,
) -> Tensor:
    """Attention of every spot over its neighbours, block after block.

    Args:
        terms: [N, 2 * H * P + d], see ``reference.py``.
        neighbors: [N, K] int64, MISSING where there is none.
        edges: [N, K, 3] geometry, or [N, K, E] messages of :func:`make_messages`.

    Returns:
        context [N, C]. With gradients and more than one block, blocks are recomputed in the backward.
    """
    n, k = neighbors.shape
    n_messages, width = weights.message_to_logit.shape
    function = attend if edges_are_messages else attend_block
    training = torch.is_grad_enabled() and terms.requires_grad
    function, blocks = _plan(n, k, weights, function, terms.device, training)

    def run(start: int, stop: int) -> Tensor:
        rows = slice(start, stop)
        query, part = terms[rows, :width], dropouts.rows(start, stop)
        return function(query, terms, neighbors[rows], edges[rows], weights, spec, part)

    if len(blocks) == 1:
        return run(*blocks[0])
    if training and blocks:
        return torch.cat([checkpoint(run, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks])
    columns = terms.shape[1] - 2 * width + spec.n_heads * (n_messages + 1)
    context = terms.new_empty(n, columns + context_padding(columns))
    for start, stop in blocks:
        context[start:stop] = run(start, stop)
    return context


def _plan(
    n: int, k: int, weights: EdgeWeights, function: Callable, device: torch.device, training: bool = False
) -> tuple[Callable, list[tuple[int, int]]]:
    """The function that runs a block, and the blocks that cover 0..n.

    Compiled blocks all have one size, so the last one overlaps the one before; both write the same numbers.
    """
    if not training:
        backend = backend_for(device, n)
        _announce(backend)
        if n >= COMPILED_BLOCK and backend.name == "reference_compiled":
            starts = [*list(range(0, n - COMPILED_BLOCK, COMPILED_BLOCK)), n - COMPILED_BLOCK]
            return _compiled(function), [(start, start + COMPILED_BLOCK) for start in starts]
    per_spot = 3 * k * weights.message_to_logit.shape[1] * weights.message_to_logit.element_size()
    size = max(1, (TRAINING_BLOCK_BYTES if training else BLOCK_BYTES) // per_spot)
    return function, [(start, min(start + size, n)) for start in range(0, n, size)]

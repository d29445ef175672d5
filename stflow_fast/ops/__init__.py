"""The operations of the model and the choice of what runs them.

``reference.py`` defines each operation. On a GPU ``stflow_fast.kernels`` run it; else plain torch does, over blocks
of spots, so that what is live is O(N * d) and one block, whatever the slide's size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..graph import SpotGraph
from ..kernels.conventions import MOST_HEAD_COLUMNS, Settings, Sizes, context_padding
from ..threads import blocks_of, in_turn
from . import reference
from .backend import (
    Backend,
    EdgeWork,
    Workload,
    announce,
    autocast_dtype,
    backend_for,
    circumstances,
    cpp_compiler,
    use_backend,
    use_compile,
)
from .blocks import Blocks, Gathered, Part, Reading, present_precision, rows_read
from .dropout import DropoutKeys, dropout
from .reference import AttentionSpec, Dropouts, EdgeWeights, MLPWeights, attend, attend_block, edge_messages

__all__ = [
    "Backend",
    "Gathered",
    "Workload",
    "apply_dropout",
    "autocast_dtype",
    "backend_for",
    "build_graph",
    "by_rows",
    "circumstances",
    "cpp_compiler",
    "edge_attention",
    "gated_mlp",
    "gelu_norm",
    "gene_head",
    "joined_norm",
    "make_messages",
    "message_bytes",
    "on_triton",
    "present_precision",
    "residual",
    "use_backend",
    "use_compile",
    "weights_of_autocast",
]

BLOCK_BYTES = 8 * 2**20
"""Live bytes of one block of spots: near a core's cache (2 MiB of L2), and long enough that Python's share, for which
threads wait for each other, stays small. Default model, seconds of a prepared sample of 10,000 spots, one thread and
two: 3.59 and 2.28 at 4 MiB, 3.51 and 1.94 at 8, 3.70 and 1.92 at 16, 3.54 and 2.01 at 24."""

KEPT_BYTES = 128 * 2**20
"""Live bytes up to which no backward of a training step computes the slide's blocks again. For 10,000 spots that would
save a sixth of the time, and take 5.5 GB where it is 1.4."""

TRAINED_BLOCK_BYTES = 16 * 2**20
"""Live bytes of one block with gradients. Seconds of CPU per step of 6,000 spots, one thread: 8.1 at 2 MiB, 6.6 at 4,
6.1 at 8, 6.0 at 16."""

ROW_BLOCK = 1024
"""Spots in a block of what treats every spot alone. As above, two threads: 2.00 s by 512, 1.94 by 1024, 2.06 by
2048."""

COMPILED_BLOCK = 512
"""Spots in a block of the compiled path: one shape for every slide, so one compilation per configuration.

Microseconds per spot as above: 350 at 128 spots, 359 at 256, 381 at 512, 372 at 1024, 636 at 2048, on a machine whose
load moves them by a tenth."""


TRAINED_BY = ("edge_attention_fwd", "edge_attention_bwd_query", "edge_attention_bwd_key")
"""The kernels of an attention; without gradients it is the first alone."""


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # By C++ as a whole, which frees the interpreter's lock: else fused loops of several threads wait for each other (a
    # sample of 10,000 spots and its preparation, two threads: 2.1 s, and 2.5).
    return torch.compile(function, fullgraph=True, options={"cpp.threads": 1, "cpp_wrapper": True})


def by_rows(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    weights: tuple[Tensor | None, ...],
    keys: DropoutKeys | None,
    into: Gathered | None = None,
) -> tuple[Tensor, ...]:
    """``function(*inputs, weights, keys)``, which treats every row (spot) alone; on the CPU, rows in blocks.

    Args:
        function: reads tensors that need gradients as its arguments alone.
        inputs: tensors [N, ...].
        weights: what all rows share.
        keys: [N] of the rows, or None.
        into: of an earlier call whose results nobody reads any more: without gradients, memory for those of this one.
            ``function`` then takes ``out``, the rows of that memory to write to or None.

    Returns:
        The function's tensors [N, ...].
    """
    n, device = len(inputs[0]), inputs[0].device
    if device.type != "cpu" or n == 0 or on_triton(inputs[0]):  # Triton's interpreter is for one thread
        return function(*inputs, weights, keys)

    def run(rows: slice, *tensors: Tensor | None, **out: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        part = None if keys is None else keys.rows(rows.start, rows.stop)
        return function(*tensors[: len(inputs)], tensors[len(inputs) :], part, **out)

    blocks = blocks_of(n, ROW_BLOCK)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, *weights)):

        def reading(rows: slice) -> Reading:
            parts = [Part(index, rows if index < len(inputs) else ...) for index in range(len(inputs) + len(weights))]
            return Reading(parts, functools.partial(run, rows))

        apply: Callable[..., tuple[Tensor, ...]] = Blocks.apply  # which torch leaves untyped
        return apply(reading, blocks, True, *inputs, *weights)
    gathered = into or Gathered(n)

    def compute(rows: slice) -> None:
        out = {} if into is None else {"out": into.rows(rows)}
        gathered.put(rows, run(rows, *(x[rows] for x in inputs), *weights, **out))

    in_turn(compute, blocks, device)
    return gathered.tensors


def build_graph(
    coords: Tensor | np.ndarray,
    k: int,
    slide_ptr: Tensor | np.ndarray | None,
    dtype: torch.dtype,
    device: torch.device,
) -> SpotGraph:
    """:meth:`SpotGraph.build` on ``device``, neighbours by the kernel, or else by the k-d tree."""
    if backend_for(Workload(device, k=k)).name != "triton":
        return SpotGraph.build(coords, k, slide_ptr, dtype).to(device)
    from ..kernels.neighbors import nearest

    return SpotGraph.build(coords, k, slide_ptr, dtype, device, nearest)


def apply_dropout(x: Tensor, p: float, keys: DropoutKeys | None, stream: int) -> Tensor:
    """Inverted dropout of x [N, .]; x itself without keys."""
    if keys is None or p == 0.0 or not on_triton(x):
        return dropout(x, p, keys, stream)
    from ..kernels.dropout import dropout as kernel

    return kernel(x, keys.keys, p, stream)


def gated_mlp(
    x: Tensor, weights: MLPWeights, activation: str, p: float, keys: DropoutKeys | None, stream: int
) -> Tensor:
    """fc2(LayerNorm(dropout(gate(fc1(x))))), see ``reference.py``: [N, in] -> [N, out]."""
    if not on_triton(x):
        return reference.gated_mlp(x, weights, activation, p, keys, stream)
    from ..kernels.gated_mlp import gated_mlp as kernel

    return kernel(x, weights, activation, p, None if keys is None else keys.keys, stream)


def residual(tokens: Tensor, update: Tensor, p: float, keys: DropoutKeys | None, stream: int) -> tuple[Tensor, Tensor]:
    """tokens + dropout(update) [N, d], see ``reference.py``, and the same for the products that read it: by a kernel in
    the type of autocast. Without gradients and dropout the kernel writes over ``tokens``."""
    if not on_triton(tokens):
        total = reference.residual(tokens, update, p, keys, stream)
        return total, total
    from ..kernels import residual as kernels

    dtype = autocast_dtype(tokens.device) or tokens.dtype
    if torch.is_grad_enabled() or (keys is not None and p > 0):
        return kernels.residual(tokens, update, None if keys is None else keys.keys, dtype, p, stream)
    return tokens, kernels.residual_(tokens, update, dtype)


def gelu_norm(pre: Tensor, affine: tuple[Tensor, Tensor]) -> Tensor:
    """LayerNorm(gelu(pre)), see ``reference.py``; by the gate's kernel in the type of pre."""
    if not on_triton(pre):
        return reference.gelu_norm(pre, affine)
    from ..kernels.gated_mlp import gelu_norm as kernel

    return kernel(pre, *affine)


def gene_head(
    pre: Tensor, affine: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor], total: Tensor, relu: bool
) -> Tensor:
    """Expression [N, G] of pre [N, d], added to ``total`` in place, see ``reference.py``; without gradients. Beyond
    MOST_HEAD_COLUMNS by plain torch."""
    if not on_triton(pre) or pre.shape[1] > MOST_HEAD_COLUMNS:
        return reference.gene_head(pre, affine, head, total, relu)
    from ..kernels.gene_head import gene_head as kernel

    weight, bias = (each.to(pre.dtype) for each in head)  # as autocast would
    return kernel(pre, affine, (weight, bias), total, relu)


def joined_norm(tokens: Tensor, x: Tensor, columns: int) -> Tensor:
    """[LayerNorm(tokens) | x | 0] [N, columns], see ``reference.py``; by a kernel in the type of autocast."""
    if not on_triton(tokens):
        return reference.joined_norm(tokens, x, columns)
    from ..kernels.joined_norm import joined_norm as kernel

    return kernel(tokens, x.contiguous(), columns, autocast_dtype(tokens.device) or tokens.dtype)


def weights_of_autocast(weights: MLPWeights, dtype: torch.dtype) -> MLPWeights:
    """The weights as :func:`gated_mlp` casts them under the present autocast, of ``dtype``: given these it gives the
    same bits and casts none. Plain torch leaves the LayerNorm's as they are."""
    cast = MLPWeights(*(weight.to(dtype) for weight in weights))
    if on_triton(weights.fc1_weight):
        return cast
    return cast._replace(norm_weight=weights.norm_weight, norm_bias=weights.norm_bias)


def message_bytes(n_spots: int, k: int, weights: EdgeWeights) -> int:
    """Bytes of the messages of one layer, should a caller keep them."""
    return n_spots * k * weights.message_to_logit.shape[0] * _message_dtype(weights).itemsize


def _message_dtype(weights: EdgeWeights) -> torch.dtype:
    """What messages are kept in."""
    return autocast_dtype(weights.message_to_logit.device) or weights.message_to_logit.dtype


def make_messages(geometry: Tensor, weights: EdgeWeights, spec: AttentionSpec) -> Tensor:
    """All messages m_ij [N, K, E] of one layer, to be kept over several flow steps; without gradients or dropout."""
    (n, k), (e, hp) = geometry.shape[:2], weights.message_to_logit.shape
    dtype = _message_dtype(weights)
    settings = Settings(*spec)
    work = EdgeWork(("edge_messages",), Sizes(k, e, hp, settings.n_heads), settings)
    if on_triton(geometry, dtype, work):
        from ..kernels.edge_attention import edge_messages as kernel

        return kernel(geometry, weights.edge, weights.message_to_logit, settings, dtype)
    messages = geometry.new_empty(n, k, e, dtype=dtype)
    function, blocks = _plan(Workload(geometry.device, dtype, k, n), weights, edge_messages, BLOCK_BYTES)

    def make(rows: slice) -> None:
        messages[rows] = function(geometry[rows], weights, spec, Dropouts(None, 0.0, 0.0))

    in_turn(make, blocks, geometry.device)
    return messages


def edge_attention(
    terms: Tensor,
    graph: SpotGraph,
    messages: Tensor | None,
    weights: EdgeWeights,
    spec: AttentionSpec,
    dropouts: Dropouts,
) -> Tensor:
    """Attention of every spot over its neighbours.

    Args:
        terms: [N, 2 * H * P + d], see ``reference.py``.
        graph: of N spots.
        messages: [N, K, E] of :func:`make_messages`; made on the way when None.

    Returns:
        context [N, C]. In plain torch, blocks of large slides are recomputed in the backward (:data:`KEPT_BYTES`); the
        kernels recompute always.
    """
    training = torch.is_grad_enabled() and terms.requires_grad
    keys = None if dropouts.keys is None else dropouts.keys.keys
    p = (0.0, 0.0) if keys is None else (dropouts.mlp, dropouts.attention)
    settings = Settings(*spec, *p, messages is not None)
    e, hp = weights.message_to_logit.shape
    sizes = Sizes(graph.neighbors.shape[1], e, hp, terms.shape[1] - 2 * hp)
    if on_triton(terms, terms.dtype, EdgeWork(TRAINED_BY if training else TRAINED_BY[:1], sizes, settings)):
        from ..kernels.edge_attention import edge_attention as kernel

        edges = graph.geometry if messages is None else messages
        arriving = graph.arriving if training else None
        return kernel(terms, graph.neighbors, edges, *weights, settings, keys, arriving)
    return _attention_in_blocks(terms, graph, messages, weights, spec, dropouts, training)


def _attention_in_blocks(
    terms: Tensor,
    graph: SpotGraph,
    messages: Tensor | None,
    weights: EdgeWeights,
    spec: AttentionSpec,
    dropouts: Dropouts,
    training: bool,
) -> Tensor:
    """:func:`edge_attention` in plain torch."""
    n, k = graph.neighbors.shape
    edges = graph.geometry if messages is None else messages
    function = attend_block if messages is None else attend
    block_bytes = TRAINED_BLOCK_BYTES if training else BLOCK_BYTES
    function, blocks = _plan(Workload(terms.device, terms.dtype, k, n, training), weights, function, block_bytes)
    n_messages, width = weights.message_to_logit.shape

    def run(
        rows: slice, neighbors: Tensor, query: Tensor, terms: Tensor, edges: Tensor, *weights: Tensor
    ) -> tuple[Tensor]:
        part = dropouts.rows(rows.start, rows.stop)
        return (function(query, terms, neighbors, edges, EdgeWeights(*weights), spec, part),)

    if len(blocks) == 1 and terms.device.type != "cpu":
        return run(slice(0, n), graph.neighbors, terms[:, :width], terms, edges, *weights)[0]
    if training and blocks:

        def reading(rows: slice) -> Reading:
            near, place = rows_read(graph.neighbors[rows])
            shared = (Part(index, ...) for index in range(2, 2 + len(weights)))
            parts = [Part(0, (rows, slice(width))), Part(0, near), Part(1, rows), *shared]
            return Reading(parts, functools.partial(run, rows, place))

        keep = n * _live_bytes(k, weights) <= KEPT_BYTES
        apply: Callable[..., tuple[Tensor, ...]] = Blocks.apply  # which torch leaves untyped
        return apply(reading, blocks, keep, terms, edges, *weights)[0]
    columns = terms.shape[1] - 2 * width + spec.n_heads * (n_messages + 1)
    context = terms.new_empty(n, columns + context_padding(columns))

    def attend_rows(rows: slice) -> None:
        (context[rows],) = run(rows, graph.neighbors[rows], terms[rows, :width], terms, edges[rows], *weights)

    in_turn(attend_rows, blocks, terms.device)
    return context


def on_triton(x: Tensor, dtype: torch.dtype | None = None, edges: EdgeWork | None = None) -> bool:
    """Whether kernels run what reads x; autocast leaves float64 alone."""
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or dtype or x.dtype
    backend = backend_for(Workload(x.device, dtype, edges.sizes.k if edges else 1, edges=edges))
    if edges and backend.name == "triton":
        announce(backend)
    return backend.name == "triton"


def _plan(
    workload: Workload, weights: EdgeWeights, function: Callable[..., Tensor], block_bytes: int
) -> tuple[Callable[..., Tensor], list[slice]]:
    """The function of plain torch that runs a block, and the blocks that cover the spots.

    Compiled blocks all have one size, so the last one overlaps the one before; both write the same numbers.
    """
    n = workload.n_spots
    if not workload.training:
        backend = backend_for(workload)
        announce(backend)
        if n >= COMPILED_BLOCK and backend.name == "reference_compiled":
            starts = [*list(range(0, n - COMPILED_BLOCK, COMPILED_BLOCK)), n - COMPILED_BLOCK]
            return _compiled(function), [slice(start, start + COMPILED_BLOCK) for start in starts]
    size = max(1, block_bytes // _live_bytes(workload.k, weights))
    return function, blocks_of(n, size)


def _live_bytes(k: int, weights: EdgeWeights) -> int:
    """Of a spot while its block is computed."""
    return 3 * k * weights.message_to_logit.shape[1] * weights.message_to_logit.element_size()

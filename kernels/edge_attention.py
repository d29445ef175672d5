"""Frame-averaged local attention from spots to context: the operators, forward and backward, over kernels of edges.

What it computes is ``attend_block`` of ``stflow_fast/ops/reference.py``, whose header has the formulas; the shapes:

    terms [N, 2 * H * P + d] = [A | B | V], neighbors [N, K], edges [N, K, 3] or kept messages [N, K, E],
    edge [4, Pe], message_to_logit [E, H * P], logit [Z + 1]  ->  context [N, C]

Here is what is checked, launched and registered. ``edge_attention_forward.py`` and ``edge_attention_backward.py`` have
the kernels, ``edge_tiles.py`` what both do with a tile, ``edge_shape.py`` what they are compiled for.

The attention MLP's hidden vector [M, Z] of a head may be taken in parts of z_pad columns (``edge_shape.py``), for
models wider than the default.

Row offsets are int64 throughout: N * K * E passes 2^31 at 4.2M spots. Rows themselves are int32.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from stflow_fast.errors import InputError
from stflow_fast.graph import transpose_neighbors

from .conventions import MOST_COLUMNS, MOST_NEIGHBORS, Settings, Sizes, context_padding
from .edge_attention_backward import EDGE_NUMBERS, edge_attention_bwd_key_kernel, edge_attention_bwd_query_kernel
from .edge_attention_forward import edge_attention_fwd_kernel, edge_messages_kernel
from .edge_shape import EdgeShape, edge_shape
from .launch import (
    Launch,
    check_device,
    check_probability,
    check_tensors,
    device_scope,
    halves_of,
    n_processors,
    on_device,
)


def edge_attention(
    terms: Tensor,
    neighbors: Tensor,
    edges: Tensor,
    edge: Tensor,
    message_to_logit: Tensor,
    logit: Tensor,
    settings: Settings,
    dropout_keys: Tensor | None = None,
    arriving: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Context of every spot; differentiable in ``terms`` and the three weights (arXiv 2506.05361, section 4.2).

    Under autocast ``terms`` are brought to its type; geometry and weights stay as they are. Float32 terms multiply as
    ``torch.set_float32_matmul_precision`` says: "highest", torch's default, is ieee, anything else tf32.

    Args:
        terms: [N, 2 * H * P + d], float32, bfloat16 or float16.
        neighbors: [N, K] int64 rows of ``terms``, negative where there is none; K from 1 to 64.
        edges: [N, K, 3] geometry, or with ``edges_are_messages`` [N, K, E] (then without gradients).
        edge: [4, Pe].
        message_to_logit: [E, H * P].
        logit: [Z + 1].
        dropout_keys: [N] int32 of the spots, in this layer; with dropout only.
        arriving: of ``stflow_fast.graph.transpose_neighbors``, made once for several layers, or in the backward.

    Returns:
        context [N, C] in the type of ``terms``.

    Raises:
        InputError: a shape, type, device or layout that the kernels do not take, named; with STFLOW_DEBUG=1 also
            neighbours out of range.
    """
    device_type = terms.device.type
    if torch.is_autocast_enabled(device_type):
        terms = terms.to(torch.get_autocast_dtype(device_type))
    message_to_logit = message_to_logit.to(terms.dtype)
    order, ptr = arriving or (None, None)
    context: Tensor = torch.ops.stflow_fast.edge_attention(
        terms, neighbors, edges, edge, message_to_logit, logit, dropout_keys, order, ptr, *settings
    )
    return context


def edge_messages(
    geometry: Tensor, edge: Tensor, message_to_logit: Tensor, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """Messages [N, K, E] of geometry [N, K, 3] in ``dtype``, to be kept over several flow steps.

    Without gradients or dropout. Other arguments and errors as :func:`edge_attention`.
    """
    with torch.no_grad():
        messages: Tensor = torch.ops.stflow_fast.edge_messages(geometry, edge, message_to_logit, *settings[:3], dtype)
    return messages


def _compiled_for(kernel: str, typed: Tensor, sizes: Sizes, settings: Settings) -> tuple[EdgeShape, Launch]:
    return edge_shape(kernel, *on_device(typed), sizes, settings)


class _Inputs(NamedTuple):
    """The tensors of the operators, in the order of their schema."""

    terms: Tensor
    neighbors: Tensor
    edges: Tensor
    edge: Tensor
    message_to_logit: Tensor
    logit: Tensor
    dropout_keys: Tensor | None
    arriving: Tensor | None
    arriving_ptr: Tensor | None

    @property
    def sizes(self) -> Sizes:
        e, hp = self.message_to_logit.shape
        return Sizes(self.neighbors.shape[1], e, hp, self.terms.shape[1] - 2 * hp)


def _split(arguments: tuple[Any, ...]) -> tuple[_Inputs, Settings]:
    """An operator's flat arguments."""
    count = len(_Inputs._fields)
    return _Inputs(*arguments[:count]), Settings(*arguments[count:])


def _check(inputs: _Inputs, settings: Settings) -> None:
    """Refuse by name what the kernels would misread."""
    terms, neighbors = inputs.terms, inputs.neighbors
    if neighbors.ndim != 2 or not 1 <= neighbors.shape[1] <= MOST_NEIGHBORS:
        raise InputError(f"neighbors: must have 1 to {MOST_NEIGHBORS} columns, not shape {list(neighbors.shape)}")
    n, k = neighbors.shape
    e, hp = _check_width(inputs.message_to_logit)
    n_heads = settings.n_heads
    if (
        n_heads < 1
        or hp % n_heads
        or terms.ndim != 2
        or terms.shape[1] <= 2 * hp
        or (terms.shape[1] - 2 * hp) % n_heads
    ):
        raise InputError(
            f"terms: must have shape [N, 2 * H * P + d] with H * P = {hp} and d a multiple of H = {n_heads}, "
            f"not {list(terms.shape)}"
        )
    edge_halves = halves_of("edge_activation", settings.edge_activation)
    logit_halves = halves_of("logit_activation", settings.logit_activation)
    z = hp // n_heads // logit_halves
    if hp // n_heads % logit_halves:
        raise InputError(
            f"message_to_logit: must have an even number of columns a head for swiglu, not {hp // n_heads}"
        )
    if settings.edges_are_messages and settings.p_mlp > 0:
        raise InputError("edges: kept messages are without dropout; give geometry, or p_mlp 0")
    n_edge = e if settings.edges_are_messages else 3
    shapes = {
        "terms": (n, terms.shape[1]),
        "neighbors": (n, k),
        "edges": (n, k, n_edge),
        "edge": (4, e * edge_halves),
        "message_to_logit": (e, hp),
        "logit": (z + 1,),
        "dropout_keys": (n,),
        "arriving": (n * k,),
        "arriving_ptr": (n + 1,),
    }
    check_probability("p_mlp", settings.p_mlp)
    check_probability("p_attention", settings.p_attention)
    drops = settings.p_mlp > 0 or settings.p_attention > 0
    if drops and inputs.dropout_keys is None:
        raise InputError("dropout_keys: are needed with dropout")
    given = {name: tensor for name, tensor in inputs._asdict().items() if tensor is not None}
    integers = dict.fromkeys(("neighbors", "arriving", "arriving_ptr"), torch.int64)
    check_tensors(
        {name: (tensor, shapes[name]) for name, tensor in given.items()}, **integers, dropout_keys=torch.int32
    )


def _check_width(message_to_logit: Tensor) -> tuple[int, int]:
    """E and H * P."""
    if message_to_logit.ndim != 2 or not 1 <= message_to_logit.shape[0] <= MOST_COLUMNS:
        raise InputError(
            f"message_to_logit: must have shape [E, H * P] with E from 1 to {MOST_COLUMNS}, "
            f"not {list(message_to_logit.shape)}"
        )
    e, hp = message_to_logit.shape
    return e, hp


def _check_rows(neighbors: Tensor) -> None:
    """With STFLOW_DEBUG=1, which waits for the device: no neighbour may be out of range."""
    if os.environ.get("STFLOW_DEBUG") != "1" or (neighbors.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    if len(neighbors) and int(neighbors.max()) >= len(neighbors):
        raise InputError(f"neighbors: {int(neighbors.max())} is no row of the {len(neighbors)} terms")


_INPUTS = (
    "Tensor terms, Tensor neighbors, Tensor edges, Tensor edge, Tensor message_to_logit, Tensor logit, "
    "Tensor? dropout_keys, Tensor? arriving, Tensor? arriving_ptr, int n_heads, str edge_activation, "
    "str logit_activation, float p_mlp, float p_attention, bool edges_are_messages"
)
_LIBRARY = torch.library.Library("stflow_fast", "FRAGMENT")
_LIBRARY.define(f"edge_attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"edge_attention_backward(Tensor grad_context, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)")


def _forward(*arguments: Any) -> Tensor:
    context = _forward_fake(*arguments)
    inputs, settings = _split(arguments)
    terms = inputs.terms
    check_device("terms", terms)
    _check_rows(inputs.neighbors)
    if len(terms):
        shape, launch = _compiled_for("edge_attention_fwd", terms, inputs.sizes, settings)
        keys = inputs.dropout_keys if shape.dropout else None
        with device_scope(terms):
            edge_attention_fwd_kernel[(triton.cdiv(len(terms), shape.spots),)](
                *inputs[:6], keys, context, len(terms), shape, **launch.options
            )
    return context


def _forward_fake(*arguments: Any) -> Tensor:
    inputs, settings = _split(arguments)
    _check(inputs, settings)
    used = inputs.sizes.d + settings.n_heads * (inputs.sizes.e + 1)
    return inputs.terms.new_empty(inputs.terms.shape[0], used + context_padding(used))  # len() would fix N


def _backward(grad_context: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, settings = _split(arguments)
    terms, neighbors, _, edge, message_to_logit, logit, keys, arriving, arriving_ptr = inputs
    check_device("terms", terms)
    n, sizes = len(terms), inputs.sizes
    if not n:
        return terms.new_empty(terms.shape), *(torch.zeros_like(weight) for weight in (edge, message_to_logit, logit))
    if arriving is None or arriving_ptr is None:
        arriving, arriving_ptr = transpose_neighbors(neighbors)
    grad_context = grad_context.to(terms.dtype).contiguous()
    keys = keys if settings.p_mlp > 0 or settings.p_attention > 0 else None
    grad_terms = torch.empty_like(terms)
    messages = terms.new_empty(n * sizes.k, sizes.e)
    shape, launch = _compiled_for("edge_attention_bwd_query", terms, sizes, settings)
    programs = min(triton.cdiv(n, shape.spots), launch.programs * n_processors(terms.device))
    edge_gradients = terms.new_empty(n * sizes.k, settings.n_heads, EDGE_NUMBERS.value, dtype=torch.float32)
    grad_edge = terms.new_empty(programs, 2, *edge.shape, dtype=torch.float32)
    with device_scope(terms):
        edge_attention_bwd_query_kernel[(programs,)](
            grad_context,
            *inputs[:6],
            keys,
            grad_terms,
            messages,
            edge_gradients,
            grad_edge,
            n,
            shape,
            **launch.options,
        )
        shape, launch = _compiled_for("edge_attention_bwd_key", terms, sizes, settings)
        grid = (settings.n_heads, shape.z_parts * shape.e_parts)
        splits = triton.cdiv(launch.programs * n_processors(terms.device), grid[0] * grid[1])
        splits = min(triton.cdiv(n, shape.keys), splits)
        grad_weight = terms.new_empty(splits, *message_to_logit.shape, dtype=torch.float32)
        grad_logit = terms.new_empty(splits * settings.n_heads, len(logit), dtype=torch.float32)
        edge_attention_bwd_key_kernel[(splits, *grid)](
            grad_context,
            terms,
            neighbors,
            messages,
            arriving,
            arriving_ptr,
            message_to_logit,
            logit,
            keys,
            edge_gradients,
            grad_terms,
            grad_weight,
            grad_logit,
            n,
            shape,
            **launch.options,
        )
    weights = zip((grad_edge.flatten(0, 1), grad_weight, grad_logit), (edge, message_to_logit, logit), strict=True)
    return grad_terms, *(partial.sum(0).to(weight.dtype) for partial, weight in weights)


def _backward_fake(grad_context: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, _ = _split(arguments)
    return tuple(map(torch.empty_like, (inputs.terms, inputs.edge, inputs.message_to_logit, inputs.logit)))


def _messages(
    geometry: Tensor,
    edge: Tensor,
    message_to_logit: Tensor,
    n_heads: int,
    edge_activation: str,
    logit_activation: str,
    dtype: torch.dtype,
) -> Tensor:
    check_device("geometry", geometry)
    settings = n_heads, edge_activation, logit_activation
    messages = _messages_fake(geometry, edge, message_to_logit, *settings, dtype)
    if messages.numel():
        n, k, e = messages.shape
        sizes = Sizes(k, e, message_to_logit.shape[1], n_heads)  # d does not matter
        shape, launch = _compiled_for("edge_messages", messages, sizes, Settings(*settings))
        with device_scope(geometry):
            edge_messages_kernel[(triton.cdiv(n * k, shape.rows),)](
                geometry, edge, messages, n * k, shape, **launch.options
            )
    return messages


def _messages_fake(
    geometry: Tensor,
    edge: Tensor,
    message_to_logit: Tensor,
    n_heads: int,
    edge_activation: str,
    logit_activation: str,
    dtype: torch.dtype,
) -> Tensor:
    if geometry.ndim != 3 or not 1 <= geometry.shape[1] <= MOST_NEIGHBORS:
        raise InputError(f"geometry: must have shape [N, 1 to {MOST_NEIGHBORS}, 3], not {list(geometry.shape)}")
    (n, k, _), (e, hp) = geometry.shape, _check_width(message_to_logit)
    if n_heads < 1 or hp % n_heads:
        raise InputError(f"n_heads: must divide H * P = {hp}, not {n_heads}")
    halves = halves_of("edge_activation", edge_activation)
    check_tensors({"geometry": (geometry, (n, k, 3)), "edge": (edge, (4, e * halves))})
    return geometry.new_empty(n, k, e, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings = _split(inputs)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.settings.edges_are_messages:
        raise InputError("edges: kept messages are for inference; give geometry to differentiate")
    terms, edge, weight, logit = torch.ops.stflow_fast.edge_attention_backward(
        grad_context, *ctx.saved_tensors, *ctx.settings
    )
    return terms, None, None, edge, weight, logit, None, None, None, *(None for _ in ctx.settings)


_LIBRARY.define(
    "edge_messages(Tensor geometry, Tensor edge, Tensor message_to_logit, int n_heads, str edge_activation, "
    "str logit_activation, ScalarType dtype) -> Tensor"
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("edge_messages", _messages, _device)
    _LIBRARY.impl("edge_attention", _forward, _device)
    _LIBRARY.impl("edge_attention_backward", _backward, _device)
torch.library.register_fake("stflow_fast::edge_messages", _messages_fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::edge_attention", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::edge_attention_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "stflow_fast::edge_attention", _differentiate, setup_context=_setup_context, lib=_LIBRARY
)

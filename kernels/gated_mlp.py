"""Gated MLP with its LayerNorm in one kernel between two matrix products, and a backward that keeps the input alone.

What it computes is ``gated_mlp`` of ``stflow_fast/ops/reference.py`` up to the dropout of its output:

    x [N, in]  ->  pre = fc1(x) [N, P]  ->  hidden = LayerNorm(dropout(gate(pre))) [N, Z]  ->  fc2(hidden) [N, out]

fc1 and fc2 are torch's. The kernel reads pre and writes hidden; in the backward it reads pre, made again from x, and
the gradient of hidden, and writes the gradient of pre, and hidden for the gradient of fc2. Gradients of gain and bias
are partial sums of a fixed number of programs, so every run gives the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import LAYERNORM_EPS, dropout_threshold
from .launch import (
    INTERPRETED,
    Launch,
    check_device,
    check_probability,
    check_tensors,
    device_scope,
    halves_of,
    launch_of,
    n_processors,
    on_device,
)
from .tiles import centre, centre_backward, combine, dropout_factor, gate, gate_backward, settle_keys

GELU = ("gelu", 0.0, 0)
"""Activation, dropout and its stream of a gene head's gate."""


@dataclass(frozen=True)
class GateShape:
    """All that is known of a launch when its kernel is compiled."""

    rows: int
    z: int
    p: int
    z_pad: int
    gate: str
    fast: bool
    dropout: float
    threshold: int
    scale: float
    eps: float = LAYERNORM_EPS


def gate_shape(arch: int, precision: str, p: int, activation: str, dropout: float) -> tuple[GateShape, Launch]:
    """What the kernels are compiled for, and how they are launched on an architecture."""
    z = p // 2 if activation == "swiglu" else p
    launch = launch_of("gate_norm", arch, precision, triton.next_power_of_2(z))
    return _gate_shape(launch.rows, precision, p, activation, dropout), launch


@functools.cache
def _gate_shape(rows: int, precision: str, p: int, activation: str, dropout: float) -> GateShape:
    z = p // 2 if activation == "swiglu" else p
    fast = precision != "ieee" and not INTERPRETED
    threshold, scale = dropout_threshold(dropout), 1.0 / (1.0 - dropout)
    return GateShape(rows, z, p, triton.next_power_of_2(z), activation, fast, dropout, threshold, scale)


@triton.jit
def gate_tile(pre, keys, i_row, m_row, stream, S: tl.constexpr):
    """Both halves of pre [rows, Z], the centred hidden vector, its reciprocal deviation, and the dropout factor."""
    i_z = tl.arange(0, S.z_pad)
    m_z = m_row[:, None] & (i_z < S.z)[None, :]
    i_pre = i_row[:, None] * S.p + i_z[None, :]
    b_a = tl.load(pre + i_pre, mask=m_z, other=0.0).to(tl.float32)
    b_b = b_a
    if S.gate == "swiglu":
        b_b = tl.load(pre + S.z + i_pre, mask=m_z, other=0.0).to(tl.float32)
    b_z = gate(b_a, b_b, tl.constexpr(S.gate), tl.constexpr(S.fast))
    b_factor = 1.0
    if S.dropout > 0:
        i_key = combine(combine(tl.load(keys + i_row, mask=m_row, other=0), stream), 0)
        b_factor = dropout_factor(i_key[:, None], i_z[None, :], tl.constexpr(S.threshold), tl.constexpr(S.scale))
        b_z = b_z * b_factor
    b_centred, b_rstd = centre(b_z, i_z < S.z, tl.constexpr(S.z), tl.constexpr(S.eps))
    return b_a, b_b, b_centred, b_rstd, b_factor


@triton.jit(do_not_specialize=["n", "stream"])
def gate_norm_fwd_kernel(pre, gain, bias, keys, hidden, n, stream, S: tl.constexpr):
    i_row = (tl.program_id(0) * S.rows + tl.arange(0, S.rows)).to(tl.int64)
    i_z = tl.arange(0, S.z_pad)
    m_row = i_row < n
    _, _, b_centred, b_rstd, _ = gate_tile(pre, keys, i_row, m_row, stream, S)
    b_gain = tl.load(gain + i_z, mask=i_z < S.z, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + i_z, mask=i_z < S.z, other=0.0).to(tl.float32)
    b_hidden = b_centred * b_rstd[:, None] * b_gain[None, :] + b_bias[None, :]
    tl.store(hidden + i_row[:, None] * S.z + i_z[None, :], b_hidden, mask=m_row[:, None] & (i_z < S.z)[None, :])


@triton.jit(do_not_specialize=["n", "stream"])
def gate_norm_bwd_kernel(
    grad_hidden, pre, gain, bias, keys, grad_pre, hidden, grad_gain, grad_bias, n, stream, S: tl.constexpr
):
    """A fixed number of programs walks over the tiles; partial gradients of gain and bias are [programs, Z]."""
    i_z = tl.arange(0, S.z_pad)
    m_z = i_z < S.z
    b_gain = tl.load(gain + i_z, mask=m_z, other=0.0).to(tl.float32)
    b_bias = tl.load(bias + i_z, mask=m_z, other=0.0).to(tl.float32)
    b_dgain = tl.full([S.z_pad], 0.0, tl.float32)
    b_dbias = tl.full([S.z_pad], 0.0, tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(n, S.rows), tl.num_programs(0)):
        i_row = (i_tile * S.rows + tl.arange(0, S.rows)).to(tl.int64)
        m_row = i_row < n
        m_tile = m_row[:, None] & m_z[None, :]
        i_hidden = i_row[:, None] * S.z + i_z[None, :]
        b_a, b_b, b_centred, b_rstd, b_factor = gate_tile(pre, keys, i_row, m_row, stream, S)
        b_normed = b_centred * b_rstd[:, None]
        if hidden is not None:
            tl.store(hidden + i_hidden, b_normed * b_gain[None, :] + b_bias[None, :], mask=m_tile)
        b_dhidden = tl.load(grad_hidden + i_hidden, mask=m_tile, other=0.0).to(tl.float32)
        b_dgain += tl.sum(b_dhidden * b_normed, 0)
        b_dbias += tl.sum(b_dhidden, 0)
        b_dz = centre_backward(b_centred, b_rstd, b_dhidden * b_gain[None, :], tl.constexpr(S.z)) * b_factor
        b_da, b_db = gate_backward(b_a, b_b, b_dz, tl.constexpr(S.gate), tl.constexpr(S.fast))
        i_pre = i_row[:, None] * S.p + i_z[None, :]
        tl.store(grad_pre + i_pre, b_da, mask=m_tile)
        if S.gate == "swiglu":
            tl.store(grad_pre + S.z + i_pre, b_db, mask=m_tile)
    tl.store(grad_gain + tl.program_id(0) * S.z + i_z, b_dgain, mask=m_z)
    tl.store(grad_bias + tl.program_id(0) * S.z + i_z, b_dbias, mask=m_z)


def gated_mlp(
    x: Tensor, weights: tuple[Tensor, ...], activation: str, p: float, keys: Tensor | None, stream: int
) -> Tensor:
    """fc2(LayerNorm(dropout(gate(fc1(x))))), differentiable in x and the six weights; no dropout behind it.

    Under autocast x and the weights are brought to its type.

    Args:
        x: [N, in], float32, bfloat16 or float16.
        weights: fc1 [P, in] and [P], LayerNorm [Z] and [Z], fc2 [out, Z] and [out], in the type of x.
        keys: [N] int32 of the spots; None for no dropout.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weights = x.to(dtype), tuple(weight.to(dtype) for weight in weights)
    if keys is None or p == 0:  # either of both is no dropout, and one kernel is compiled for it
        keys, p = None, 0.0
    made: Tensor = torch.ops.stflow_fast.gated_mlp(x, *weights, keys, activation, p, stream)
    return made


def _forward(*arguments: Any) -> Tensor:
    check_device("x", arguments[0])
    _fake(*arguments)
    x, fc1, fc1_bias, gain, bias, fc2, fc2_bias, keys, activation, p, stream = arguments
    hidden = gate_norm(F.linear(x, fc1, fc1_bias), (gain, bias), keys, activation, p, stream)
    return F.linear(hidden, fc2, fc2_bias)


def gate_norm(
    pre: Tensor, affine: tuple[Tensor, Tensor], keys: Tensor | None, activation: str, p: float, stream: int
) -> Tensor:
    """hidden [N, Z] of pre [N, P], as ``gated_mlp`` has it between its two products; nothing is checked."""
    hidden = pre.new_empty(len(pre), len(affine[0]))
    if len(pre):
        shape, launch = gate_shape(*on_device(pre), pre.shape[1], activation, p)
        with device_scope(pre):
            gate_norm_fwd_kernel[(triton.cdiv(len(pre), shape.rows),)](
                pre, *affine, keys, hidden, len(pre), stream, shape, **launch.options
            )
    return hidden


def _fake(
    x: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    gain: Tensor,
    bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
    keys: Tensor | None,
    activation: str,
    p: float,
    stream: int,
) -> Tensor:
    halves = halves_of("activation", activation)
    if x.ndim != 2 or fc1.ndim != 2 or fc2.ndim != 2:
        raise InputError("x, fc1 and fc2: must be matrices")
    (n, _), (p_columns, columns), out = x.shape, fc1.shape, fc2.shape[0]  # len() would compile for one N alone
    hidden = p_columns // halves
    if p_columns % halves:
        raise InputError(f"fc1: must have an even number of rows for swiglu, not {p_columns}")
    expected = {
        "x": (x, (n, columns)),
        "fc1": (fc1, (p_columns, columns)),
        "fc1_bias": (fc1_bias, (p_columns,)),
        "gain": (gain, (hidden,)),
        "bias": (bias, (hidden,)),
        "fc2": (fc2, (out, hidden)),
        "fc2_bias": (fc2_bias, (out,)),
    }
    check_probability("p", p)
    if p > 0:
        if keys is None:
            raise InputError("keys: are needed with dropout")
        expected["keys"] = (keys, (n,))
    check_tensors(expected, **dict.fromkeys(expected, x.dtype) | {"keys": torch.int32})
    return x.new_empty(n, out)


def _backward(
    grad: Tensor,
    x: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    gain: Tensor,
    bias: Tensor,
    fc2: Tensor,
    keys: Tensor | None,
    activation: str,
    p: float,
    stream: int,
) -> tuple[Tensor, ...]:
    """Gradients of x and the six weights."""
    grad = grad.to(x.dtype).contiguous()
    pre, grad_hidden = F.linear(x, fc1, fc1_bias), grad @ fc2
    hidden = torch.empty_like(grad_hidden)
    grad_pre, grad_gain, grad_bias = gate_norm_backward(
        grad_hidden, pre, (gain, bias), keys, hidden, (activation, p, stream)
    )
    return grad_pre @ fc1, grad_pre.T @ x, grad_pre.sum(0), grad_gain, grad_bias, grad.T @ hidden, grad.sum(0)


def gate_norm_backward(
    grad_hidden: Tensor,
    pre: Tensor,
    affine: tuple[Tensor, Tensor],
    keys: Tensor | None,
    hidden: Tensor | None,
    settings: tuple[str, float, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of pre, gain and bias; what :func:`gate_norm` gave is made again and written to ``hidden``. The
    settings are its last three arguments."""
    activation, p, stream = settings
    grad_pre = torch.empty_like(pre)
    gain = affine[0]
    shape, launch = gate_shape(*on_device(pre), pre.shape[1], activation, p)
    programs = min(triton.cdiv(len(pre), shape.rows), launch.programs * n_processors(pre.device))
    partial = gain.new_empty(2, programs, len(gain), dtype=torch.float32)
    if len(pre):
        with device_scope(pre):
            gate_norm_bwd_kernel[(programs,)](
                grad_hidden,
                pre,
                *affine,
                keys,
                grad_pre,
                hidden,
                partial[0],
                partial[1],
                len(pre),
                stream,
                shape,
                **launch.options,
            )
    grad_gain, grad_bias = partial.sum(1).to(gain.dtype).unbind()
    return grad_pre, grad_gain, grad_bias.clone()


def _backward_fake(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return *(torch.empty_like(tensor) for tensor in inputs[:6]), grad.new_empty(grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _fc2_bias, keys, activation, p, stream = inputs
    ctx.save_for_backward(*tensors, keys)
    ctx.settings = (activation, p, stream)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.stflow_fast.gated_mlp_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *gradients, None, None, None, None


def gelu_norm(pre: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm(gelu(pre)) of pre [N, Z], behind its gain and bias [Z], in the type of pre; differentiable in all.

    Raises:
        InputError: a shape, type, device or layout that the kernel does not take, named.
    """
    hidden: Tensor = torch.ops.stflow_fast.gelu_norm(pre, gain, bias)
    return hidden


def _gelu_norm(pre: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    check_device("pre", pre)
    _gelu_norm_fake(pre, gain, bias)
    return gate_norm(pre, (gain, bias), None, *GELU)


def _gelu_norm_fake(pre: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    if pre.ndim != 2:
        raise InputError(f"pre: must have shape [N, Z], not {list(pre.shape)}")
    z = pre.shape[1]
    check_tensors({"pre": (pre, tuple(pre.shape)), "gain": (gain, (z,)), "bias": (bias, (z,))})
    return torch.empty_like(pre)


def _gelu_norm_backward(grad: Tensor, pre: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return gate_norm_backward(grad.contiguous(), pre, (gain, bias), None, None, GELU)


def _gelu_norm_backward_fake(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(torch.empty_like, inputs))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_gelu_norm(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.stflow_fast.gelu_norm_backward(grad, *ctx.saved_tensors)
    return gradients


_WEIGHTS = "Tensor fc1, Tensor fc1_bias, Tensor gain, Tensor bias, Tensor fc2"
_SETTINGS = "Tensor? keys, str activation, float p, int stream"
_LIBRARY = torch.library.Library("stflow_fast", "FRAGMENT")
_LIBRARY.define(f"gated_mlp(Tensor x, {_WEIGHTS}, Tensor fc2_bias, {_SETTINGS}) -> Tensor")
_LIBRARY.define(
    f"gated_mlp_backward(Tensor grad, Tensor x, {_WEIGHTS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("gelu_norm(Tensor pre, Tensor gain, Tensor bias) -> Tensor")
_LIBRARY.define("gelu_norm_backward(Tensor grad, Tensor pre, Tensor gain, Tensor bias) -> (Tensor, Tensor, Tensor)")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("gelu_norm", _gelu_norm, _device)
    _LIBRARY.impl("gelu_norm_backward", _gelu_norm_backward, _device)
    _LIBRARY.impl("gated_mlp", _forward, _device)
    _LIBRARY.impl("gated_mlp_backward", _backward, _device)
torch.library.register_fake("stflow_fast::gated_mlp", _fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::gated_mlp_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::gelu_norm", _gelu_norm_fake, lib=_LIBRARY)
torch.library.register_fake("stflow_fast::gelu_norm_backward", _gelu_norm_backward_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "stflow_fast::gelu_norm", _differentiate_gelu_norm, setup_context=_keep_inputs, lib=_LIBRARY
)
torch.library.register_autograd("stflow_fast::gated_mlp", _differentiate, setup_context=_setup_context, lib=_LIBRARY)

settle_keys(globals())

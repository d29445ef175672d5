"""How kernels are launched: the table of tile sizes and warps, and what of the machine they depend on."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import float32_is_tf32

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors: decided when a kernel's file is loaded."""


class Launch(NamedTuple):
    """How a kernel is launched."""

    rows: int  # edges or spots in a tile
    warps: int
    programs: int  # on one multiprocessor, where a fixed number of programs walks over the tiles

    @property
    def options(self) -> dict[str, Any]:
        return {} if INTERPRETED else {"num_warps": self.warps, "num_stages": 1}


class Row(NamedTuple):
    """A row of the table holds from its architecture on, for its precisions, up to its number of columns."""

    kernel: str
    arch: int
    precisions: str
    columns: int  # of the widest tile: padded E or Z of an edge kernel, padded Z of a gate
    launch: Launch
    reason: str


HALF, ANY = "bf16 fp16", "bf16 fp16 tf32 ieee"
WIDEST = 2**30

# Reasons are what the compiler said of tiles (`python -m stflow_fast.kernels.aot --tile 64x4`, triton 3.7.1): "least"
# is the fewest instructions per edge of the tiles of 16 to 128 rows and 4 or 8 warps that spill no register, with
# dropout or without. None was timed on a GPU yet.
#
# No row lets Hopper's wgmma read a left side from registers, which it does in products of 64 rows or more: ptxas before
# CUDA 13.3 is reported to reuse such registers too early (triton #11781, fla #1262). 64 rows and 4 warps would be 11.9k
# instructions per edge in the forward (14.8k with 32), and are for whoever has seen them right on a GPU. K above 32
# needs tiles of 64 rows.
TABLE = (
    Row("edge_attention_fwd", 80, HALF, 64, Launch(32, 4, 1), "least below 64 rows"),
    Row("edge_attention_fwd", 80, HALF, WIDEST, Launch(32, 8, 1), "least; 64 rows spill with dropout"),
    Row("edge_attention_fwd", 80, "tf32", 64, Launch(32, 8, 1), "least; 4 warps spill 8 bytes, 64 rows 32"),
    Row("edge_attention_fwd", 80, "tf32", WIDEST, Launch(16, 8, 1), "half of the rows for twice the columns"),
    Row("edge_attention_fwd", 80, "ieee", WIDEST, Launch(16, 8, 1), "alone; 32 rows spill 536 bytes"),
    Row("edge_attention_bwd_query", 80, HALF, 64, Launch(32, 8, 1), "least; 4 warps spill 56 bytes, 64 rows 992"),
    Row("edge_attention_bwd_query", 90, HALF, 128, Launch(32, 8, 1), "least"),
    Row("edge_attention_bwd_query", 80, HALF, WIDEST, Launch(16, 8, 1), "32 rows spill 32 bytes on sm_80"),
    Row("edge_attention_bwd_query", 80, "tf32", WIDEST, Launch(16, 8, 1), "alone; 32 rows spill 16 bytes"),
    Row("edge_attention_bwd_query", 80, "ieee", WIDEST, Launch(16, 8, 1), "spills 8 to 80 bytes; everything else more"),
    Row("edge_attention_bwd_key", 80, HALF, WIDEST, Launch(32, 8, 1), "least; 4 warps spill 16 bytes, 64 rows 688"),
    Row("edge_attention_bwd_key", 80, "tf32 ieee", WIDEST, Launch(16, 8, 1), "alone; 32 rows spill 8 bytes"),
    Row("edge_messages", 80, "bf16 fp16 tf32", 64, Launch(32, 4, 1), "as the forward"),
    Row("edge_messages", 80, ANY, WIDEST, Launch(16, 8, 1), "as the forward"),
    Row("dropout", 80, ANY, 128, Launch(16, 4, 1), "16 numbers a thread"),
    Row("gate_norm", 80, ANY, 128, Launch(16, 4, 4), "a row is 128 numbers: 16 of them are 16 numbers a thread"),
    Row("gate_norm", 80, ANY, WIDEST, Launch(4, 4, 4), "as many numbers a thread with 512 columns"),
)


def launch_of(kernel: str, arch: int, precision: str, columns: int) -> Launch:
    """The row of the newest architecture up to ``arch``, with the fewest columns that suffice."""
    if arch == 0:  # the interpreter: a program costs the same, whatever its size
        return Launch(128, 4, 1)
    rows = [
        row
        for row in TABLE
        if row.kernel == kernel and row.arch <= arch and precision in row.precisions.split() and columns <= row.columns
    ]
    if not rows:
        raise InputError(f"device: the Triton kernels need compute capability 8.0 (Ampere) or later, not {arch / 10}")
    return max(rows, key=lambda row: (row.arch, -row.columns)).launch


def precision_of(dtype: torch.dtype, name: str = "dtype") -> str:
    """``ieee``, ``tf32``, ``bf16`` or ``fp16``; how float32 multiplies is torch's setting; a refusal names ``name``."""
    if dtype == torch.float32:
        return "tf32" if float32_is_tf32() else "ieee"
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype == torch.bfloat16 else "fp16"
    raise InputError(f"{name}: the Triton kernels take float32, bfloat16 or float16, not {dtype}")


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability, 90 for an H100; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def n_processors(device: torch.device) -> int:
    """Multiprocessors; two in the interpreter, so that walking over tiles is seen."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: Tensor) -> tuple[int, str]:
    """Architecture and precision of a tensor."""
    return architecture(tensor.device), precision_of(tensor.dtype)


def check_device(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that no kernel can reach."""
    if not (tensor.is_cuda or INTERPRETED):
        raise InputError(f"{name}: is on {tensor.device}; Triton kernels need a CUDA device, or TRITON_INTERPRET=1")


def check_tensors(expected: dict[str, tuple[Tensor, tuple[int, ...]]], **dtypes: torch.dtype) -> None:
    """Refuse by name what a kernel would misread: shapes, types of integers, devices and gaps between rows.

    Args:
        expected: tensors and their shapes; the first names the device.
        dtypes: of those that are no floating-point numbers.
    """
    first = next(iter(expected))
    precision_of(expected[first][0].dtype, first)
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name}: must have shape {list(shape)}, not {list(tensor.shape)}")
        if tensor.device != expected[first][0].device:
            raise InputError(f"{name}: is on {tensor.device}, but {first} is on {expected[first][0].device}")
        if not tensor.is_contiguous():
            raise InputError(f"{name}: must be contiguous; call .contiguous()")
        if name in dtypes and tensor.dtype != dtypes[name]:
            raise InputError(f"{name}: must be {dtypes[name]}, not {tensor.dtype}")
        if name not in dtypes:
            precision_of(tensor.dtype, name)


def check_probability(name: str, p: float) -> None:
    """Refuse what is no probability of dropout."""
    if not 0 <= p < 1:
        raise InputError(f"{name}: must be a probability in [0, 1), not {p}")


def halves_of(name: str, activation: str) -> int:
    """Halves of a pre-activation; an unknown gate is refused by the argument's name."""
    if activation not in ("swiglu", "gelu", "relu"):
        raise InputError(f"{name}: must be swiglu, gelu or relu, not {activation!r}")
    return 2 if activation == "swiglu" else 1


def device_scope(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

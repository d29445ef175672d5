"""How kernels are launched: the table of tile sizes and warps (``launch_table.csv``), and what of the machine they
depend on."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stflow_fast.errors import InputError

from .conventions import float32_is_tf32
from .versions import why_not_interpreted

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors: decided when a kernel's file is loaded."""


OLDEST = 80
"""Ampere: bf16 on tensor cores."""

EDGE_KERNELS = ("edge_attention_fwd", "edge_attention_bwd_query", "edge_attention_bwd_key", "edge_messages")
KERNELS = (*EDGE_KERNELS, "dropout", "gate_norm", "joined_norm", "residual", "gene_head", "nearest")
WALKING = ("edge_attention_bwd_query", "edge_attention_bwd_key", "gate_norm")
"""Those of a fixed number of programs, in their backward at least; of the others a program treats one tile."""

PRECISIONS = ("bf16", "fp16", "tf32", "ieee", "float64")
WIDEST = 2**30


SHARED_MEMORY = {arch: kib << 10 for arch, kib in ((80, 164), (86, 100), (89, 100), (90, 228), (100, 228), (120, 100))}
"""Bytes of a multiprocessor by compute capability."""

RESERVED = 1024
"""Bytes of shared memory that each program takes beside its own."""


class Launch(NamedTuple):
    """How a kernel is launched."""

    rows: int  # edges or spots in a tile
    warps: int
    programs: int = 0  # on one multiprocessor, where a fixed number of programs walks over the tiles

    @property
    def options(self) -> dict[str, Any]:
        return {} if INTERPRETED else {"num_warps": self.warps, "num_stages": 1}

    def __str__(self) -> str:
        return "x".join(str(number) for number in self if number)


class Row(NamedTuple):
    """A row of the table holds from its architecture on, for its precisions, up to its number of columns."""

    kernel: str
    arch: int
    precisions: str
    columns: int  # of the widest tile: padded E or Z of an edge kernel, padded Z of a gate; WIDEST where any will do
    launch: Launch
    reason: str

    @property
    def measured(self) -> bool:
        """On a GPU, by ``autotune``; else by what the compiler says."""
        return self.reason.startswith(("measured on", "confirmed on"))


HEADER = ("kernel", "arch", "precisions", "columns", *Launch._fields, "reason")


def read_table(path: Path) -> tuple[Row, ...]:
    """The rows of a table; its first line is HEADER, no ``columns`` means any number.

    Raises:
        InputError: with the file and the line that is no such row, or that says again what an earlier one says.
    """
    rows: list[Row] = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file, strict=True)
            try:
                if next(lines, None) != list(HEADER):
                    raise ValueError(f"must be {','.join(HEADER)}")
                for fields in lines:
                    rows.append(_parsed(fields))
                    if any(overlap(rows[-1], earlier) for earlier in rows[:-1]):
                        raise ValueError("an earlier row is of the same kernel, arch, columns and precision")
            except (csv.Error, ValueError) as error:
                raise InputError(f"{path}, line {max(lines.line_num, 1)}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return tuple(rows)


def _parsed(fields: list[str]) -> Row:
    if len(fields) != len(HEADER):
        raise ValueError(f"must have {len(HEADER)} fields, not {len(fields)}")
    field = dict(zip(HEADER, fields, strict=True))
    kernel, precisions = field["kernel"], field["precisions"].split()
    if kernel not in KERNELS:
        raise ValueError(f"kernel: must be of {', '.join(KERNELS)}, not {kernel!r}")
    if not precisions or not set(precisions) <= set(PRECISIONS):
        raise ValueError(f"precisions: must be of {', '.join(PRECISIONS)}, not {field['precisions']!r}")
    if (field["programs"] != "") != (kernel in WALKING):
        raise ValueError(f"programs: {'are needed by' if kernel in WALKING else 'must be empty for'} {kernel}")
    if not field["reason"]:
        raise ValueError("reason: is missing")
    columns = _whole("columns", field["columns"]) if field["columns"] else WIDEST
    programs = _whole("programs", field["programs"]) if field["programs"] else 0
    launch = Launch(_power("rows", field["rows"]), _power("warps", field["warps"]), programs)
    return Row(kernel, _whole("arch", field["arch"]), " ".join(precisions), columns, launch, field["reason"])


def _whole(name: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{name}: must be a whole number above 0, not {text!r}")
    return int(text)


def _power(name: str, text: str) -> int:
    if _whole(name, text).bit_count() != 1:
        raise ValueError(f"{name}: must be a power of two, not {text}")
    return int(text)


def overlap(one: Row, other: Row) -> bool:
    """Whether both say how the same thing is launched."""
    same = (one.kernel, one.arch, one.columns) == (other.kernel, other.arch, other.columns)
    return same and not set(one.precisions.split()).isdisjoint(other.precisions.split())


# Reasons are what the compiler said of tiles (`python -m stflow_fast.kernels.aot --tile 64x4`, triton 3.7.1): "least"
# is the fewest instructions per edge of the tiles of 16 to 128 rows and 4 or 8 warps that spill no register, with
# dropout or without. "measured on" and "confirmed on" are what `python -m stflow_fast.kernels.autotune` wrote.
#
# No row lets Hopper's wgmma read a left side from registers, which it does in products of 64 rows or more: ptxas before
# CUDA 13.3 is reported to reuse such registers too early (triton #11781, fla #1262). From 64 rows on, which K above 32
# needs, products are taken in batches of 16 rows (``EdgeShape.batched``), without wgmma; but from Triton 3.9 on, whose
# ptxas is of CUDA 13.4, not those of 64x4.
#
# What a GPU (H200, Triton 3.6) said that counts had not: the edge kernels wait for shared memory and barriers, not for
# instructions (0.23 issued a cycle and scheduler in the bf16 forward of 32 rows and 4 warps). One warp has no barriers,
# and is fastest though it spills: 1.31 ms of 200,000 spots with kept messages (32x1, 184 bytes), 1.69 (16x1, none),
# 2.10 (32x4, none), 2.26 (64x4). ``benchmarks/results/gpu_notes.md`` has all that were tried.
TABLE_PATH = Path(__file__).with_name("launch_table.csv")
TABLE = read_table(TABLE_PATH)

_TRIED: dict[str, Launch] = {}  # of the process, not of a thread: autograd launches from threads of its own


@contextlib.contextmanager
def use_launch(kernel: str, launch: Launch) -> Iterator[None]:
    """Inside the block a kernel is launched so, whatever the table says: by this, launches are timed."""
    before = _TRIED.get(kernel)
    _TRIED[kernel] = launch
    try:
        yield
    finally:
        del _TRIED[kernel]
        if before:
            _TRIED[kernel] = before


def launch_of(kernel: str, arch: int, precision: str, columns: int = 0) -> Launch:
    """How a kernel is launched; ``columns`` where its tile has as many as its tensors."""
    if kernel in _TRIED:
        return _TRIED[kernel]
    if arch == 0:  # the interpreter: a program costs the same, whatever its size
        return Launch(128, 4, 1)
    return _listed(kernel, arch, precision, columns).launch


@functools.cache
def _listed(kernel: str, arch: int, precision: str, columns: int) -> Row:
    return find_row(TABLE, kernel, arch, precision, columns)


def find_row(table: Sequence[Row], kernel: str, arch: int, precision: str, columns: int = 0) -> Row:
    """The row of the newest architecture up to ``arch``, with the fewest columns that suffice."""
    if arch < OLDEST:
        raise InputError(f"device: the Triton kernels need compute capability 8.0 (Ampere) or later, not {arch / 10}")
    rows = [
        row
        for row in table
        if row.kernel == kernel and row.arch <= arch and precision in row.precisions.split() and columns <= row.columns
    ]
    if not rows:
        raise InputError(f"{TABLE_PATH}: has no row for {kernel}, sm_{arch}, {precision}, {columns} columns")
    return max(rows, key=lambda row: (row.arch, -row.columns))


def precision_of(dtype: torch.dtype, name: str = "dtype") -> str:
    """``ieee``, ``tf32``, ``bf16`` or ``fp16``; how float32 multiplies is torch's setting; a refusal names ``name``."""
    if dtype == torch.float32:
        return "tf32" if float32_is_tf32() else "ieee"
    if dtype in (torch.bfloat16, torch.float16):
        return "bf16" if dtype == torch.bfloat16 else "fp16"
    raise InputError(f"{name}: the Triton kernels take float32, bfloat16 or float16, not {dtype}")


def element_size(precision: str) -> int:
    """Bytes of a number."""
    return 2 if precision in ("bf16", "fp16") else 4


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
    if INTERPRETED and (lacks := why_not_interpreted()):
        raise InputError(f"TRITON_INTERPRET: is 1, but {lacks}")


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


def device_scope(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device: make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()

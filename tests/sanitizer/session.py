"""Kernels of tests written for "cuda", run on the CPU from Triton's IR by ttsem, which stops at a fault.

A plugin of pytest, which ``PYTEST_PLUGINS=tests.sanitizer.session`` loads before any kernel, in every worker of xdist.
It pretends that there is a Hopper GPU. A launch raises ``KernelFault`` where a program reads or writes beyond a tensor,
where two programs need an order, or where a result is undefined.

Besides what ttsem does by itself:

* a tensor lies alone: what is far beyond its end is nothing, where in a process's memory it is another tensor;
* a masked load without ``other`` gives NaN, -1 of integers, where ttsem gives zero and a GPU anything;
* a program may not store different values to one place either: its threads keep no order;
* tanh.approx is a tanh rounded to 11 bits, as far off as the instruction may be;
* a launch too large to be checked for races is an error;
* a fault in a function that a kernel calls is said with the lines of the calls;
* kernels are compiled as far as that IR, not to the machine code that nobody runs.
"""

from __future__ import annotations

import collections
import contextlib
import math
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from stflow_fast.kernels import modules
from triton.backends.compiler import GPUTarget
from ttsem import harness, memory, mlir, ops, pidraces, sanitize

HOPPER = 90
architecture = HOPPER
"""By which launches are looked up, and what kernels are compiled for is decided."""

APART = 1 << 40
"""Bytes from one tensor to the next."""
PAGE = 1 << 12

programs: dict[str, int] = {}
"""Kernels launched so far, and the programs of their largest launch."""

_record_launch, _load, _find_race = harness.record_launch, memory.Memory.load, pidraces.find_race
_source_of = sanitize._source_of


def _record_apart(*arguments: Any) -> harness.Recorded:
    recorded = _record_launch(*arguments)
    record = recorded.record
    programs[record.fn_name] = max(math.prod(record.grid), programs.get(record.fn_name, 0))
    moved = {base: number * APART + base % PAGE - base for number, base in enumerate(set(record.bases.values()), 1)}
    record.ptrs = {name: address + moved[record.bases[name]] for name, address in record.ptrs.items()}
    record.bases = {name: base + moved[base] for name, base in record.bases.items()}
    return recorded


def _ir_alone(record: harness.LaunchRecord, stage: str, target: GPUTarget) -> str:
    return mlir.to_generic(harness._stage_text(record, stage, target), None)


def _load_nothing_as_nan(held: memory.Memory, addrs: Any, mask: Any, other: Any, dtype: np.dtype) -> np.ndarray:
    if other is None:  # all bits set are NaN of every float, and -1
        other = np.frombuffer(b"\xff" * np.dtype(dtype).itemsize, dtype)[0]
    return _load(held, addrs, mask, other, dtype)


def _find_race_within(log: list[pidraces.Entry] | None) -> pidraces.PidRace | None:
    stores = collections.defaultdict(list)
    for number, (program, kind, *access) in enumerate(log or ()):
        if kind in ("w", "s"):  # of new values, and of those that were there
            stores[program].append(((program, number), kind, *access))
    return next(filter(None, map(_find_race, (log, *stores.values()))), None)


def _source_through_calls(op: str, *module: str) -> tuple[str, int, str]:
    places = [(file, int(line)) for file, line in re.findall(r'"([^"]+\.py)":(\d+):\d+', op)]
    if not places:
        return _source_of(op, *module)
    calls = (f", called at {Path(file).name}:{line}: {sanitize._line_of(file, line)}" for file, line in places[1:])
    return *places[0], sanitize._line_of(*places[0]) + "".join(calls)


def _tanh_approx(x: Any) -> list[np.ndarray]:
    to_11_bits, _ = ops.PTX_FRAGMENTS["cvt.rna.tf32.f32 $0, $1;"]
    return to_11_bits(np.tanh(x))


def _refuse_unchecked() -> NoReturn:
    raise AssertionError("a launch is too large to be checked for races: make the test smaller")


mlir.enable_generic_printing()
harness.record_launch = _record_apart
harness.ir_for_launch = _ir_alone
memory.Memory.load = _load_nothing_as_nan
pidraces.find_race = _find_race_within
sanitize._source_of = _source_through_calls
ops.PTX_FRAGMENTS["tanh.approx.f32 $0, $1;"] = (_tanh_approx, "div")
_open = contextlib.ExitStack()
_open.enter_context(sanitize.session(HOPPER, on_unchecked=_refuse_unchecked))
# Inside an operator of ours ttsem's tensors are on the CPU, for which kernels would take the interpreter's tiles.
for _module in modules():
    if hasattr(_module, "architecture"):
        _module.architecture = lambda device: architecture


def pytest_unconfigure() -> None:
    _open.close()

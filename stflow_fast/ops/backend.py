"""The choice of what runs the operations: made for each workload, said once, and never changed silently."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..errors import InputError
from ..kernels.conventions import MOST_COLUMNS, MOST_NEIGHBORS, Settings, Sizes, float32_is_tf32
from ..kernels.versions import too_old, why_not_interpreted


class Choice:
    """A setting of the process by environment variable, or of a block of code by context manager."""

    def __init__(self, variable: str, values: tuple[str, ...]) -> None:
        """The first of the values is the default."""
        self.variable, self.values = variable, values
        self._inner: contextvars.ContextVar[str | None] = contextvars.ContextVar(variable, default=None)

    def __call__(self) -> str:
        return self._inner.get() or self._checked(os.environ.get(self.variable, self.values[0]))

    @contextlib.contextmanager
    def use(self, value: str) -> Iterator[None]:
        token = self._inner.set(self._checked(value))
        try:
            yield
        finally:
            self._inner.reset(token)

    def _checked(self, value: str) -> str:
        if value not in self.values:
            raise InputError(
                f"{self.variable}: must be {', '.join(self.values[:-1])} or {self.values[-1]}, not {value!r}"
            )
        return value


_BACKEND = Choice("STFLOW_BACKEND", ("auto", "triton", "reference"))
_COMPILE = Choice("STFLOW_COMPILE", ("off", "on"))


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Choose what runs the operations: ``triton``, ``reference`` (plain torch), or ``auto``: Triton on a CUDA device.

    The environment variable ``STFLOW_BACKEND`` sets the same for a process. The choice is logged once, at level INFO.
    With ``TRITON_INTERPRET=1`` in the environment, ``triton`` runs interpreted on the CPU, slowly, for tests.

    Raises:
        InputError: another name; in the computation, ``triton`` where it cannot run, with the reason.
    """
    return _BACKEND.use(name)


def use_compile(mode: str) -> contextlib.AbstractContextManager[None]:
    """Choose how the CPU runs inference: ``off``, plain torch and the default, or ``on``, blocks by ``torch.compile``.
    The choice is logged once, at level INFO.

    Compiling takes some 20 s, once per configuration and machine, and then saves a tenth of the time (10,000 spots with
    their preparation, two threads of a Xeon: 2.1 s, plain 2.4).

    The environment variable ``STFLOW_COMPILE`` sets the same for a process. Training is never compiled, and neither
    are slides smaller than a compiled block (:data:`stflow_fast.ops.COMPILED_BLOCK` spots).

    Raises:
        InputError: another mode; in the computation, ``on`` where nothing can be compiled.
    """
    return _COMPILE.use(mode)


class EdgeWork(NamedTuple):
    """Edge kernels, and what they are compiled for."""

    kernels: tuple[str, ...]
    sizes: Sizes
    settings: Settings


class Workload(NamedTuple):
    """What the choice depends on."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    k: int = 1
    n_spots: int = 1
    training: bool = False
    edges: EdgeWork | None = None  # what edge kernels are to do


class Backend(NamedTuple):
    name: str  # triton, reference or reference_compiled
    reason: str


def backend_for(workload: Workload) -> Backend:
    """What runs the operations, and why.

    Raises:
        InputError: STFLOW_BACKEND=triton or STFLOW_COMPILE=on cannot be served.
    """
    asked = _BACKEND()
    lacks = "it was asked for" if asked == "reference" else why_not_triton(workload, interpreted=asked == "triton")
    if lacks is None:
        return Backend(
            "triton", "it was asked for" if asked == "triton" else "the device is a GPU that it compiles for"
        )
    if asked == "triton":
        raise InputError(f"STFLOW_BACKEND: is triton, but {lacks}; set it to auto or reference")
    if workload.training:
        return Backend("reference", f"plain torch; {lacks}")
    return _compiled_or_plain(workload, lacks)


def circumstances(device: torch.device) -> tuple[object, ...]:
    """What a captured computation depends on beside its inputs."""
    return _BACKEND(), autocast_dtype(device), float32_is_tf32()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast brings products to on a device; None without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def why_not_triton(workload: Workload, interpreted: bool) -> str | None:
    """What keeps the Triton kernels from a workload, or None; ``interpreted`` lets them run on the CPU."""
    device = workload.device
    if device.type != "cuda" and not (interpreted and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the device is {device.type}"
    if not _triton_is_installed():
        return "triton is not installed"
    if lacks := too_old("triton"):
        return f"{lacks}, from which on its kernels compile"
    if workload.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its kernels do not compute in {workload.dtype}"
    if workload.k > MOST_NEIGHBORS:
        return f"its kernels take up to {MOST_NEIGHBORS} neighbours, not {workload.k}"
    if workload.edges and workload.edges.sizes.e > MOST_COLUMNS:
        return f"its edge kernels take messages of up to {MOST_COLUMNS} columns, not {workload.edges.sizes.e}"
    return _what_a_gpu_lacks(workload) if device.type == "cuda" else why_not_interpreted()


def _what_a_gpu_lacks(workload: Workload) -> str | None:
    if torch.version.hip:
        return "the GPU is not NVIDIA's"
    if torch.cuda.get_device_capability(workload.device) < (8, 0):
        return "the GPU is older than Ampere (compute capability 8.0)"
    if workload.edges and (lacks := _what_shared_memory_lacks(workload, workload.edges)):
        return lacks
    if not c_compiler():
        return "there is no C compiler (gcc or clang), by which it builds its launches"
    return None


def _what_shared_memory_lacks(workload: Workload, edges: EdgeWork) -> str | None:
    from ..kernels.edge_shape import shared_bytes
    from ..kernels.launch import architecture, precision_of

    arch, precision = architecture(workload.device), precision_of(workload.dtype)
    needed = max(shared_bytes(kernel, arch, precision, edges.sizes, edges.settings) for kernel in edges.kernels)
    properties = torch.cuda.get_device_properties(workload.device)
    there = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stub does not list it
    if needed <= there:
        return None
    return (
        f"its edge kernels for {workload.k} neighbours of this width need some {needed >> 10} KiB of shared memory, "
        f"and the GPU has {there >> 10}"
    )


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _compiled_or_plain(workload: Workload, lacks: str) -> Backend:
    """Without gradients and without Triton."""
    if _COMPILE() == "off":
        return Backend("reference", f"plain torch; {lacks}")
    compiler = cpp_compiler()
    if workload.device.type != "cpu":
        lacks = f"it compiles for the CPU, not {workload.device}"
    elif compiler is None:
        lacks = "there is no C++ compiler (g++ or clang++)"
    else:
        return Backend("reference_compiled", f"torch.compile with {compiler}; it was asked for")
    raise InputError(f"STFLOW_COMPILE: is on, but {lacks}; set it to off")


@functools.cache
def announce(backend: Backend) -> None:
    """Say once what runs."""
    logging.getLogger(__name__).info("edge attention by %s: %s", backend.name, backend.reason)


@functools.cache
def c_compiler() -> str | None:
    """The C compiler that Triton would call, or None."""
    candidates = [os.environ["CC"]] if "CC" in os.environ else ["clang", "gcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


@functools.cache
def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would call, or None."""
    candidates = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, candidates)), None)

"""``stflow-fast doctor``: what is installed, what would run and why, what is missing and how to get it."""

from __future__ import annotations

import os
import platform

import torch
from rich.markup import escape
from rich.table import Table

from . import ops
from ._version import __version__
from .devices import choose_device
from .errors import InputError
from .kernels.versions import OLDEST_VERSIONS, installed, too_old
from .threads import thread_count

REQUIRED = (
    "torch",
    "numpy",
    "scipy",
    "pandas",
    "h5py",
    "anndata",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "scikit-learn",
    "matplotlib",
    "typer",
    "rich",
)
OPTIONAL = {
    "triton": "for the kernels on a GPU: pip install triton",
    "spatialdata": "to read and write SpatialData: pip install 'stflow-fast[spatialdata]'",
    "transformers": "to embed patches: pip install 'stflow-fast[embed]'",
    "timm": "to embed patches by UNI, GigaPath, Virchow, H-optimus: pip install timm",
    "scanpy": "to look at predictions: pip install scanpy",
}


def diagnose() -> Table:
    """A table of (what, found, remark)."""
    table = Table(title=f"stflow-fast {__version__}", title_justify="left")
    for heading in ("what", "found", "remark"):
        table.add_column(heading)
    table.add_row("python", platform.python_version(), platform.platform())
    for name in REQUIRED:
        table.add_row(name, installed(name) or "missing", escape(_remark(name, f"pip install {name}")))
    for name, absent in OPTIONAL.items():
        table.add_row(name, installed(name) or "not installed (optional)", escape(_remark(name, absent)))
    table.add_section()
    for row in (_device(), _threads(), *_load(), _backend(), _compiler()):
        table.add_row(*row)
    return table


def _remark(name: str, absent: str) -> str:
    """Of a package: what to do where it is absent or too old."""
    if not installed(name):
        return absent
    old = too_old(name)
    return f"{old}: pip install '{name}>={OLDEST_VERSIONS[name]}'" if old else ""


def _device() -> tuple[str, str, str]:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return (
            "device",
            properties.name,
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        )
    reason = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device or driver"
    return "device", "cpu", reason


def _threads() -> tuple[str, str, str]:
    """Those of the CPU path."""
    count, cores, usable = thread_count(), os.cpu_count() or 1, _usable_cores()
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked:
        remarks = [f"OMP_NUM_THREADS={asked}" if asked == str(count) else "set by torch.set_num_threads"]
    else:
        remarks = ["torch's default" if count == usable else "set by torch.set_num_threads, or torch's default"]
    if usable < cores:
        remarks.append(f"this process may use {usable} of the cores")
    if count > usable:
        remarks.append(f"too many: set OMP_NUM_THREADS={usable}")
    return "threads", f"{count} of {cores} cores", "; ".join(remarks)


def _usable_cores() -> int:
    """Those that an affinity or a container leaves to this process; all where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> list[tuple[str, str, str]]:
    """No row where the system has no load average."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return []
    threads, cores, others = thread_count(), os.cpu_count() or 1, round(load)
    # Every running thread has the same share of the cores.
    times = (threads + others) / max(threads, cores)
    slower = (
        f"expect about {times:.1f} times the time; the result is the same" if times > 1 else "cores enough are free"
    )
    busy = f"{others} other busy process{'es' if others > 1 else ''}: {slower}"
    return [("load", f"{load:.1f} on {cores} cores", busy if others else "idle")]


def _backend() -> tuple[str, str, str]:
    try:
        backend = ops.backend_for(ops.Workload(choose_device()))
    except InputError as error:
        return "edge attention", "cannot run", str(error)
    return "edge attention", backend.name, backend.reason


def _compiler() -> tuple[str, str, str]:
    compiler = ops.cpp_compiler()
    remark = "for torch.compile on the CPU" + ("" if compiler else ", plain torch runs instead: apt install g++")
    return "C++ compiler", compiler or "missing", remark

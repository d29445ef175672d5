"""``stflow-fast doctor``: what is installed, what would run and why, what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

import torch
from rich.table import Table

from . import ops
from ._version import __version__
from .devices import choose_device
from .errors import InputError

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
    "scanpy": "to look at predictions: pip install scanpy",
}


def diagnose() -> Table:
    """A table of (what, found, remark)."""
    table = Table(title=f"stflow-fast {__version__}", title_justify="left")
    for heading in ("what", "found", "remark"):
        table.add_column(heading)
    table.add_row("python", platform.python_version(), platform.platform())
    for name in REQUIRED:
        found = _installed(name)
        table.add_row(name, found or "missing", "" if found else f"pip install {name}")
    for name, remark in OPTIONAL.items():
        found = _installed(name)
        table.add_row(name, found or "not installed (optional)", "" if found else remark)
    table.add_section()
    for row in (_device(), _backend(), _compiler()):
        table.add_row(*row)
    return table


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> tuple[str, str, str]:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return (
            "device",
            properties.name,
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}",
        )
    reason = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device or driver"
    return "device", f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores", reason


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

"""Compiled kernels that travel to a machine with a GPU, and the golden files with them: packed here, unpacked there.

The name of an entry of Triton's cache is made of Triton's own files, of the kernel and what it is compiled for, so that
a GPU is not needed to fill one, nor the Python of that machine. Its files name each other by absolute paths: a cache is
used where it was filled, in :data:`CACHE`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "carried"
ARCHIVE, MANIFEST, SHARED = CARRIED / "triton-cache.tar.gz", CARRIED / "manifest.json", CARRIED / "shared"
CACHE = Path("/tmp/stflow-fast-triton")

SECONDS = 600
"""For all processes that compile."""


def compile_variants(arch: int, processes: int, *rest: str, **environment: str) -> dict[str, Any]:
    """What :mod:`benchmarks.gpu.variants` says, all processes together; the cache is filled, and what is in it stays.

    Raises:
        RuntimeError: a process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.variants", "--arch", str(arch), *rest]
    # One thread each: what they compute is nothing, and threads that wait for each other would take the cores.
    settings = {"TRITON_CACHE_DIR": str(CACHE), "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1", **environment}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    running = [
        subprocess.Popen([*command, "--share", f"{i}/{processes}"], env={**inherited, **settings}, **pipes)
        for i in range(processes)
    ]
    found = []
    try:
        for process in running:
            said, _ = process.communicate(timeout=SECONDS)
            if process.returncode:
                raise RuntimeError(f"benchmarks.gpu.variants failed: {said[-2000:]}")
            found.append(json.loads(said.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return {**found[0], "compiled": sum(each["compiled"] for each in found)}


def pack(manifest: dict[str, Any]) -> None:
    """The cache into an archive, with what tells whether it suits."""
    CARRIED.mkdir(exist_ok=True)
    with tarfile.open(ARCHIVE, "w:gz") as archive:
        archive.add(CACHE, CACHE.name)
    MANIFEST.write_text(json.dumps(manifest, indent=1) + "\n")


def unpack() -> dict[str, Any] | None:
    """The archive to its place, and its manifest; None where nothing travelled."""
    if not (ARCHIVE.exists() and MANIFEST.exists()):
        return None
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(CACHE.parent, filter="data")
    manifest: dict[str, Any] = json.loads(MANIFEST.read_text())
    return manifest

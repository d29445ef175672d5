"""The versions of other packages that the kernels work with. Neither torch nor Triton is needed here."""

from __future__ import annotations

import functools
import importlib.metadata
import re

OLDEST_VERSIONS = {"torch": "2.9", "triton": "3.5"}
"""As in setup.py. Triton 3.3.1 finds no fields in a kernel's constant, 3.4.0 never ends with ``tiles.matmul``, which
calls itself; 3.5 comes with torch 2.9.

``python -m stflow_fast.kernels.aot --default --arch 90``, of 53 variants: 3.5.0 and 3.6.0 compile them all; ``nearest``
spills 32 bytes in both, in 3.5.0 three more with dropout 8 or 16 (the gate's backward in tf32 and ieee, the query-owned
one in tf32); 3.7.1 spills none. Since tiles were measured, of 79: 3.6.0, 3.7.1, 3.8.0 and 3.9.0 compile them all, and
spill 3,112, 3,048, 3,032 and 3,328 bytes in 15, 13, 14 and 14 (``benchmarks/results/triton_versions.md``)."""

OLDEST_INTERPRETER = "3.7"
"""Where a loop begins at ``program_id``, an interpreter before it makes an int of an array of one number, which numpy
refuses from REFUSING_NUMPY on: 3.5.0 and 3.6.0 fail with numpy 2.4.0 and 2.4.6, not with 2.3.5; 3.7.0 and 3.7.1 do
not fail with 2.4.6."""

REFUSING_NUMPY = "2.4"

OLDEST_SAFE_WGMMA = "3.9"
"""From this Triton on Hopper's wgmma may have its left side in registers, which ptxas before CUDA 13.3 is reported to
reuse too early (NVIDIA's release notes; triton #9433, #11781: 61 came out for 64; fla #1262). For sm_90 Triton 3.6.0
and 3.7.1 run ptxas 12.8.93, 3.8.0 12.9.86 and 3.9.0 13.4.59 (triton #11854)."""


@functools.cache
def installed(package: str) -> str | None:
    """Its version; None where there is none, or nobody wrote it down."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (3, 6, 0) of 3.6.0rc1 and of 3.6.0+git1234."""
    beginning = re.match(r"[\d.]*", version)
    return tuple(map(int, re.findall(r"\d+", beginning[0]))) if beginning else ()


def older(version: str, other: str) -> bool:
    """By their releases; what has no number is not older."""
    return () < release(version) < release(other)


def too_old(package: str) -> str | None:
    """That it is older than OLDEST_VERSIONS has it, or None; a version that is not known is no reason."""
    version, oldest = installed(package), OLDEST_VERSIONS.get(package)
    return f"{package} {version} is older than {oldest}" if version and oldest and older(version, oldest) else None


def wgmma_from_registers_is_safe() -> bool:
    """By OLDEST_SAFE_WGMMA; not where Triton's version is not known."""
    return release(installed("triton") or "") >= release(OLDEST_SAFE_WGMMA)


def why_not_interpreted() -> str | None:
    """What keeps Triton's interpreter from the kernels, with the mend, or None."""
    triton, numpy = installed("triton"), installed("numpy")
    if not triton or not numpy or not older(triton, OLDEST_INTERPRETER) or older(numpy, REFUSING_NUMPY):
        return None
    mend = f"install numpy<{REFUSING_NUMPY} or triton>={OLDEST_INTERPRETER}"
    return f"Triton {triton}'s interpreter fails with numpy {numpy}: {mend}"

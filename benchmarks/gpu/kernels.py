"""The first section of ``make gpu``: has the plan's kernels in Triton's cache, those that travelled or newly compiled.

python -m benchmarks.gpu.kernels [--rehearse]
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import triton
from rich.console import Console
from triton.runtime import cache

from stflow_fast.doctor import diagnose

from .cached import compile_variants, unpack
from .variants import digest


def ready(arch: int) -> str:
    """One line of what was done. What travelled is looked for in the cache, and what is not found compiled."""
    travelled, begun, processes = unpack(), time.monotonic(), os.cpu_count() or 1
    made = compile_variants(arch, processes)
    found = made["variants"] - made["compiled"]
    compiled = f"{made['compiled']} compiled by {processes} processes, in {time.monotonic() - begun:.0f} s"
    return f"{suits(travelled)}: {found} of {made['variants']} kernels found, {compiled}"


def suits(travelled: dict[str, Any] | None) -> str:
    """What is known of kernels that travelled, or did not."""
    if travelled is None:
        return "no compiled kernels travelled"
    same = travelled["key"] == digest(cache.triton_key())
    return f"the key of Triton {triton.__version__} is {'' if same else 'not '}that of the cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    Console(width=120).print(diagnose())
    if arguments.rehearse:
        print(f"{suits(unpack())}; kernels are interpreted")
        return
    major, minor = torch.cuda.get_device_capability()
    print(ready(10 * major + minor))


if __name__ == "__main__":
    main()

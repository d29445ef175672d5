"""The first section of ``make gpu``: has the plan's kernels in Triton's cache, those that travelled or newly compiled.

python -m benchmarks.gpu.kernels [--rehearse]
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import triton
from rich.console import Console
from triton.runtime import cache

from stflow_fast.doctor import diagnose

from .cached import compile_variants, sources, unpack
from .variants import digest


def ready(arch: int) -> str:
    """One line of what was done."""
    travelled, key = unpack(), digest(cache.triton_key())
    if travelled and (travelled["key"], travelled["arch"], travelled["sources"]) == (key, arch, sources()):
        return f"{travelled['variants']} kernels travelled: the key of Triton {triton.__version__} is the cache's"
    begun, processes = time.monotonic(), os.cpu_count() or 1
    made = compile_variants(arch, processes)
    return (
        f"{why_not(travelled, key, arch)}: {made['compiled']} of {made['variants']} kernels compiled by {processes} "
        f"processes in {time.monotonic() - begun:.0f} s"
    )


def why_not(travelled: dict | None, key: str, arch: int) -> str:
    """Why those that travelled are not all that is needed."""
    if travelled is None:
        return "no compiled kernels travelled"
    if travelled["key"] != key:
        return f"the key of Triton {triton.__version__} is not that of the cache, of {travelled['triton']}"
    return f"the cache is of sm_{travelled['arch']}" if travelled["arch"] != arch else "the code is not the cache's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    Console(width=120).print(diagnose())
    if arguments.rehearse:
        travelled, key = unpack(), digest(cache.triton_key())
        suits = travelled is not None and travelled["key"] == key
        print(f"kernels are interpreted; those that travelled {'suit' if suits else 'do not suit'} this Triton")
        return
    major, minor = torch.cuda.get_device_capability()
    print(ready(10 * major + minor))


if __name__ == "__main__":
    main()

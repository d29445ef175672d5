"""``make gpu-cache``: the plan's kernels compiled without a GPU for a machine that has one, and the golden files.

python -m benchmarks.gpu.pack --triton 3.6.0 --python 3.12 [--arch 90]

Two wheels of that Triton are fetched into build/gpu: one for this Python, which compiles, and one for that machine's,
whose files make the key of its cache. What travels is written to carried/, and then looked for by a second process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from .cached import ARCHIVE, CACHE, CARRIED, ROOT, SHARED, compile_variants, pack

FETCHED = ROOT / "build" / "gpu"
PLATFORMS = [f"manylinux{year}_x86_64" for year in ("_2_17", "_2_27", "_2_28", "2014")]
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
GOLDEN = ROOT.parent / "shared" / "golden"

MOST_BYTES = 10 * 2**20
"""Of an archive: what travels is small."""


def fetch(triton: str, python: str) -> Path:
    """The folder of a wheel, unpacked."""
    folder = FETCHED / f"triton-{triton}-python-{python}"
    if not folder.exists():
        wheels = FETCHED / "wheels" / folder.name
        platforms = [text for name in PLATFORMS for text in ("--platform", name)]
        which = ["--python-version", python, "--implementation", "cp", *platforms]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *which]
        subprocess.run([*command, "--dest", wheels, f"triton=={triton}"], check=True)
        part = folder.with_suffix(".part")
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(part)
        for tool in (part / "triton" / "backends" / "nvidia" / "bin").iterdir():
            tool.chmod(0o755)  # which Python's unpacking leaves out
        part.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", default="3.6.0", help="that machine's version")
    parser.add_argument("--python", default="3.12", help="that machine's version")
    parser.add_argument("--arch", type=int, default=90, help="compute capability of its GPU")
    arguments = parser.parse_args()
    here, there = (fetch(arguments.triton, python) for python in (THIS_PYTHON, arguments.python))
    shutil.rmtree(CACHE, ignore_errors=True)
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))

    def variants(processes: int) -> dict[str, Any]:
        return compile_variants(arguments.arch, processes, "--wheel", str(there), PYTHONPATH=path)

    made = variants(os.cpu_count() or 1)
    pack({"key": made["key"], **vars(arguments)})
    found = variants(1)
    if GOLDEN.is_dir():
        shutil.copytree(GOLDEN, SHARED / GOLDEN.name, dirs_exist_ok=True)
    golden = "golden files" if GOLDEN.is_dir() else f"no golden files ({GOLDEN} is absent)"
    print(
        f"{made['compiled']} kernels for sm_{arguments.arch}, Triton {arguments.triton} and Python {arguments.python}: "
        f"{ARCHIVE.stat().st_size / 1e6:.1f} MB, and {golden}, in {CARRIED}; "
        f"a second process found {found['variants'] - found['compiled']} of {found['variants']} in the cache"
    )
    return int(found["compiled"] > 0 or ARCHIVE.stat().st_size > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())

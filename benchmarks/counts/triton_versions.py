"""What each Triton makes of the kernels: registers, spills, shared memory, instructions. Compiled without a GPU.

python -m benchmarks triton_versions [--versions 3.6.0,3.7.1,3.8.0,3.9.0] [--arch 90]

unpacks a wheel of each version into build/gpu (the network, once) and compiles with it the default variants of
``stflow_fast.kernels.aot``; with the last version also what is taken in batches of 16 rows, with batches and without.
Writes benchmarks/results/triton_versions.jsonl, and the tables of triton_versions.md between its two marks; the text
around them is written by hand. Nothing here is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from stflow_fast.kernels.launch import SHARED_MEMORY, Launch

from stflow_fast.errors import first_line
from stflow_fast.markdown import table

from ..gpu.cached import ROOT
from ..gpu.pack import FETCHED, THIS_PYTHON, fetch
from ..pages import RESULTS
from ..suite.measure import commit
from .roofline import emitted

MARK = "<!-- tables by python -m benchmarks triton_versions -->"
VERSIONS = "3.6.0,3.7.1,3.8.0,3.9.0"
LINES, PAGE = RESULTS / "triton_versions.jsonl", RESULTS / "triton_versions.md"

BATCHED_TILES = {
    "edge_attention_fwd": ((64, 2), (64, 4), (64, 8), (128, 4), (128, 8)),
    "edge_attention_bwd_query": ((64, 4), (64, 8), (128, 8)),
    "edge_attention_bwd_key": ((64, 4),),
    "edge_messages": ((64, 4),),
}
"""Edges x warps; the first two of the forward are tried by ``autotune``."""

FROM_REGISTERS = " (R)"
"""Behind the figures of a variant whose wgmma reads its left side from registers."""

Line = dict[str, Any]
"""Of a variant that compiled, a variant that did not (``error``), or a version that did not get that far (no
``variant`` either)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", default=VERSIONS, help="of Triton, in the order of the table's columns")
    parser.add_argument("--arch", type=int, choices=SHARED_MEMORY, default=90, help="compute capability")
    parser.add_argument("--compile", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batches", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_here(arguments.arch, arguments.batches, arguments.compile)
        return 0
    versions, made_by = arguments.versions.split(","), commit()
    lines = []
    for version in versions:
        begun = time.monotonic()
        lines += (found := lines_of(version, arguments.arch, batches=version == versions[-1]))
        n_failed = sum("error" in line for line in found)
        print(
            f"triton {version}: {len(found) - n_failed} compiled, {n_failed} failed, {time.monotonic() - begun:.0f} s",
            file=sys.stderr,
        )
    before, _, after = PAGE.read_text().split(MARK)
    told = f"By commit {made_by}, for sm_{arguments.arch}."
    PAGE.write_text(MARK.join([before, f"\n\n{told}\n\n{tables(lines)}\n\n", after]))
    LINES.write_text("".join(json.dumps({"commit": made_by, **line}) + "\n" for line in lines))
    return int(any("error" in line for line in lines))


def lines_of(version: str, arch: int, batches: bool) -> list[Line]:
    """What a process that imports this Triton compiles."""
    try:
        wheel = fetch(version, THIS_PYTHON)
    except (subprocess.CalledProcessError, OSError) as error:
        ended = f"pip ended with {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else None
        return [{"triton": version, "error": f"no wheel: {ended or first_line(error)}"}]
    shutil.rmtree(FETCHED / "wheels" / wheel.name, ignore_errors=True)  # 0.2 GB each, and unpacked
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(wheel), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines"
        file.touch()
        command = [sys.executable, "-m", "benchmarks", "triton_versions", "--arch", str(arch), "--compile", str(file)]
        settings = {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *(["--batches"] if batches else [])],
            cwd=ROOT,
            env={**inherited, **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        return read(file.read_text(), version, done.returncode, done.stderr)


def read(text: str, version: str, code: int, said: str) -> list[Line]:
    """The lines that a process wrote, and one of its end where that was a bad one."""
    lines = [json.loads(line) for line in text.splitlines()]
    if code:
        last = next(reversed(said.strip().splitlines()), "nothing said")
        after = f" after {lines[-1]['variant']}" if lines else ""
        lines.append({"triton": version, "error": f"the process ended with {code}{after}: {last}"})
    return lines


def compile_here(arch: int, batches: bool, file: Path) -> None:
    """Into ``file``, a line of JSON for each variant, as this process's Triton compiles it."""
    import triton
    from stflow_fast.kernels import aot
    from triton.backends.nvidia.compiler import get_ptxas_version

    told = {"triton": triton.__version__, "ptxas": cuda_of(get_ptxas_version(arch)), "arch": arch}
    with file.open("w") as out:
        for extra, variant in (*default_variants(arch), *(batch_variants(arch) if batches else ())):
            try:
                row = aot.compile_variant(variant, arch)
                line = {**figures_of(row), "faults": aot.faults(row)}
            except Exception as error:
                line = {"error": f"{type(error).__name__}: {first_line(error)}"}
            print(json.dumps({**told, "variant": variant.name, **extra, **line}), file=out, flush=True)


def default_variants(arch: int) -> Iterator[tuple[Line, Any]]:
    from stflow_fast.kernels.aot_variants import edge_variants, variants_of_spots

    for variant in (*edge_variants(arch), *variants_of_spots(arch)):
        if variant.default:
            yield {}, variant


def batch_variants(arch: int) -> Iterator[tuple[Line, Any]]:
    """Of 64 rows and more in bf16 and tf32, with batches and without: more than 32 neighbours, launched by the table,
    and BATCHED_TILES."""
    from stflow_fast.kernels.aot_variants import edge_variants

    for batched in (True, False):
        with taken_in_batches(batched):
            found = [variant for variant in edge_variants(arch) if variant.name.endswith(" K=64")]
            for kernel, tile in ((kernel, tile) for kernel, tiles in BATCHED_TILES.items() for tile in tiles):
                tiled = edge_variants(arch, Launch(*tile))
                found += [variant for variant in tiled if variant.default and variant.name.startswith(kernel)]
        for variant in found:
            if variant.launch.rows >= 64 and variant.name.split()[1] in ("bf16", "tf32"):
                yield {"batched": batched}, variant


@contextlib.contextmanager
def taken_in_batches(batched: bool) -> Iterator[None]:
    """Shapes that are made inside say so of their products, whatever the version's rule."""
    from stflow_fast.kernels import edge_shape

    made = edge_shape._edge_shape

    def shape(*arguments: Any) -> Any:
        found = made(*arguments)
        return replace(found, batched=found.rows if batched else 0)

    with mock.patch.object(edge_shape, "_edge_shape", shape):
        yield


def cuda_of(said: str) -> str:
    """12.8.93, of what ``ptxas --version`` says."""
    return str(re.findall(r"\bV(\d+(?:\.\d+)+)", said)[0])


def figures_of(row: Line) -> Line:
    """What is kept of a row of ``aot``; instructions of threads per edge, edge and head, or spot."""
    per_row = emitted(row)
    weighted, once = row["weighted_instructions"], row["instructions"]
    counted = weighted or once
    return {
        **{name: row[name] for name in ("tile", "warps", "registers", "spill_bytes", "shared_bytes")},
        "instructions": sum(once.values()),
        "per_row": None if math.isnan(per_row) else per_row,
        "wgmma": counted.get("HGMMA", 0) + counted.get("HGMMA.R", 0),
        "wgmma_from_registers": counted.get("HGMMA.R", 0),
        "mma": counted.get("HMMA", 0),
        "barriers": counted.get("BAR", 0),
    }


def tables(lines: list[Line]) -> str:
    """Markdown: versions, what failed, default variants, batches."""
    default = [line for line in lines if "batched" not in line]
    versions = list(dict.fromkeys(line["triton"] for line in lines))
    failed = [
        f"* {line['triton']}, {line.get('variant', 'the version')}{in_words(line)}: {line['error']}"
        for line in lines
        if "error" in line
    ]
    faults = [
        f"* {line['triton']}, {line['variant']}: {'; '.join(line['faults'])}" for line in default if line.get("faults")
    ]
    parts = [
        "## Versions",
        version_table(default, versions),
        "What failed:" if failed else "Nothing failed to compile.",
        "\n".join(failed),
        "What `aot` calls a fault of a default variant:" if faults else "`aot` finds no fault.",
        "\n".join(faults),
        "## Default variants: registers / bytes spilled / bytes of shared memory / instructions per row",
        variant_table(default, versions),
        "## In batches of 16 rows, and not",
        batch_table([line for line in lines if "batched" in line]),
    ]
    return "\n\n".join(filter(None, parts))


def in_words(line: Line) -> str:
    return {True: " in batches", False: " not in batches", None: ""}[line.get("batched")]


def compiled(lines: Iterable[Line], version: str) -> dict[str, Line]:
    """By variant."""
    return {line["variant"]: line for line in lines if line["triton"] == version and "error" not in line}


def version_table(lines: list[Line], versions: list[str]) -> str:
    first, rows = compiled(lines, versions[0]), []
    for version in versions:
        found = compiled(lines, version)
        spills = [line["spill_bytes"] for line in found.values() if line["spill_bytes"]]
        ptxas = next((line["ptxas"] for line in found.values()), "")
        ratios = [mean_ratio(found, first, field) for field in ("per_row", "shared_bytes")]
        rows.append([version, ptxas, str(len(found)), str(len(spills)), f"{sum(spills):,}", *ratios])
    head = ["triton", "ptxas", "compiled", "of them spill", "bytes in all"]
    return table([*head, f"instructions per row, {versions[0]} = 1", f"shared memory, {versions[0]} = 1"], rows)


def mean_ratio(found: dict[str, Line], first: dict[str, Line], field: str) -> str:
    """Geometric, over the variants of which both have such a figure."""
    ratios = [
        line[field] / first[name][field] for name, line in found.items() if line[field] and has(first, name, field)
    ]
    return f"{statistics.geometric_mean(ratios):.3f}" if ratios else ""


def has(lines: dict[str, Line], name: str, field: str) -> bool:
    return bool(lines.get(name, {}).get(field))


def variant_table(lines: list[Line], versions: list[str]) -> str:
    by_version = {version: compiled(lines, version) for version in versions}
    shown = {line["variant"]: line for found in reversed(by_version.values()) for line in found.values()}
    rows = [
        [f"`{name}`", tile_of(shown[name]), *(cell(found.get(name)) for found in by_version.values())]
        for name in dict.fromkeys(line["variant"] for line in lines if line.get("variant") in shown)
    ]
    return table(["variant", "tile x warps", *versions], rows)


def tile_of(line: Line) -> str:
    return f"{line['tile']}x{line['warps']}"


def cell(line: Line | None) -> str:
    """255 / 184 / 14,336 / 13,127; instructions that are counted once each, where loops are not those of the source, in
    brackets."""
    if line is None:
        return "failed"
    counted = f"({line['instructions']:,})" if line["per_row"] is None else f"{line['per_row']:,.0f}"
    mark = FROM_REGISTERS if line["wgmma_from_registers"] else ""
    return f"{line['registers']} / {line['spill_bytes']} / {line['shared_bytes']:,} / {counted}{mark}"


def batch_table(lines: list[Line]) -> str:
    """Of the last version, pairs of a variant and tile."""
    pairs: dict[tuple[str, str], dict[bool, Line]] = {}
    for line in lines:
        if "error" not in line:
            pairs.setdefault((line["variant"], tile_of(line)), {})[line["batched"]] = line
    rows = []
    for (name, tile), pair in pairs.items():
        if len(pair) == 2:
            whole, batched = pair[False], pair[True]
            counts = [f"{each['mma']} / {each['wgmma']} / {each['barriers']}" for each in (batched, whole)]
            rows.append([f"`{name}`", tile, cell(batched), cell(whole), *counts])
    head = ["variant", "tile x warps", "in batches", "not", "mma / wgmma / barriers, in batches", "not"]
    return table(head, rows)

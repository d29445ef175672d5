"""Compile every kernel for GPUs that are not there, and read what the compiler made of it.

    python -m stflow_fast.kernels.aot --arch 80,90 --json FILE

writes one row for each kernel, variant and architecture: registers, spilled bytes, shared memory, instructions by kind
(each once, and weighted by how often its loops run in a program), and the work that the mathematics asks for per edge.
The exit code is 1 when a variant needs more shared memory than there is (an edge kernel: than was estimated, by which a
GPU with less is refused), or its wgmma reads from registers (see ``launch.py``), or a default one spills more than
SMALL_SPILL, or needs so
much that two programs do not fit onto one multiprocessor; of a launch that was measured on a GPU, the time decides, and
it may spill. ``--default`` compiles those alone. ``--tile 64x4`` (edges x
warps) compiles the edge kernels with another tile than that of the launch table: so its first rows were made, and those
that ``autotune`` measures on a GPU can be looked into.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .aot_variants import Variant, edge_variants, variants_of_spots
from .launch import INTERPRETED, RESERVED, SHARED_MEMORY, Launch
from .versions import wgmma_from_registers_is_safe

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.\w+)*)([^;]*);")
LABEL = re.compile(r"^(\.L_\w+):")
FROM_REGISTERS = "HGMMA.R"
"""Hopper's wgmma with its left side in registers: a fault before Triton 3.9, see ``launch.py``."""

SMALL_SPILL = 16
"""Bytes of a thread that are no fault. Of the measured tiles, those that spill 176 to 616 are the fastest (H200)."""

BY_WIDTH = ("LDG", "STG", "LDS", "STS", "LDL", "STL")


def compile_variant(variant: Variant, arch: int) -> dict[str, Any]:
    """One row: what the compiler made of a variant."""
    names = variant.kernel.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if variant.types[name].startswith("*")}
    source = ASTSource(variant.kernel, {name: variant.types[name] for name in names}, constants, aligned)
    options = {**variant.launch.options, "enable_fp_fusion": variant.fused}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    once, weighted = count_instructions(sass, variant.trips)
    return {
        "kernel": variant.kernel.__name__,
        "variant": variant.name,
        "default": variant.default,
        "measured": variant.measured,
        "arch": arch,
        "tile": variant.launch.rows,
        "warps": variant.launch.warps,
        "registers": _used("REG", usage),
        "spill_bytes": _used("STACK", usage),  # no kernel has arrays of its own on the stack
        "shared_bytes": compiled.metadata.shared,
        "estimated_shared_bytes": variant.estimate,
        "instructions": once,
        "weighted_instructions": weighted,
        "rows": variant.rows,
        "triton": triton.__version__,
        "work_per_row": variant.work,
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([BINARIES / name, *arguments], capture_output=True, text=True, check=True).stdout


def _used(name: str, usage: str) -> int:
    """A number of what cuobjdump says of a kernel's resources."""
    found = re.search(rf"{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump says no {name}: {usage}")
    return int(found[1])


def count_instructions(sass: str, trips: tuple[int, ...] | None) -> tuple[dict[str, int], dict[str, int] | None]:
    """Instructions by kind, and weighted by the trips of the loops that hold them; None where the loops that are found
    are not the loops of the source, because the compiler unrolled or split one."""
    found: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        label, instruction = LABEL.match(line), INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(found)
        if not instruction:
            continue
        _, name, modifiers, operands = instruction.groups()
        if name in BY_WIDTH:
            width = re.search(r"\.(128|64|U?S?16|U?S?8)\b", modifiers)
            name += "." + (width[1].lstrip("US") if width else "32")
        if name == "HGMMA" and not operands.split(",")[1].lstrip().startswith("gdesc"):
            name = FROM_REGISTERS
        target = re.search(r"`\((\.L_\w+)\)", operands) if name == "BRA" else None
        if target and target[1] in labels and labels[target[1]] < len(found):
            loops.append((labels[target[1]], len(found)))
        found.append((name, len(found)))
    once = collections.Counter(name for name, _ in found)
    heads = sorted({head: max(stop for start, stop in loops if start == head) for head, _ in loops}.items())
    if trips is None or len(heads) != len(trips):
        return dict(once.most_common()), None
    weighted: collections.Counter[str] = collections.Counter()
    for name, place in found:
        times = 1
        for (head, stop), trip in zip(heads, trips, strict=True):
            if head <= place <= stop:
                times *= trip
        weighted[name] += times
    return dict(once.most_common()), dict(weighted.most_common())


def faults(row: dict[str, Any]) -> list[str]:
    """What no variant may have: more shared memory than there is, or than the estimate by which it is refused, or, by
    the launch table, a wgmma that reads from registers before Triton 3.9; and no default one: spills, or so much shared
    memory that two programs do not fit."""
    shared, estimate, most, found = row["shared_bytes"], row["estimated_shared_bytes"], SHARED_MEMORY[row["arch"]], []
    if row["default"] and row["spill_bytes"] > SMALL_SPILL and not row["measured"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if estimate is not None and estimate < shared:
        found.append(f"needs {shared} bytes of shared memory; {estimate} were estimated")
    if estimate is not None and FROM_REGISTERS in row["instructions"] and not wgmma_from_registers_is_safe():
        found.append("wgmma reads a left side from registers")
    if row["default"] and 2 * (shared + RESERVED) > most:
        found.append(f"needs {shared} bytes of shared memory; two programs do not fit")
    elif row["default"] and estimate is not None and estimate + RESERVED > most:
        found.append(f"is refused, for {estimate} bytes of shared memory were estimated")
    elif shared + RESERVED > most:
        found.append(f"needs {shared} bytes of shared memory; there is no room for it")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="80,90", help="compute capabilities, such as 80,90")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--default", action="store_true", help="the default variants alone")
    parser.add_argument("--tile", type=_tile, help="of the edge kernels, such as 64x4 for 64 edges and 4 warps")
    parser.add_argument("--match", default="", help="variants whose name holds this text")
    arguments = parser.parse_args()
    if INTERPRETED:
        sys.exit("TRITON_INTERPRET: is 1, and interpreted kernels are not compiled; unset it")
    rows = []
    archs = [int(arch) if arch.isdigit() else 0 for arch in arguments.arch.split(",")]
    if not set(archs) <= set(SHARED_MEMORY):
        parser.error(f"--arch: must be of {', '.join(map(str, SHARED_MEMORY))}, not {arguments.arch}")
    for arch in archs:
        others = () if arguments.tile else variants_of_spots(arch)
        for variant in (*edge_variants(arch, arguments.tile), *others):
            if arguments.match in variant.name and (variant.default or not arguments.default):
                rows.append(compile_variant(variant, arch))
                print(summary(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if any(map(faults, rows)):
        sys.exit("a variant spills, needs too much shared memory, or reads what it must not from registers")


def _tile(text: str) -> Launch:
    size = re.fullmatch(r"(16|32|64|128)x(1|2|4|8|16)", text)
    if not size:
        raise argparse.ArgumentTypeError(f"must be such as 64x4, powers of two from 16x1 to 128x16, not {text}")
    return Launch(int(size[1]), int(size[2]))


def summary(row: dict[str, Any]) -> str:
    """One line for a person."""
    weighted = row["weighted_instructions"]
    per_row = f"{32 * row['warps'] * sum(weighted.values()) / row['rows']:7.0f} per row" if weighted else ""
    total = sum(row["instructions"].values())
    return (
        f"sm_{row['arch']} {row['variant']:52} M={row['tile']:<4} warps {row['warps']:<3} "
        f"registers {row['registers']:3} spill {row['spill_bytes']:4} shared {row['shared_bytes']:6} "
        f"instructions {total:6} {per_row} {'; '.join(faults(row))}"
    )


if __name__ == "__main__":
    main()

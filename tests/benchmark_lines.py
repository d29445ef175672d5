"""Lines of the benchmark suite as tests make them up."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

SPOTS = (1_000, 10_000, 30_000, 100_000)


def line(provider: str = "reference", spots: int = 10_000, ms: float | None = 100.0, **changed) -> dict:
    return {
        **{"workload": "sample", "provider": provider, "layout": "visium_jittered", "spots": spots, "k": 8},
        **{
            "genes": 50,
            "dtype": "float32",
            "threads": 2,
            "busy": 0,
            "busy_nice": 0,
            "rounds": 5,
            "cold_l2_ms": None,
            "prepare_ms": ms and 1.0,
        },
        **{"arithmetic": changed.get("dtype", "float32"), "alone": False},
        **{"device_ms": None, "device_kernels": None, "floor_ms": None},
        **{"median_ms": ms, "p20_ms": ms and 0.9 * ms, "p80_ms": ms and 1.1 * ms, "compile_s": ms and 0.1},
        **{"peak_bytes": None if ms is None else 1000 * spots, "reserved_bytes": None, "device_bytes": None},
        **{"spots_per_s": ms and 1e3 * spots / ms, "of_floor": None, "relative_error": 1e-7, "tolerance": 1e-5},
        **{"check": "green" if ms else "not compared", "note": "", "device": "Some CPU, 2 cores", "load": 0.25},
        **{"versions": {"python": "3.11.7", "torch": "2.13.0"}, "commit": "0123456789ab"},
        **{"date": "2026-11-25T04:00:00+00:00"},
        **changed,
    }


def share(of_floor: float) -> dict:
    return {"of_floor": of_floor, "peak_flops_per_s": 2e11, "peak_copy_bytes_per_s": 2e10}


def out_of_memory(provider: str, spots: int) -> dict:
    return line(provider, spots, None, note="it needs 60.3 GiB, over the budget of 16.0 GiB")


def some_lines() -> list[dict]:
    """Ours of slope 1, the published code of slope 2 until memory is out, one provider that cannot run here."""
    ours = [line("reference", spots, 0.01 * spots) for spots in SPOTS]
    eager = [line("eager_stflow", spots, 1e-6 * spots**2) for spots in SPOTS[:3]]
    dense = out_of_memory("dense_attention", 1_000)
    nowhere = line("triton", 10_000, None, note="there is no CUDA device")
    return [*ours, *eager, out_of_memory("eager_stflow", SPOTS[3]), dense, nowhere]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


def shown(table, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


DAY_BEFORE = {"date": "2026-11-24T04:00:00+00:00"}


def of_machines(**changed) -> list[dict]:
    """Ours and the published code at 10,000 spots, with one thread and two, beside nothing and two busy processes."""
    beside = {"busy": 2, "load": 4.0}
    return [
        *(line("reference", ms=190.0, threads=1, **changed), line("reference", ms=100.0, **changed)),
        *(line("eager_stflow", ms=700.0, threads=1, **changed), line("eager_stflow", ms=400.0, **changed)),
        *(line("reference", ms=210.0, **beside, **changed), line("eager_stflow", ms=2_000.0, **beside, **changed)),
        line("reference", ms=120.0, busy_nice=10, **beside, **changed),
        line("reference", ms=300.0, threads=1, **beside, **changed),
    ]

"""A cohort of synthetic slides, some broken, predicted as a person would: slides a minute, the share of the time that
is computation, and memory over the run.

    python -m benchmarks cohort FOLDER [--slides 2000] [--broken 40] [--spots 500,20000] [--workers N]
    python -m benchmarks cohort FOLDER --kill 20   SIGKILL at so many random moments, resumed each time

Slides are made once in FOLDER/slides. 2,000 slides take ten minutes of two cores; JSON is printed at the end, nothing
before. A run that was killed, the main process alone or all of them, is held against FOLDER/out: the same files with
the same X. "done_twice" counts slides with two lines: none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import psutil
import torch

from stflow_fast import Denoiser, DenoiserConfig
from stflow_fast.cohort import read_lines
from stflow_fast.pretrained import Provenance

FEATURES, GENES, PIECE = 1024, 50, 4096
EVERY = 0.2
"""Seconds between looks at memory."""


def make_model(folder: Path, n_genes: int) -> Path:
    """Of the default size, with random weights."""
    if not folder.exists():
        torch.manual_seed(0)
        names = tuple(f"gene_{i}" for i in range(n_genes))
        Denoiser(DenoiserConfig(n_genes, FEATURES), Provenance(names, "synthetic")).eval().save_pretrained(folder)
    return folder


def make_slide(path: Path, n: int, columns: int = FEATURES, spoilt: bool = False) -> Path:
    """TRIDENT's layout, on a square lattice; the same float16 features every 4,096 spots. ``spoilt``: one is NaN."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    piece = np.random.default_rng(0).standard_normal((PIECE, columns), dtype=np.float32).astype(np.float16)
    coords = 256 * np.stack(np.divmod(np.arange(n), int(np.ceil(np.sqrt(n)))), axis=1)
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (n, columns), np.float16, chunks=(min(n, 256), columns))
        for first in range(0, n, PIECE):
            features[first : first + PIECE] = piece[: n - first]
        if spoilt:
            features[n // 2, 5] = np.nan
        file.create_dataset("coords", data=coords).attrs.update({"patch_size_level0": 256, "patch_size": 256})
    return path


def make_slides(folder: Path, count: int, broken: int, spots: tuple[int, int]) -> Path:
    """Sizes spread on a logarithmic axis; broken ones are cut, empty, NaN or too narrow."""
    draw = np.random.default_rng(0)
    least, most = map(float, np.log(spots))
    sizes = np.exp(draw.uniform(least, most, count)).astype(int)
    faults = draw.choice(count, broken, replace=False).tolist()
    for number, n in enumerate(sizes.tolist()):
        path = folder / f"slide_{number:05d}.h5"
        if path.exists():
            continue
        fault = faults.index(number) % 4 if number in faults else None
        make_slide(path, n, 100 if fault == 3 else FEATURES, spoilt=fault == 2)
        if fault is not None and fault < 2:
            os.truncate(path, 0 if fault else path.stat().st_size // 2)
    return folder


def predict(model: Path, slides: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "stflow_fast", "predict", str(model), str(slides), "--out", str(out), *flags]


def watched(command: list[str]) -> tuple[int, float, list[float]]:
    """Exit code, seconds, and the memory of all processes, GB, as it went."""
    begun, memory = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            memory.append(_resident(root) / 1e9)
            time.sleep(EVERY)
    return process.returncode, time.monotonic() - begun, memory


def _resident(root: psutil.Process) -> int:
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def load(arguments: argparse.Namespace) -> dict[str, Any]:
    """One run over all."""
    model, slides = prepared(arguments)
    flags = ["--overwrite", *(["--workers", str(arguments.workers)] if arguments.workers else [])]
    code, seconds, memory = watched(predict(model, slides, arguments.folder / "out", *flags))
    lines = list(read_lines(arguments.folder / "out").values())
    done = [line for line in lines if line.is_done]
    workers = arguments.workers or len(os.sched_getaffinity(0))
    quarter = len(memory) // 4
    return {
        "slides": len(lines),
        "failed": len(lines) - len(done),
        "exit_code": code,
        "spots": sum(line.spots for line in done),
        "seconds": round(seconds, 1),
        "slides_per_minute": round(60 * len(lines) / seconds, 1),
        "share_computing": round(sum(line.computing or 0.0 for line in done) / (seconds * workers), 3),
        "peak_gb": round(max(memory), 2),
        "peak_gb_by_quarter": [round(max(memory[i * quarter : (i + 1) * quarter]), 2) for i in range(4)],
        "page_mb": round((arguments.folder / "out" / "index.html").stat().st_size / 1e6, 2),
    }


def kill(arguments: argparse.Namespace) -> dict[str, Any]:
    """Killed at random moments, and resumed each time."""
    model, slides = prepared(arguments)
    whole, out = arguments.folder / "out", arguments.folder / "killed"
    _, seconds, _ = watched(predict(model, slides, whole, "--overwrite"))
    draw, killed = random.Random(0), 0
    for number in range(arguments.kill):
        process = subprocess.Popen(
            predict(model, slides, out, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(draw.uniform(2.0, 2.0 + 2 * seconds / arguments.kill))
        except subprocess.TimeoutExpired:
            workers = psutil.Process(process.pid).children()
            for each in [process, *(workers if number % 2 else [])]:
                each.kill()
            process.wait()
            killed += 1
    watched(predict(model, slides, out, "--resume"))
    lines = [line for path in (out / "states").iterdir() for line in path.read_text().splitlines()]
    done = [json.loads(line)["slide"] for line in lines if '"status": "done"' in line]
    left = [path.name for path in out.rglob("*") if ".part" in path.name]
    return {
        "killed": killed,
        "slides": len(read_lines(out)),
        "equal": values(out) == values(whole),
        "done_twice": len(done) - len(set(done)),
        "half_written": left,
    }


def values(out: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(anndata.read_h5ad(path).X).tobytes() for path in sorted(out.glob("*.h5ad"))}


def prepared(arguments: argparse.Namespace) -> tuple[Path, Path]:
    least, most = map(int, arguments.spots.split(","))
    model = make_model(arguments.folder / "model", GENES)
    return model, make_slides(arguments.folder / "slides", arguments.slides, arguments.broken, (least, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slides", type=int, default=2000)
    parser.add_argument("--broken", type=int, default=40)
    parser.add_argument("--spots", default="500,20000", help="the fewest and the most")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--kill", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(kill(arguments) if arguments.kill else load(arguments)))

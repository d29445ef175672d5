"""What reading a slide costs: time against the bytes alone, and memory above the features' own blocks.

python -m benchmarks reading --folder /tmp/reading

Writes a slide of 605,471 patches with 1,536 features as TRIDENT leaves it (4 GB; once), and 2,000 small ones; then
benchmarks/results/reading.json and reading.md. Every figure is of a process of its own, with the file in the system's
cache, and the shortest of three where it takes seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from stflow_fast.config import DenoiserConfig
from stflow_fast.files import atomic_path, write_json
from stflow_fast.markdown import table
from stflow_fast.model import Denoiser
from stflow_fast.sampling import sample
from stflow_fast.slides import StoredRows, read, recognise
from stflow_fast.slides.stores import READ_AT_ONCE

from ..pages import RESULTS
from ..suite import measure

SPOTS, COLUMNS, SMALL_FILES = 605_471, 1_536, 2_000
ROWS = 1024
TRIALS = 3
PITCH = 512


def write_slide(path: Path, spots: int, columns: int) -> None:
    """As ``save_h5`` of TRIDENT writes it: tables that can grow, a chunk a row."""
    if path.exists():
        return
    generator = np.random.default_rng(spots)
    side = int(np.ceil(np.sqrt(spots)))
    corners = np.stack(np.divmod(np.arange(spots), side)[::-1], axis=1) * PITCH
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        growing = {"maxshape": (None, columns), "chunks": (1, columns), "dtype": "f4"}
        features = file.create_dataset("features", (spots, columns), **growing)
        features.attrs["encoder"] = "benchmark"
        for start in range(0, spots, 8192):
            rows = min(8192, spots - start)
            features[start : start + rows] = generator.standard_normal((rows, columns), dtype=np.float32)
        coords = file.create_dataset("coords", data=corners, maxshape=(None, 2), chunks=(1, 2))
        coords.attrs.update(patch_size=256, patch_size_level0=PITCH, level0_magnification=40, target_magnification=20)


def bytes_alone(path: Path) -> float:
    """Seconds to read both tables by h5py, piece by piece into one buffer, which is the quickest way."""
    started = time.perf_counter()
    with h5py.File(path, "r") as file:
        for table in (file["features"], file["coords"]):
            buffer = np.empty((ROWS, table.shape[1]), dtype=table.dtype)
            for start in range(0, len(table), ROWS):
                stop = min(start + ROWS, len(table))
                table.read_direct(buffer, np.s_[start:stop], np.s_[: stop - start])
    return time.perf_counter() - started


def by_reader(path: Path) -> float:
    """Seconds to read the slide, with all its checks, and then every block of its features, as sampling does."""
    started = time.perf_counter()
    features = read(path).features
    assert isinstance(features, StoredRows), "read in blocks"
    buffer = np.empty((ROWS, features.columns), dtype=np.float32)
    for rows in features.blocks():
        features.read_into(buffer[: rows.stop - rows.start], rows.start)
    return time.perf_counter() - started


def memory_of_reader(path: Path) -> int:
    """Bytes resident at the most while :func:`by_reader` runs, above what was there, less one block of features."""
    return measure.resident_peak(lambda: by_reader(path)) - READ_AT_ONCE


def recognising(folder: Path) -> float:
    """Seconds for all files of a folder."""
    started = time.perf_counter()
    for path in sorted(folder.iterdir()):
        recognise(path)
    return time.perf_counter() - started


def predicting(path: Path, in_memory: bool) -> tuple[float, int]:
    """Seconds and bytes of one prediction by the default model of random weights; those of reading are within it."""
    torch.manual_seed(0)
    slide = read(path)
    model = Denoiser(DenoiserConfig(n_genes=50, feature_dim=slide.feature_dim)).eval()
    seconds = []

    def predict() -> None:
        started = time.perf_counter()
        features: Any = torch.from_numpy(np.asarray(slide.features)) if in_memory else slide.features
        sample(model, (features, slide.coords))
        seconds.append(time.perf_counter() - started)

    peak = measure.resident_peak(predict)
    return seconds[0], peak


def shortest(function: Callable[..., float], *arguments: Any) -> float:
    return min(float(measure.in_own_process(function, *arguments)) for _ in range(TRIALS))


def measured(folder: Path, spots: int, predicted: bool) -> dict[str, Any]:
    large, small = folder / f"slide_{spots}.h5", folder / "small"
    write_slide(large, spots, COLUMNS)
    for number in range(SMALL_FILES):
        write_slide(small / f"{number}.h5", 100, 8)
    bytes_alone(large)  # into the cache
    found = {
        "spots": spots,
        "columns": COLUMNS,
        "bytes_alone_s": shortest(bytes_alone, large),
        "reader_s": shortest(by_reader, large),
        "reader_bytes": measure.in_own_process(memory_of_reader, large),
        "recognised_files": SMALL_FILES,
        "recognise_s": shortest(recognising, small),
        **measure.provenance(torch.device("cpu")),
    }
    for name, in_memory in (("on_disk", False), ("in_memory", True)) if predicted else ():
        found[f"predict_{name}_s"], found[f"predict_{name}_bytes"] = measure.in_own_process(
            predicting, large, in_memory
        )
    return found


def describe(found: dict[str, Any]) -> str:
    ratio = found["reader_s"] / found["bytes_alone_s"]
    size = found["spots"] * found["columns"] * 4 / 1e9
    rows = [
        ["its bytes alone, by h5py", f"{found['bytes_alone_s']:.2f} s"],
        ["read: checks, names, centres, and every block of features", f"{found['reader_s']:.2f} s, {ratio:.2f}x"],
        ["peak memory above a block of features", f"{found['reader_bytes'] / 1e6:.0f} MB"],
        [f"recognising {found['recognised_files']:,} files", f"{found['recognise_s']:.2f} s"],
    ]
    for name, said in (("on_disk", "features on the disk"), ("in_memory", "features read into memory first")):
        if f"predict_{name}_s" in found:
            seconds, peak = found[f"predict_{name}_s"], found[f"predict_{name}_bytes"]
            rows.append([f"predicting it (50 genes, default model), {said}", f"{seconds:.0f} s, {peak / 1e9:.2f} GB"])
    said = (
        f"{found['spots']:,} patches with {found['columns']:,} float32 features ({size:.2f} GB) in a file of TRIDENT's"
    )
    made = f"{found['device']}; commit {found['commit']}"
    return f"# Reading\n\n{said}. {made}. Again: `python -m benchmarks reading`.\n\n{table(['what', 'cost'], rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/reading"), help="where files are made, and kept")
    parser.add_argument("--spots", type=int, default=SPOTS)
    parser.add_argument("--no-predict", action="store_true", help="without the two predictions, minutes each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = measured(arguments.folder, arguments.spots, not arguments.no_predict)
    write_json(arguments.out / "reading.json", found)
    with atomic_path(arguments.out / "reading.md") as temporary:
        temporary.write_text(describe(found))
    print(json.dumps(found, indent=2))

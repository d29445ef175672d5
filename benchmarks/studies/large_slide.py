"""One very large slide, predicted from its file by the command: the memory it takes, by numbers of genes.

    python -m benchmarks large_slide FOLDER [--spots 100000] [--genes 50,2000,18000] [--memory-budget 0]

The slide is made once in FOLDER. A JSON line for each number of genes: the peak of resident memory, that of a process
that predicts one small slide by the same model (libraries and weights), and seconds. Each prediction is taken away.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from .cohort import make_model, make_slide, predict, watched

SMALL = 500
"""Spots."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spots", type=int, default=100_000)
    parser.add_argument("--genes", default="50,2000,18000")
    parser.add_argument("--memory-budget", default="0", help="for messages that are kept between steps")
    arguments = parser.parse_args()
    small, large = (make_slide(arguments.folder / f"spots_{n}.h5", n) for n in (SMALL, arguments.spots))
    out = arguments.folder / "out"
    for n_genes in map(int, arguments.genes.split(",")):
        model = make_model(arguments.folder / f"model_{n_genes}", n_genes)
        line = {"spots": arguments.spots, "genes": n_genes, "memory_budget": arguments.memory_budget}
        for peak, slide in (("peak_gb_of_a_small_slide", small), ("peak_gb", large)):
            command = predict(model, slide, out, "--overwrite", "--memory-budget", arguments.memory_budget)
            code, seconds, memory = watched(command)
            if code:
                raise SystemExit(f"{' '.join(command)}: exit code {code}")
            written = (out / f"{slide.stem}.h5ad").stat().st_size
            line[peak] = round(max(memory), 2)
            shutil.rmtree(out)
        line |= {"seconds": round(seconds, 1), "file_gb": round(written / 1e9, 2)}
        print(json.dumps(line), flush=True)

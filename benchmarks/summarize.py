"""pytest-benchmark's JSON to benchmarks/results/cpu.json and cpu.md.

python -m pytest benchmarks -q --benchmark-json=bench.json && python -m benchmarks.summarize bench.json
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import stflow_fast

RESULTS = Path(__file__).parent / "results"
KEPT = ("n_spots", "variant", "threads", "load_before", "first_sample_seconds", "peak_above_inputs")
TITLES = {"eager": "published algorithm", "off": "stflow-fast, plain torch", "on": "stflow-fast, torch.compile"}


def commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def summary(measured: dict) -> dict:
    """Medians and minima alone, with what they were measured on."""
    cpu = measured["machine_info"]["cpu"]
    return {
        "date": measured["datetime"][:10],
        "commit": commit(),
        "device": f"{cpu.get('brand_raw', platform.processor())}, {cpu.get('count')} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stflow_fast": stflow_fast.__version__,
        },
        "runs": [
            {
                "group": run["group"],
                **{key: run["extra_info"][key] for key in KEPT if key in run["extra_info"]},
                "rounds": run["stats"]["rounds"],
                "seconds_min": run["stats"]["min"],
                "seconds_median": run["stats"]["median"],
            }
            for run in measured["benchmarks"]
        ],
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def page(found: dict) -> str:
    groups: dict[str, list[dict]] = {}
    for run in found["runs"]:
        groups.setdefault(run["group"], []).append(run)
    threads = sorted({run["threads"] for run in found["runs"]})
    load = [run["load_before"] for run in found["runs"]]
    parts = [
        "# On the CPU",
        f"{found['date']}, commit {found['commit']}; {found['device']}, {threads[0]} thread(s) used; "
        f"torch {found['versions']['torch']}, Python {found['versions']['python']}. "
        f"Load average before each run: {min(load):.1f} to {max(load):.1f}. "
        "Default model, 50 genes, 1024 features, random weights, hexagonal lattice, 4 denoiser calls. "
        "Seconds are the shortest of the rounds; compilation is left out (a first sample paid for it).",
    ]
    if "race" in groups:
        best = {run["variant"]: run["seconds_min"] for run in groups["race"]}
        rows = [
            [
                TITLES[run["variant"]],
                f"{run['n_spots']:,}",
                f"{run['seconds_min']:.2f}",
                f"{run['seconds_median']:.2f}",
                f"{best['eager'] / run['seconds_min']:.1f}x" if "eager" in best else "",
            ]
            for run in groups["race"]
        ]
        parts += ["## One slide", table(["", "spots", "seconds", "median", "speed"], rows)]
    if "scaling" in groups:
        rows = [
            [f"{run['n_spots']:,}", f"{run['seconds_min']:.2f}", f"{run['seconds_min'] / run['n_spots'] * 1e6:.0f}"]
            for run in groups["scaling"]
        ]
        parts += ["## Larger slides (plain torch)", table(["spots", "seconds", "microseconds per spot"], rows)]
    if "memory" in groups:
        rows = [
            [TITLES[run["variant"]], f"{run['n_spots']:,}", f"{run['peak_above_inputs'] / 1e9:.2f}"]
            for run in groups["memory"]
        ]
        parts += ["## Peak memory above the inputs", table(["", "spots", "GB"], rows)]
    if "graph" in groups:
        rows = [[f"{run['n_spots']:,}", f"{run['seconds_min']:.2f}"] for run in groups["graph"]]
        parts += ["## Building the graph", table(["spots", "seconds"], rows)]
    return "\n\n".join(parts) + "\n"


def main(source: str) -> None:
    found = summary(json.loads(Path(source).read_text()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "cpu.md").write_text(page(found))


if __name__ == "__main__":
    main(sys.argv[1])

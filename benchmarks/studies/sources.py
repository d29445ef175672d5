"""What the source distribution brings: every source, trained and scored alike, beside the published one.

python -m benchmarks sources DATA --encoder NAME --out FOLDER

DATA is a task folder, as ``stflow-fast protocol hest`` takes it, and FOLDER keeps the runs: a call that was interrupted
goes on. Writes FOLDER/sources.json and sources.md.

Of each run: Pearson of one sample; CRPS, coverage and structure of the flow's own samples, whose spread is the
source's; and CRPS of draws of an observation model around one sample. That is one for each fold, fitted to the first
source's run of the first seed: to calibrate each run would train five times as much, and tell the same of the means.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from stflow_fast.calibration import calibrate
from stflow_fast.cohort import evaluate, load_model
from stflow_fast.evaluation import Structure, certainty, score
from stflow_fast.files import atomic_path, read_json, write_json
from stflow_fast.markdown import table
from stflow_fast.priors import SOURCES
from stflow_fast.priors.observation import ObservationModel
from stflow_fast.progress import cases_bar
from stflow_fast.protocol import Case, Plan, hest_tasks, run_protocol
from stflow_fast.sampling import Sampler

from ..suite import measure

SAMPLES, OF_STRUCTURE = 16, 4
"""Of a run, and how many of them structure is averaged over."""

COLUMNS = {
    "pearson": "Pearson of a sample",
    "pearson_of_mean": f"of the mean of {SAMPLES}",
    "crps": "CRPS of samples",
    "coverage_90": "in 90 %",
    "morans_i_error": "Moran's I error",
    "gene_correlation_error": "gene-gene error",
    "crps_of_law": "CRPS of the law's draws",
}

PAIRED = ("pearson", "crps", "crps_of_law")


def scores_of(folder: Path, case: Case, law: ObservationModel) -> dict[str, float]:
    """Those of :data:`COLUMNS` of a run, from its folder if they are there."""
    path, by = folder / "source.json", law.named()
    known = read_json(path) if path.exists() else {}
    if known.get("law") != by:
        known = {"law": by, "scores": _scored(folder, case, law)}
        write_json(path, known)
    scores: dict[str, float] = known["scores"]
    return scores


def _law(folder: Path) -> ObservationModel:
    """That of a run, fitted if it has none."""
    found = load_model(folder).observation
    return calibrate(folder) if found is None else found


def _scored(folder: Path, case: Case, law: ObservationModel) -> dict[str, float]:
    model = load_model(folder)
    model.observation = law
    evaluation = evaluate(model, case.task.data, case.fold)
    sampler, slides, truth = Sampler(model), evaluation.slides, evaluation.truth
    prepared = [sampler.prepare(slide) for slide in slides]
    samples = [[each.draw(seed=seed).expression.numpy() for each in prepared] for seed in range(SAMPLES)]
    drawn, expected = np.stack(list(map(np.concatenate, samples))), np.concatenate(truth)
    mean = drawn.mean(axis=0)
    of_samples = certainty(expected, mean, lambda rows: drawn[:, rows])
    of_truth = Structure([slide.coords for slide in slides], truth)
    structures = [of_truth.beside(sample) for sample in samples[:OF_STRUCTURE]]
    kept = ("morans_i_error", "gene_correlation_error")
    return {
        "pearson": evaluation.result["pearson_mean"],
        "pearson_of_mean": score(expected, mean, evaluation.genes)["pearson_mean"],
        "crps": of_samples["crps_mean"],
        "coverage_90": of_samples["coverage_90"],
        **{name: statistics.mean(cast(float, one[name]) for one in structures) for name in kept},
        "crps_of_law": evaluation.result["certainty"]["crps_mean"],
    }


def rows_of(found: Mapping[str, Mapping[tuple[int, int], Mapping[str, float]]], first: str) -> list[list[str]]:
    """A line for each source: means over runs, and for :data:`PAIRED` the differences from ``first``, of runs of one
    fold and seed: their mean over folds, and of that mean and standard deviation over seeds. Folds share slides, so
    they are no sample."""
    lines = []
    for name, runs in found.items():
        cells = [f"{statistics.mean(run[column] for run in runs.values()):.3f}" for column in COLUMNS]
        differences = [_paired(runs, found[first], column) for column in PAIRED]
        lines.append([name, *cells, *(differences if name != first else [""] * len(PAIRED))])
    return lines


def _paired(
    runs: Mapping[tuple[int, int], Mapping[str, float]],
    others: Mapping[tuple[int, int], Mapping[str, float]],
    column: str,
) -> str:
    by_seed: dict[int, list[float]] = {}
    for (fold, seed), run in runs.items():
        by_seed.setdefault(seed, []).append(run[column] - others[fold, seed][column])
    means = [statistics.mean(differences) for differences in by_seed.values()]
    spread = f" ({statistics.stdev(means):.3f})" if len(means) > 1 else ""
    return f"{statistics.mean(means):+.3f}{spread}"


def page(found: Mapping[str, Any], first: str, about: str) -> str:
    head = ["source", *COLUMNS.values(), *(f"{COLUMNS[column]}, beside {first}" for column in PAIRED)]
    note = (
        f"{about} Means over folds and seeds. Samples are the flow's own, {SAMPLES} of each run; the law's draws are "
        f"of an observation model around one sample, of each fold that of {first}, first seed. Beside: differences of "
        "runs of one fold and seed, mean over folds, then mean (standard deviation) over seeds."
    )
    return f"# Sources\n\n{table(head, rows_of(found, first))}\n\n{note}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sources", default=",".join(SOURCES), help="the first is what others stand beside")
    parser.add_argument("--seeds", default="0,1,2")
    arguments = parser.parse_args()
    names = arguments.sources.split(",")
    tasks = hest_tasks(arguments.data, arguments.encoder)
    if len(tasks) > 1:
        parser.error(f"{arguments.data}: has {len(tasks)} tasks; give the folder of one")
    if unknown := sorted({*names} - {*SOURCES}):
        parser.error(f"--sources: there is no {unknown[0]!r}; choose from {', '.join(SOURCES)}")
    seeds = tuple(map(int, arguments.seeds.split(",")))
    found: dict[str, dict[tuple[int, int], dict[str, float]]] = {}
    for name in names:
        plan = Plan(tasks, arguments.encoder, seeds, ("none",), training={"prior": name})
        with cases_bar() as (on_case, on_epoch):
            run_protocol(plan, arguments.out / name, None, lambda case, *place: on_case(case.path, *place), on_epoch)
        if name == names[0]:
            laws = {case.fold: _law(arguments.out / name / case.path) for case in plan.cases() if case.seed == seeds[0]}
        found[name] = {
            (case.fold, case.seed): scores_of(arguments.out / name / case.path, case, laws[case.fold])
            for case in plan.cases()
        }
    about = measure.provenance(torch.device("cpu"))
    told = f"{arguments.data.resolve().name}, encoder {arguments.encoder}, seeds {arguments.seeds}."
    told += f" Commit {about['commit']}."
    runs = {name: [{"fold": f, "seed": s, **run} for (f, s), run in of.items()] for name, of in found.items()}
    write_json(arguments.out / "sources.json", {**about, "runs": runs})
    with atomic_path(arguments.out / "sources.md") as temporary:
        temporary.write_text(page(found, names[0], told), encoding="utf-8")
    print(page(found, names[0], told))

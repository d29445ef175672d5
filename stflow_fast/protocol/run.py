"""Train and score every run of a plan, each once: what is on the disk already is not made again, so a call that was
interrupted goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..calibration import calibrate
from ..cohort import SamplingConfig, evaluate, load_model
from ..evaluation import score
from ..files import atomic_path, read_json, write_json
from ..runs import RUN_FILE
from ..training import fit, load_fold
from ..windows import TrainingConfig
from .leakage import leakage_of
from .page import page
from .plan import Case, Plan
from .results import averages_of, rows_of

RESULTS_FILE, PAGE_FILE, SCORES_FILE = "results.json", "results.md", "scores.json"

VARIANTS = {"smoothed": SamplingConfig(smooth=0.25), "fast": SamplingConfig(n_sample_steps=2, prior="zero")}
"""Ways to sample a model beside the published one."""

KEPT = (
    *("pearson_mean", "spearman_mean", "mse_mean", "r2_mean", "n_constant_genes", "alpha"),
    *("certainty", "certainty_of_neighborhoods", "structure", "structure_of_draws"),
)
"""Of what ``evaluate`` says of a predictor."""


def run_protocol(
    plan: Plan,
    out: str | Path,
    patients: Mapping[str, str] | None = None,
    on_case: Callable[[Case, int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train and score what is not there yet; write ``results.json`` and ``results.md``.

    Args:
        plan: what.
        out: folder of the runs and the results.
        patients: of each slide; of ``slides.csv`` in a task folder where None. Without either, leakage is not checked,
            and that is said.
        on_case: called before each run with it, its number and how many there are.
        on_epoch: called with each epoch's record.

    Returns:
        ``rows`` of :func:`rows_of`, ``leakage``, and the settings (plain JSON types).

    Raises:
        InputError: what training and evaluation refuse, with the run's name; what is done by then stays.
    """
    out, cases, scores = Path(out), list(plan.cases()), []
    leakage = {task.name: leakage_of(task, plan, patients) for task in plan.tasks}
    for number, case in enumerate(cases):
        if on_case:
            on_case(case, number, len(cases))
        scores.append(_scores(plan, case, out / case.path, on_epoch))
        _write(out, plan, scores, leakage, len(cases))
    results: dict[str, Any] = read_json(out / RESULTS_FILE)
    return results


def _scores(plan: Plan, case: Case, folder: Path, on_epoch: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """Of one run, from the disk if they are there."""
    settings = {"case": _told(case), "genes": plan.genes, "encoder": plan.encoder, "certainty": plan.certainty}
    settings |= {"training": dict(plan.training or {}), "denoiser": dict(plan.denoiser or {}), "version": __version__}
    path = folder / SCORES_FILE
    if path.exists():
        known: dict[str, Any] = read_json(path)
        if known.get("settings") == settings:
            return known
    config = TrainingConfig(**{**(plan.training or {}), "seed": case.seed})
    data = load_fold(
        case.task.data,
        plan.encoder,
        case.fold,
        plan.genes,
        embeddings=plan.embeddings,
        select_on=case.selection,
        organ=case.task.organ,
        config=config,
    )
    resume = (folder / RUN_FILE).exists()
    run = fit(data, folder, dict(plan.denoiser or {}), config, resume=resume, on_epoch=on_epoch)
    trained = sum(record["seconds"] for record in run.records)
    if plan.certainty:
        calibrate(folder, embeddings=plan.embeddings)
    found = {"settings": settings, "train_seconds": round(trained, 1), **_evaluated(plan, case, folder)}
    write_json(path, found)
    return found


def _told(case: Case) -> dict[str, Any]:
    return {"task": case.task.name, "selection": case.selection, "fold": case.fold, "seed": case.seed}


def _evaluated(plan: Plan, case: Case, folder: Path) -> dict[str, Any]:
    """Scores of every way to sample the model of a run, and of the baselines."""
    model = load_model(folder)
    evaluation = evaluate(model, case.task.data, case.fold, embeddings=plan.embeddings)
    result, truth = evaluation.result, np.concatenate(evaluation.truth)
    of_model = {"": {**_kept(result), "seconds": result["sampling_seconds"], "nfe": result["nfe"]}}
    for name, sampling in VARIANTS.items():
        started = time.perf_counter()
        drawn = list(map(sampling.drawer(model), evaluation.slides))
        seconds = round(time.perf_counter() - started, 3)
        made = np.concatenate([one.expression.float().numpy() for one in drawn])
        of_model[name] = {**_kept(score(truth, made, evaluation.genes)), "seconds": seconds, "nfe": drawn[0].nfe}
    baselines = {name: _kept(scores) for name, scores in result["baselines"].items()}
    told: dict[str, Any] = {name: result[name] for name in ("selected_on", "n_spots", "observation") if name in result}
    return {**told, "model": of_model, "baselines": baselines}


def _kept(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: scores[name] for name in KEPT if name in scores}


def _write(
    out: Path, plan: Plan, scores: Sequence[Mapping[str, Any]], leakage: Mapping[str, Any], n_cases: int
) -> None:
    rows = rows_of(scores)
    found = {
        "version": __version__,
        "encoder": plan.encoder,
        "genes": plan.genes,
        "seeds": list(plan.seeds),
        "tasks": [asdict(replace(task, data=Path(task.data).name)) for task in plan.tasks],
        "done": len(scores),
        "of": n_cases,
        "leakage": dict(leakage),
        "rows": rows,
        "averages": averages_of(rows),
        "scores": list(scores),
    }
    write_json(out / RESULTS_FILE, found)
    with atomic_path(out / PAGE_FILE) as temporary:
        temporary.write_text(page(found), encoding="utf-8")

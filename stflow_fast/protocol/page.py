"""What the table of a result says, as text: for a terminal, and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..markdown import table
from .results import HARDEST

CERTAINTY_HEAD = ("model", "CRPS", "of random training spots", "in 50 %", "in 90 %", "neighbourhoods in 90 %", "spread")
CERTAINTY_NOTE = (
    "Draws by the observation models, means over runs. In 50 %, 90 %: share of the truth within such intervals of the "
    "draws, where it ties with draws by its share; neighbourhoods: of the means over each spot and its neighbours. "
    "Spread: of the draws, over the error of their mean."
)


def page(found: Mapping[str, Any]) -> str:
    """A result as Markdown: a row for each predictor, a column for each task (for each fold, where it is one task)."""
    parts = ["# Mean Pearson over genes", table(*cells_of(found)), *notes_of(found)]
    certain = certainty_cells_of(found)
    if certain:
        parts += ["## Certainty", table(CERTAINTY_HEAD, certain), CERTAINTY_NOTE]
    return "\n\n".join(parts) + "\n"


def cells_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of a result, as text."""
    rows, tasks = found["rows"], [task["name"] for task in found["tasks"]]
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    by_place = {(row["predictor"], row["task"]): row for row in rows}
    if len(tasks) == 1:
        folds = [str(fold) for fold in found["tasks"][0]["folds"]]
        lines = [
            [name, *_fold_cells(by_place[name, tasks[0]], folds), _seconds([by_place[name, tasks[0]]])]
            for name in names
        ]
        return ["predictor", *(f"fold {fold}" for fold in folds), "mean (std over seeds)", "s"], lines
    lines = []
    for name in names:
        cells = [_cell(by_place[name, task]) if (name, task) in by_place else "" for task in tasks]
        average = found["averages"].get(name, {})
        means = [average.get("all"), average.get(f"without_{HARDEST}")]
        rows_here = [by_place[name, task] for task in tasks if (name, task) in by_place]
        lines.append([name, *cells, *("" if mean is None else f"{mean:.3f}" for mean in means), _seconds(rows_here)])
    return ["predictor", *tasks, f"average of {len(tasks)}", f"without {HARDEST}", "s"], lines


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    return f"{statistics.mean(known):.2f}" if known else ""


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['pearson']:.3f} ({row['std']:.3f})" if row["n_seeds"] > 1 else f"{row['pearson']:.3f}"


def _fold_cells(row: Mapping[str, Any], folds: Sequence[str]) -> list[str]:
    known = {str(fold): value for fold, value in row["folds"].items()}
    return [*(f"{known[fold]:.3f}" if fold in known else "" for fold in folds), _cell(row)]


def certainty_cells_of(found: Mapping[str, Any]) -> list[list[str]]:
    """The lines below :data:`CERTAINTY_HEAD` of a result, as text: none where no run was calibrated."""
    of_models: dict[str, list[Mapping[str, Any]]] = {}
    for one in found["scores"]:
        if "certainty" in one["model"][""]:
            case = one["settings"]["case"]
            of_models.setdefault(f"{case['task']}, STFlow, {case['selection']}", []).append(one)
    return [[name, *_certainty_cells(runs)] for name, runs in of_models.items()]


def _certainty_cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    of_spots, regions = ([one["model"][""][key] for one in runs] for key in ("certainty", "certainty_of_neighborhoods"))
    random = [one["baselines"]["train_mean"]["certainty"] for one in runs]
    wanted = (
        *((of_spots, "crps_mean"), (random, "crps_mean"), (of_spots, "coverage_50"), (of_spots, "coverage_90")),
        *((regions, "coverage_90"), (of_spots, "spread_ratio")),
    )
    values = [[each[key] for each in group if each[key] is not None] for group, key in wanted]
    return [f"{statistics.mean(each):.3f}" if each else "" for each in values]


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, a paragraph each."""
    seeds = ", ".join(map(str, found["seeds"]))
    notes = [
        f"Encoder {found['encoder']}, genes {found['genes']}, seeds {seeds}; {found['done']} of {found['of']} runs; "
        f"stflow-fast {found['version']}. Mean over folds, then mean (standard deviation) over seeds. 'none': no epoch "
        "chosen, weights averaged; 'validation': chosen on what is held out of training; 'test': chosen on the test "
        "fold, as published, which flatters. 'smoothed': a quarter of the neighbours mixed in; 'fast': one call from "
        "zeros. s: seconds to sample the test slides of a run."
    ]
    for task, told in found["leakage"].items():
        if not told["checked"]:
            notes.append(f"{task}: nothing says whose a slide is, so leakage is not checked; give --patients FILE.")
            continue
        both = {fold: names for fold, names in told["folds"].items() if names}
        if both:
            where = "; ".join(f"fold {fold}: {', '.join(names)}" for fold, names in both.items())
            notes.append(f"{task}: patients on both sides of a split: {where}.")
        if told["unknown"]:
            notes.append(f"{task}: nobody is named for {', '.join(told['unknown'])}.")
    return notes

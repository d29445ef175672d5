"""What the scores of all runs come to: means over folds and seeds, and over tasks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HARDEST = "HCC"
"""The paper averages ten tasks; the leaderboard of HEST-bench leaves this one out."""


def rows_of(scores: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every predictor of every task: mean over folds of its Pearson, then mean and standard deviation over seeds.

    Returns:
        ``{"predictor", "task", "pearson": mean, "std", "folds": {fold: mean over seeds}, "n_seeds", "seconds"}`` each,
        the last of sampling the test slides of a run, mean over runs, None of a baseline.
    """
    found: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    for one in scores:
        case = one["settings"]["case"]
        selection = case["selection"]
        named = {", ".join(filter(None, (f"STFlow, {selection}", name))): each for name, each in one["model"].items()}
        for name, each in {**named, **one["baselines"]}.items():
            if each["pearson_mean"] is not None:
                by_seed = found.setdefault((name, case["task"]), {})
                by_seed.setdefault(case["seed"], {})[case["fold"]] = each["pearson_mean"]
                if "seconds" in each:
                    seconds.setdefault((name, case["task"]), []).append(each["seconds"])
    return [
        {**_row(*place, by_seed), "seconds": statistics.mean(seconds[place]) if place in seconds else None}
        for place, by_seed in found.items()
    ]


def _row(name: str, task: str, by_seed: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    means = [statistics.mean(folds.values()) for folds in by_seed.values()]
    numbers = sorted({fold for folds in by_seed.values() for fold in folds})
    per_fold = {fold: statistics.mean(folds[fold] for folds in by_seed.values() if fold in folds) for fold in numbers}
    std = statistics.stdev(means) if len(means) > 1 else 0.0
    spread = {"std": std, "folds": per_fold, "n_seeds": len(means)}
    return {"predictor": name, "task": task, "pearson": statistics.mean(means), **spread}


def averages_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each predictor over the tasks that all predictors have: ``{"all", "n"}``, and ``{"without_HCC"}`` where HCC is
    among them."""
    tasks = sorted({row["task"] for row in rows})
    found = {}
    for name in dict.fromkeys(row["predictor"] for row in rows):
        own = {row["task"]: row["pearson"] for row in rows if row["predictor"] == name}
        if set(own) != set(tasks):
            continue
        found[name] = {"all": statistics.mean(own.values()), "n": len(own)}
        others = [value for task, value in own.items() if task != HARDEST]
        if HARDEST in own and others:
            found[name][f"without_{HARDEST}"] = statistics.mean(others)
    return found

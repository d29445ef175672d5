"""What the predictors of a result are called, and what is to be said of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..windows import selection_words

MODEL_NAME = "stflow-fast"

LABELS = {
    "train_mean": "train mean",
    "hest_ridge": "HEST ridge",
    "ridge_alpha_1e4": "ridge alpha 1e4",
    "ridge": "ridge",
    "ridge_smoothed": "ridge, smoothed",
    "ridge_neighbors": "ridge, neighbours",
    "depth_oracle": "depth oracle",
    "shuffled_spots": "spots shuffled",
}
"""How a reader meets the baselines of :func:`stflow_fast.evaluation.baselines`, and the demo's control."""


def certainties(result: Mapping[str, Any], model: str) -> dict[str, Mapping[str, Any]]:
    """What :func:`.evaluation.certainty` says of the model and of the baselines that have draws, by what those are
    called."""
    labels = {**LABELS, "train_mean": "random training spots"}
    baselines = {labels.get(name, name): each.get("certainty") for name, each in result.get("baselines", {}).items()}
    neighborhoods, n_genes = result.get("certainty_of_neighborhoods", {}), len(result.get("genes", ()))
    looked_at = neighborhoods.get("n_genes", n_genes)
    called = f"{model}, neighbourhoods" + (f" ({looked_at} genes)" if looked_at < n_genes else "")
    of_model = {model: result.get("certainty"), called: neighborhoods}
    return {name: found for name, found in {**of_model, **baselines}.items() if found}


def selection_note(result: Mapping[str, Any]) -> str:
    """What the model's epoch was chosen on: every table and picture of a result says it. Empty where it is unknown."""
    chosen = result.get("selected_on", "unknown")
    return "" if chosen == "unknown" else f"{MODEL_NAME}: {selection_words(chosen)}."

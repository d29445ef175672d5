"""The table of sources: means, and differences of runs that belong together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks.studies import sources
from stflow_fast.priors.shared_error import SharedError
from stflow_fast.protocol import Plan, hest_tasks, run_protocol

from .builders import ENCODER, write_task


def test_differences_are_of_runs_of_one_fold_and_seed() -> None:
    scored = {"pearson_of_mean": 0.3, "crps": 0.4, "coverage_90": 0.1, "morans_i_error": 0.5}
    scored |= {"gene_correlation_error": 0.6, "crps_of_law": 0.25}

    def runs(*pearson: float) -> dict[tuple[int, int], dict[str, float]]:
        places = [(0, 0), (0, 1), (1, 0), (1, 1)]
        return {place: {**scored, "pearson": value} for place, value in zip(places, pearson, strict=True)}

    first, other = runs(0.1, 0.2, 0.5, 0.4), runs(0.2, 0.2, 0.5, 0.2)
    plain, compared = sources.rows_of({"zinb": first, "empirical": other}, "zinb")
    means = ["0.300", "0.300", "0.400", "0.100", "0.500", "0.600", "0.250"]
    assert plain == ["zinb", *means, "", "", ""]
    # Seed 0: +.1 and 0; seed 1: 0 and -.2.
    assert compared[:8] == ["empirical", "0.275", *means[1:]]
    assert compared[8:] == ["-0.025 (0.106)", "+0.000 (0.000)", "+0.000 (0.000)"]


def test_a_run_is_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"hidden_dim": 16, "pairwise_hidden_dim": 16, "n_layers": 1}
    training = {"epochs": 1, "windows_per_slide": 1, "prior": "empirical"}
    tasks = hest_tasks(write_task(tmp_path / "task"), ENCODER)
    plan = Plan(tasks, ENCODER, (0,), ("none",), training=training, denoiser=tiny)
    run_protocol(plan, tmp_path / "out")
    (case,) = plan.cases()
    folder = tmp_path / "out" / case.path
    law = sources._law(folder)
    assert sources._law(folder).to_dict() == law.to_dict()
    found = sources.scores_of(folder, case, law)
    assert list(found) == list(sources.COLUMNS)
    assert 0 < found["crps_of_law"] < found["crps"]
    other = dataclasses.replace(law, shared=SharedError.none(8))
    by_other = sources.scores_of(folder, case, other)
    assert by_other["crps"] == found["crps"]
    monkeypatch.setattr(sources, "_scored", None)
    assert sources.scores_of(folder, case, other) == by_other
    with pytest.raises(TypeError):
        sources.scores_of(folder, case, law)

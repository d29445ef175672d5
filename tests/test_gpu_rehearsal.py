"""What is run on a lent GPU (``benchmarks.gpu``), rehearsed on the CPU with the kernels interpreted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_sections
from benchmarks.gpu_measure import Figure, Scale, scale_of
from benchmarks.providers import PROVIDERS
from stflow_fast import DenoiserConfig

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {
    ("edge attention forward", "ours"),
    ("edge attention backward", "ours"),
    ("sample", "ours, CUDA graph"),
    ("sample", "ours, launches"),
    ("sample", "eager"),
    ("prepare", "ours"),
    ("training step", "ours"),
    ("training step", "eager"),
    ("neighbour graph", "ours"),
    ("neighbour graph", f"scipy, {os.cpu_count()} cores"),
}
SUITE_FIGURES = {
    *itertools.product(("sample", "train_step", "denoise"), ("eager_stflow", "triton")),
    *itertools.product(("graph",), ("scipy_kdtree", "triton", "dense_cdist")),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `make gpu` does, which leaves it to the program to have the kernels interpreted."""
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_rehearsal(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), "--rehearse")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "rehearsal-sections.jsonl").read_text().splitlines()]
    assert {(line["workload"], line["provider"]) for line in lines} == FIGURES
    for line in lines:
        assert line["error"] == ""
        assert line["median_ms"] > 0
        assert line["check"] == ("none" if line["provider"].startswith("scipy") else "green")
        assert not any(line["met"])  # no target is met by a rehearsal
    page = (tmp_path / "rehearsal-sections.md").read_text()
    assert page.startswith("# Rehearsal")
    assert "not reached" not in page
    assert done.stdout.rstrip().splitlines()[-1].startswith("* rehearsed: large slide")
    suite = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert {(line["workload"], line["provider"]) for line in suite} == SUITE_FIGURES
    for line in suite:
        assert line["note"] == ""
        assert line["check"] == "green"
        assert line["median_ms"] > 0


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def scale() -> Scale:
    return dataclasses.replace(scale_of(rehearse=True), patch=16)


def test_the_corner_of_a_large_slide_is_exact_and_a_wrong_one_is_seen(scale: Scale) -> None:
    torch.manual_seed(0)
    slide, (_, eager) = gpu_sections.slide_inputs(scale, 900), gpu_sections.networks(scale)
    error_of = gpu_sections.corner_check(scale, eager, slide)
    drawn = gpu_sections.eager_draw(scale, eager, slide)()
    assert error_of(drawn) < 1e-5
    drawn[-1] += 1
    assert error_of(drawn) > 1e-2


def test_what_fails_costs_its_own_line_alone(scale: Scale, tmp_path: Path) -> None:
    def section(scale: Scale, precision: str):
        yield Figure("good", "ours", 1, precision, [1.0, 1.0, 1.0], 0.1, 1.0)
        yield Figure("bad", "ours", 1, precision, [1.0, 1.0, 1.0], float("nan"), 1.0, met={"a goal": True})
        raise RuntimeError("first\nsecond")

    report, case = gpu.Report(tmp_path, True, "skipped"), gpu_sections.Case(section, "bf16", ("a goal",))
    assert gpu.run_case(report, scale, case) == "RuntimeError: first"
    good, bad, failed = (json.loads(line) for line in report.path.read_text().splitlines())
    assert (good["check"], good["median_ms"]) == ("green", 1.0)
    assert (bad["check"], bad["median_ms"], bad["met"]) == ("red", None, [None])
    assert failed["error"] == "RuntimeError: first"
    assert report.red


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("..s. [ 4%]\n..", "no end within 200 s; none had failed until then"),
        ("..s. [ 4%]\n.F.", "red: failures, and no end within 200 s"),
        ("", "no end within 200 s; none had failed until then"),
    ],
)
def test_tests_without_end_are_told_from_red_ones(
    said: str, verdict: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def endless(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout, said.encode())

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", endless)
        tests = gpu.run_tests()
    assert tests == verdict
    report = gpu.Report(tmp_path, True, tests)
    assert report.red  # whether the kernels are right is not known
    report.add(Figure("good", "ours", 1, "bf16", [1.0, 1.0, 1.0], 0.1, 1.0), 8, "")
    page = report.write_page([])
    assert f"Tests of the kernels: {verdict}." in page
    assert ("(tests red)" in page) == verdict.startswith("red")


def test_the_suite_leaves_out_large_slides_first_and_ends_before_it_is_interrupted(scale: Scale) -> None:
    spots = [case.spots for case in gpu.suite_cases(scale.config, (10, 100, 1000), ("float32", "bf16"))]
    assert spots == [10] * 7 + [100] * 7 + [1000] * 7
    interrupted_after = int(re.search(r"--signal=INT (\d+)", (ROOT / "Makefile").read_text())[1])
    assert gpu.LAST_SECTION + gpu.SUITE_SECONDS <= gpu.ALL_SECONDS < interrupted_after
    assert set(gpu.SUITE_PROVIDERS) <= set(PROVIDERS)


def test_floors_of_the_notes() -> None:
    config = DenoiserConfig(n_genes=50, feature_dim=1024)
    floors = [
        gpu_sections.floor_ms(1_000_000, config, precision, backward=False) for precision in ("bf16", "tf32", "ieee")
    ]
    assert floors == pytest.approx([1.86, 3.72, 7.83], rel=0.01)  # L2, L2, float32 arithmetic

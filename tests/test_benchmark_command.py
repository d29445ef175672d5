"""The benchmark command from end to end. What is timed here is tiny, and no test asks how long it took."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from stflow_fast.benchmarks import command
from stflow_fast.benchmarks.pages import report
from stflow_fast.benchmarks.pages.lines import load
from stflow_fast.benchmarks.suite import floor, measure
from stflow_fast.benchmarks.suite import run as suite
from stflow_fast.benchmarks.suite.cases import Case, Plan
from stflow_fast.benchmarks.suite.providers import PROVIDERS, EagerSTFlow
from stflow_fast.benchmarks.suite.run import LINE, Suite
from typer.testing import CliRunner

from stflow_fast import cli
from stflow_fast.errors import InputError

from .benchmark_jobs import NETWORK, needs_proc

FIELDS = {*LINE, "device", "versions", "commit", "date"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with a small network, rates of a small product and copy, and no process for the memory."""
    monkeypatch.setattr(command, "Plan", functools.partial(Plan, network=NETWORK, check_spots=60))
    monkeypatch.setattr(measure, "in_own_process", lambda *_: {"peak_bytes": 1})
    monkeypatch.setitem(floor.MATRIX_SIDE, "cpu", 256)
    monkeypatch.setitem(floor.COPIED_BYTES, "cpu", 2**20)
    monkeypatch.setattr(floor, "SETTLING", 0.0)


def run(out: Path, *arguments: str, pictures: bool = False) -> Any:
    options = [
        "benchmark",
        "--spots",
        "40,60",
        "--genes",
        "5",
        "--k",
        "4",
        "--rounds",
        "2",
        "--minutes",
        "60",
        "--seconds",
        "600",
        "--out",
        str(out),
        "--pictures" if pictures else "--no-pictures",
    ]
    return CliRunner().invoke(cli.app, [*options, *arguments], catch_exceptions=False)


def lines_in(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def put_lines(folder: Path, *lines: dict[str, Any]) -> None:
    """In place of those of the folder's only file."""
    (path,) = folder.glob("*.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_whole_command_writes_a_line_per_figure(tmp_path: Path, small: None) -> None:
    done = run(tmp_path, "--workload", "sample,train_step,denoise,graph", "--layout", "clustered", pictures=True)
    assert done.exit_code == 0, done.output
    lines = lines_in(tmp_path)
    assert len(lines) == 2 * (3 * len(command.CPU_PROVIDERS) + len(command.CPU_GRAPHS))
    for line in lines:
        assert set(line) == FIELDS
        if line["provider"] == "reference_compiled":
            assert line["note"] == "slides below 512 spots are not compiled"
            continue
        assert (line["note"], line["arithmetic"]) == ("", "float32")
        assert 0 < line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["spots_per_s"] == pytest.approx(1e3 * line["spots"] / line["median_ms"])
        assert (line["rounds"], line["cold_l2_ms"], line["device_bytes"]) == (2, None, None)
        same_function = line["workload"] == "graph" or PROVIDERS[line["provider"]](NETWORK).same_function
        assert line["check"] == ("green" if same_function else "not compared")
        assert (line["relative_error"] is not None) == same_function
        has_floor = same_function and line["workload"] != "graph"
        for field in ("of_floor", "peak_flops_per_s", "peak_copy_bytes_per_s"):
            assert (line[field] is not None) == has_floor
        assert not has_floor or 0 < line["of_floor"] < 1
    assert "eager_stflow" in done.output
    assert list(tmp_path.glob("*.png"))


def test_a_second_run_adds_to_the_first_and_can_be_shown_anew(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme, results = tmp_path / "benchmarks" / "README.md", tmp_path / "benchmarks" / "results"
    readme.parent.mkdir()
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    for name in ("reference", "flash_attention"):
        run(results, "--workload", "denoise", "--providers", name)
    assert [line["provider"] for line in lines_in(results)] == ["reference"] * 2 + ["flash_attention"] * 2
    untouched = readme.read_text()
    scratch = tmp_path / "scratch"
    run(scratch, "--workload", "denoise", "--providers", "reference")
    assert run(scratch, "--report").exit_code == 0
    assert readme.read_text() == untouched  # its section is of the committed results alone
    assert CliRunner().invoke(cli.app, ["benchmark", "--report"], catch_exceptions=False).exit_code == 0
    assert len(lines_in(results)) == 4
    assert readme.read_text() != untouched
    assert readme.read_text().startswith("before")


def test_the_readme_of_another_folder_is_left_alone(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "results", "--workload", "denoise", "--providers", "reference")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command.PAGE.parent.mkdir()
    command.PAGE.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert run(tmp_path / "results", "--report").exit_code == 0
    assert command.PAGE.read_text() == f"{report.BEGIN}\n{report.END}\n"


class Wrong(EagerSTFlow):
    def denoise(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        return super().denoise(x_t, t) + 1


class WrongGradient(EagerSTFlow):
    def loss(self, x_t: torch.Tensor, x_1: torch.Tensor, t: float) -> torch.Tensor:
        loss = super().loss(x_t, x_1, t)
        return loss + 0.01 * next(self.model.parameters()).sum()


@pytest.mark.parametrize(("workload", "wrong"), [("sample", Wrong), ("denoise", Wrong), ("train_step", WrongGradient)])
def test_what_is_wrong_gets_no_time(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, workload: str, wrong: type
) -> None:
    monkeypatch.setitem(PROVIDERS, "eager_stflow", wrong)
    done = run(tmp_path, "--workload", workload, "--providers", "eager_stflow,reference")
    assert done.exit_code == 1
    assert "eager_stflow computes something else" in re.sub(r"\s+", " ", done.output)
    for line in lines_in(tmp_path):
        red = line["provider"] == "eager_stflow"
        assert line["check"] == ("red" if red else "green")
        assert (line["median_ms"] is None) == red
        assert (line["relative_error"] > line["tolerance"]) == red


class SlowAtFirst(EagerSTFlow):
    """As what compiles in its first call."""

    compiles = True
    begun = False

    def denoise(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        if not SlowAtFirst.begun:
            SlowAtFirst.begun = True
            time.sleep(0.3)
        return super().denoise(x_t, t)


def test_compilation_has_a_figure_of_its_own(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "eager_stflow", SlowAtFirst)
    monkeypatch.setattr(SlowAtFirst, "begun", False)
    run(tmp_path, "--providers", "eager_stflow,flash_attention", "--workload", "denoise")
    told = {(line["provider"], line["spots"]): line["compile_s"] for line in lines_in(tmp_path)}
    assert told["eager_stflow", 40] == told["eager_stflow", 60] >= 0.25  # of one check for all sizes
    assert told["flash_attention", 40] is told["flash_attention", 60] is None  # nothing is compiled


class Breaks(EagerSTFlow):
    def denoise(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Lacks(EagerSTFlow):
    def denoise(self, x_t: torch.Tensor, t: float) -> torch.Tensor:
        raise MemoryError


@pytest.mark.parametrize(
    ("provider", "options", "code"),
    [(Breaks, (), 1), (Lacks, (), 0), (EagerSTFlow, (), 0), (EagerSTFlow, ("--minutes", "1e-9"), 1)],
)
def test_what_failed_or_was_left_out_is_told_where_all_is_wanted(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, provider: type, options: tuple[str, ...], code: int
) -> None:
    monkeypatch.setitem(PROVIDERS, "eager_stflow", provider)
    # A GPU's is refused here in any case.
    options = ("--workload", "denoise", "--providers", "eager_stflow,triton_graph", *options)
    assert run(tmp_path / "a", *options).exit_code == 0
    assert run(tmp_path / "b", *options, "--complete").exit_code == code


def test_an_interrupted_run_keeps_its_lines(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, begun = Suite.run_case, []

    def interrupted(self: Suite, case: Case, names: tuple[str, ...]) -> None:
        begun.append(case)
        if len(begun) == 2:
            raise KeyboardInterrupt
        whole(self, case, names)

    monkeypatch.setattr(Suite, "run_case", interrupted)
    done = run(tmp_path, "--workload", "denoise", "--providers", "reference,flash_attention")
    assert done.exit_code == 130
    assert [line["spots"] for line in lines_in(tmp_path)] == [40, 40]
    said = done.stderr.replace("\n", "")
    assert "the 2 lines measured so far are in" in said
    assert str(next(tmp_path.glob("*.jsonl"))) in said


def test_a_broken_file_is_told_before_anything_is_measured(tmp_path: Path, small: None) -> None:
    run(tmp_path, "--workload", "graph", "--providers", "scipy_kdtree")
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(before := "{broken\n" + path.read_text())
    with pytest.raises(InputError, match="line 1: is not valid JSON"):
        run(tmp_path, "--workload", "graph", "--providers", "scipy_kdtree")
    assert path.read_text() == before


@needs_proc
def test_threads_and_busy_processes_of_the_command_are_of_one_run(tmp_path: Path, small: None) -> None:
    options = ("--workload", "denoise", "--providers", "reference,eager_stflow", "--spots", "40")
    done = run(tmp_path, *options, "--threads", "2,1", "--busy", "1,0", "--busy-nice", "5,0")
    assert done.exit_code == 0, done.output
    lines = [line for line in lines_in(tmp_path) if line["provider"] == "reference"]
    assert [(line["threads"], line["busy"], line["busy_nice"]) for line in lines] == [
        *((1, 0, 0), (2, 0, 0)),  # what is measured beside nothing comes first
        *((1, 1, 0), (2, 1, 0)),
        *((1, 1, 5), (2, 1, 5)),
    ]
    assert len({line["date"] for line in lines}) == 1
    assert {line["check"] for line in lines} == {"green"}
    assert "of idle" in done.output
    assert load(tmp_path) == lines_in(tmp_path)  # all of them figures of their own


def test_a_busy_case_goes_on_with_the_same_beside_nothing(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "same_code", lambda before: True)
    monkeypatch.setattr(suite, "busy_processes", lambda *_: contextlib.nullcontext())
    options = ("--workload", "denoise", "--providers", "reference", "--resume", "--threads", "1")

    def added(*more: str) -> list[tuple[int, int]]:
        before = len(lines_in(tmp_path)) if list(tmp_path.glob("*.jsonl")) else 0
        assert run(tmp_path, *options, *more).exit_code == 0
        return [(line["spots"], line["busy"]) for line in lines_in(tmp_path)[before:]]

    assert added("--busy", "2", "--spots", "40") == [(40, 2)]
    assert added("--busy", "0", "--spots", "40") == [(40, 0)]  # a busy line is none of an idle machine
    assert added("--busy", "0,2") == [(60, 0), (60, 2)]
    assert added("--busy", "0,2,3", "--spots", "60") == [(60, 0), (60, 2), (60, 3)]
    assert added("--busy", "0,2") == []


def test_lines_from_before_there_were_busy_ones_are_of_an_idle_machine(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "same_code", lambda before: True)
    options = ("--workload", "denoise", "--providers", "reference", "--spots", "40")
    run(tmp_path, *options)
    (line,) = lines_in(tmp_path)
    del line["busy"], line["busy_nice"]
    put_lines(tmp_path, line)
    assert load(tmp_path) == [{**line, "busy": 0, "busy_nice": 0}]
    run(tmp_path, *options, "--resume")
    assert len(lines_in(tmp_path)) == 1


def test_what_is_there_is_not_measured_again(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "same_code", lambda before: True)
    options = ("--workload", "denoise", "--providers", "reference,flash_attention")
    run(tmp_path, *options, "--spots", "40")
    assert len(lines_in(tmp_path)) == 2
    assert run(tmp_path, *options, "--resume").exit_code == 0
    assert [line["spots"] for line in lines_in(tmp_path)] == [40, 40, 60, 60]
    assert run(tmp_path, *options, "--resume").exit_code == 0
    assert len(lines_in(tmp_path)) == 4
    monkeypatch.setattr(measure, "same_code", lambda before: False)
    run(tmp_path, *options, "--resume")
    assert len(lines_in(tmp_path)) == 8


def test_what_lacked_the_time_is_measured_later_with_its_opponents(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "same_code", lambda before: True)
    options = ("--workload", "denoise", "--providers", "reference,flash_attention", "--spots", "40")
    run(tmp_path, *options)
    first, second = lines_in(tmp_path)
    put_lines(tmp_path, first, {**second, "median_ms": None, "note": suite.TIME_IS_UP})
    run(tmp_path, *options, "--resume")
    assert [line["note"] for line in lines_in(tmp_path)] == ["", suite.TIME_IS_UP, "", ""]


def test_half_a_line_is_dropped_before_the_next_is_written(tmp_path: Path, small: None) -> None:
    options = ("--workload", "denoise", "--providers", "reference", "--spots", "40")
    run(tmp_path, *options)
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    run(tmp_path, *options)
    assert [line["spots"] for line in lines_in(tmp_path)] == [40, 40]
    path.write_text(whole.rstrip())
    run(tmp_path, *options)
    assert len(lines_in(tmp_path)) == 2


def test_what_was_refused_is_asked_again_under_another_budget(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "same_code", lambda before: True)
    options = ("--workload", "denoise", "--providers", "dense_softmax", "--spots", "2000", "--resume")
    for budget, n_lines in (("20MB", 1), ("21MB", 1), ("4GiB", 2), ("4GiB", 2)):
        assert run(tmp_path, *options, "--memory-budget", budget).exit_code == 0
        assert len(lines_in(tmp_path)) == n_lines
    first, second = lines_in(tmp_path)
    assert "over the budget" in first["note"]
    assert second["note"] == ""


@pytest.mark.parametrize(("seconds", "n_lines"), [("40", 1), ("60", 2)])
def test_what_was_left_out_for_its_time_is_asked_again_with_more(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, seconds: str, n_lines: int
) -> None:
    monkeypatch.setattr(measure, "same_code", lambda before: True)
    options = ("--workload", "denoise", "--providers", "reference", "--spots", "40")
    run(tmp_path, *options)
    (line,) = lines_in(tmp_path)
    put_lines(tmp_path, {**line, "median_ms": None, "note": f"{suite.LEFT_OUT}some 50 s expected; raise --seconds"})
    run(tmp_path, *options, "--resume", "--seconds", seconds)
    assert len(lines_in(tmp_path)) == n_lines

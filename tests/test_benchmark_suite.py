"""The benchmark suite and its command. What is timed here is tiny, and no test asks how long it took."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from stflow_fast.benchmarks import busy, command, jobs, measure, report, suite
from stflow_fast.benchmarks.busy import busy_processes
from stflow_fast.benchmarks.jobs import Case, Job, Plan
from stflow_fast.benchmarks.lines import load
from stflow_fast.benchmarks.providers import PROVIDERS, EagerSTFlow
from stflow_fast.benchmarks.suite import LINE, Suite
from typer.testing import CliRunner

from stflow_fast import Denoiser, DenoiserConfig, cli
from stflow_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
NETWORK = DenoiserConfig(n_genes=5, feature_dim=7, hidden_dim=32, pairwise_hidden_dim=16, n_layers=1, n_heads=2)
CASE = Case("sample", "visium", 40, 4, 5, "float32")
FIELDS = {*LINE, "device", "versions", "commit", "date"}
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")


def small_plan(**settings: Any) -> Plan:
    usual = {"memory_budget": 2**32, "rounds": 2, "network": NETWORK, "check_spots": 60}
    return Plan(torch.device("cpu"), **(usual | settings))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with a small network, and no process for the memory."""
    monkeypatch.setattr(command, "Plan", functools.partial(Plan, network=NETWORK, check_spots=60))
    monkeypatch.setattr(measure, "in_own_process", lambda *_: {"peak_bytes": 1})


def run(out: Path, *arguments: str) -> Any:
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
    ]
    return CliRunner().invoke(cli.app, [*options, *arguments], catch_exceptions=False)


def lines_in(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def put_lines(folder: Path, *lines: dict[str, Any]) -> None:
    """In place of those of the folder's only file."""
    (path,) = folder.glob("*.jsonl")
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def lines_of(plan: Plan, cases: list[Case], names: tuple[str, ...]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    Suite(plan, lines.append, lambda what: None).run(cases, dict.fromkeys(("graph", "sample", "train_step"), names))
    return lines


def test_the_whole_command_writes_a_line_per_figure(tmp_path: Path, small: None) -> None:
    done = run(tmp_path, "--workload", "sample,train_step,denoise,graph", "--layout", "clustered")
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
    assert list(tmp_path.glob("*.*"))


def test_a_second_run_adds_to_the_first_and_can_be_shown_anew(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme, results = tmp_path / "README.md", tmp_path / "benchmarks" / "results"
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
    Path("README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    assert run(tmp_path / "results", "--report").exit_code == 0
    assert Path("README.md").read_text() == f"{report.BEGIN}\n{report.END}\n"


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


def test_what_every_size_compiles_anew_is_told_of_each(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recorded()
    monkeypatch.setattr(Recorded, "compiled_by_size", True)
    clock = iter([9.0, 2.0, 1.0])  # and the memory's process does not say
    monkeypatch.setattr(measure, "clocked", lambda function, device: (function(), next(clock)))
    (line,) = lines_of(small_plan(rounds=1), [CASE], ("a",))
    assert (line["compile_s"], line["median_ms"]) == (7.0, 1000.0)
    assert said == [("a", 0)] * 3


def test_a_wrong_neighbour_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = jobs.GRAPHS["dense_cdist"]

    def one_wrong(*arguments: Any) -> torch.Tensor:
        table = right(*arguments).clone()
        table[7, 2] = table[7, 3]
        return table

    monkeypatch.setitem(jobs.GRAPHS, "dense_cdist", one_wrong)
    monkeypatch.setattr(measure, "in_own_process", lambda *_: {"peak_bytes": 1})
    wrong, good = lines_of(small_plan(), [CASE._replace(workload="graph")], ("dense_cdist", "scipy_kdtree"))
    assert (wrong["check"], wrong["relative_error"], wrong["median_ms"]) == ("red", 1.0, None)
    assert good["check"] == "green"


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


def test_memory_that_sufficed_for_one_is_no_failure(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded()
    running: set[str] = set()

    def start(self: suite.Entrant) -> None:
        if running:
            raise MemoryError
        running.add(self.name)
        self.job = Recorded(self.name, [])

    def finish(self: suite.Entrant) -> None:
        running.clear()
        self.line["median_ms"] = 1.0

    monkeypatch.setattr(suite.Entrant, "start", start)
    monkeypatch.setattr(suite.Entrant, "finish", finish)
    lines = lines_of(small_plan(), [CASE], ("a", "b"))
    assert [(line["note"], line["median_ms"], line["alone"]) for line in lines] == [("", 1.0, False), ("", 1.0, True)]


def test_an_interruption_keeps_the_turns_that_were_made(
    recorded: Callable[..., list[Any]],
) -> None:
    recorded(b=KeyboardInterrupt())  # in its second turn, which it begins
    lines: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        Suite(small_plan(rounds=5), lines.append, lambda what: None).run_case(CASE, ("a", "b"))
    assert [(line["provider"], line["rounds"], line["note"]) for line in lines] == [("a", 1, ""), ("b", 1, "")]


@pytest.mark.parametrize("spots", [3, 4])
def test_of_a_slide_of_its_neighbours_the_published_code_makes_something_else(spots: int) -> None:
    (line,) = lines_of(small_plan(), [CASE._replace(spots=spots)], ("eager_stflow",))
    assert line["note"] == "the published code wants more than 4 spots"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "sampel"], "--workload: there is no 'sampel'; choose from sample,"),
        (["--providers", "reference,fast"], "--providers: there is no 'fast'; choose from eager_stflow,"),
        (
            ["--workload", "graph,sample", "--providers", "reference"],
            "--providers: none of reference is one of graph; choose from scipy_kdtree,",
        ),
        (["--workload", "graph", "--providers", "reference"], "--providers: none of reference is one of graph"),
        (["--layout", "hexagons"], "--layout: there is no 'hexagons'"),
        (["--dtype", "float16"], "--dtype: there is no 'float16'; choose from float32,"),
        (["--dtype", "tf32", "--device", "cpu"], "--dtype: tf32 is the precision of a GPU"),
        (["--device", "cuda"], "device: cuda is not there"),
        (["--memory-budget", "much"], "--memory-budget: must be a size such as 4GiB"),
        (["--spots", "1e3,many"], "--spots: must be whole numbers"),
        (["--k", "0"], "--k: must be whole numbers"),
        (["--k", "1100"], "--k: at most 1099"),
        (["--threads", "0,2"], "--threads: must be whole numbers of 1 to 1000 such as 1,2, not '0,2'"),
        (["--threads", "two"], "--threads: must be whole numbers"),
        (["--busy", "-1"], "--busy: must be whole numbers of 0 to 1000"),
        (["--busy", "1e6"], "--busy: must be whole numbers"),
        (["--busy", "2", "--busy-nice", "20"], "--busy-nice: must be whole numbers of 0 to 19"),
        (["--spots", "10", "--genes", "1000000", "--memory-budget", "1GiB"], "the inputs of 1,100 spots"),
        (["--rounds", "0"], "--rounds: must be more than 0"),
        (["--seconds", "nan"], "--seconds: must be more than 0"),
        (["--minutes", "-1"], "--minutes: must be more than 0"),
        (["--spots", "3e6", "--genes", "18000", "--memory-budget", "8GiB"], "raise --memory-budget"),
        (["--report", "--out", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stflow-fast", "benchmark", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stflow-fast: ")
    assert said in line
    assert list(tmp_path.iterdir()) == []


def test_over_the_budget_is_a_note_and_no_figure() -> None:
    plan = small_plan(memory_budget=2**20)
    (line,) = lines_of(plan, [CASE._replace(spots=2000)], ("dense_softmax",))
    assert line["note"] == "it needs 0.1 GiB, over the budget of 0.0 GiB"
    assert all(line[field] is None for field in ("median_ms", "peak_bytes", "compile_s", "spots_per_s"))


@needs_proc
def test_memory_in_a_process_of_its_own() -> None:
    plan, case = small_plan(), CASE._replace(spots=2000, threads=1)
    found = measure.in_own_process(suite.peak_of, plan, case, "dense_softmax")
    scores = 2 * 4 * 2 * 2000 * 2000
    assert 1 / 1.5 < found["peak_bytes"] / scores < 1.5
    found = measure.in_own_process(suite.peak_of, small_plan(memory_budget=2**25), case, "dense_softmax")
    assert re.fullmatch(r"out of memory at [\d,]+ bytes", found["note"])


def many_small() -> list[torch.Tensor]:
    """100 MB that a C library keeps when they are freed."""
    return [torch.ones(10_000) for _ in range(2_500)]


def peak_after_the_same() -> int:
    many_small()
    return measure.resident_peak(many_small)


@needs_proc
def test_the_process_of_the_memory_tells_what_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(Recorded, "compiled_by_size", True)
    monkeypatch.setattr(suite, "job_of", lambda plan, case, name: Recorded(name, said))
    clock = iter([9.0, 2.0])
    monkeypatch.setattr(measure, "clocked", lambda function, device: (function(), next(clock)))
    assert suite.peak_of(small_plan(), CASE, "a")["compile_s"] == 7.0
    assert len(said) == 3  # one more, for the peak


def test_a_broken_file_is_told_before_anything_is_measured(tmp_path: Path, small: None) -> None:
    run(tmp_path, "--workload", "graph", "--providers", "scipy_kdtree")
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(before := "{broken\n" + path.read_text())
    with pytest.raises(InputError, match="line 1: is not valid JSON"):
        run(tmp_path, "--workload", "graph", "--providers", "scipy_kdtree")
    assert path.read_text() == before


def test_memory_that_was_freed_before_is_counted_again() -> None:
    assert measure.in_own_process(peak_after_the_same) > 90_000_000


def test_a_process_that_died_has_no_answer() -> None:
    assert measure.in_own_process(sys.exit, 1) is None


class Recorded(Job):
    arithmetic, judged = "float32", False

    def __init__(self, name: str, said: list[Any], fails: Exception | None = None) -> None:
        self.name, self.said, self.fails = name, said, fails

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        return None

    def load(self, spots: int, layout: str, seed: int = 0) -> None:
        pass

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        pass

    def call(self, turn: int) -> None:
        self.said.append((self.name, turn))
        if self.fails and turn == 1:
            raise self.fails

    def result(self) -> torch.Tensor:
        raise NotImplementedError


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    def record(**fails: Exception) -> list[Any]:
        said: list[Any] = []
        for module in (jobs, suite):
            monkeypatch.setattr(module, "job_of", lambda plan, case, name: Recorded(name, said, fails.get(name)))
        monkeypatch.setattr(measure, "in_own_process", lambda *_: {"peak_bytes": 1})
        return said

    return record


def counting() -> list[int]:
    """The processes that count beside this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text()
            if ours and busy.COUNT.encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def processor_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def is_gone(pid: int) -> bool:
    """Also where it has ended and nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(what: Callable[[], bool]) -> None:
    last = time.monotonic() + 60
    while not what():
        assert time.monotonic() < last
        time.sleep(0.01)


@needs_proc
@pytest.mark.parametrize("ended_by", [None, RuntimeError, KeyboardInterrupt])
def test_busy_processes_count_until_the_end_whatever_that_is(ended_by: type[BaseException] | None) -> None:
    nicer = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 5)
    with pytest.raises(ended_by) if ended_by else contextlib.nullcontext(), busy_processes(2, 5):
        pids = counting()
        assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in pids] == [nicer] * 2
        for pid in pids:
            before = processor_time(pid)
            wait_for(lambda pid=pid, before=before: processor_time(pid) > before)
        if ended_by:
            raise ended_by
    assert counting() == []
    assert all(map(is_gone, pids))


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_busy_processes_end_with_the_one_that_started_them(number: signal.Signals) -> None:
    code = """
import os, time
from pathlib import Path
from busy import busy_processes
with busy_processes(2):
    print(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(), flush=True)
    time.sleep(600)
"""
    folder = Path(busy.__file__).parent
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, **pipes) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(is_gone, pids))
        parent.send_signal(number)
        wait_for(lambda: all(map(is_gone, pids)))
        parent.communicate()
    assert parent.returncode == -number


@needs_proc
def test_a_busy_process_that_somebody_ended_is_said() -> None:
    beside = busy_processes(2)
    beside.__enter__()
    pid, _ = counting()
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ChildProcessError, match="a busy process was ended"):
        beside.__exit__(None, None, None)
    assert counting() == []


class Watched(Recorded):
    """Says how many processes count beside it, and how many threads torch has."""

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        self.said.append(("prepare", len(counting()), torch.get_num_threads()))

    def call(self, turn: int) -> None:
        self.said.append(("call", len(counting()), torch.get_num_threads()))
        if self.fails:
            raise self.fails


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    def watch(fails: BaseException | None = None) -> list[Any]:
        said: list[Any] = []
        for module in (jobs, suite):
            monkeypatch.setattr(module, "job_of", lambda plan, case, name: Watched(name, said, fails))

        def peak(function: Callable, plan: Plan, case: Case, name: str) -> dict[str, int]:
            said.append(("peak", len(counting()), case.threads))
            return {"peak_bytes": 1}

        monkeypatch.setattr(measure, "in_own_process", peak)
        return said

    return watch


@needs_proc
def test_what_is_timed_is_beside_busy_processes_and_on_so_many_threads(watched: Callable[..., list[Any]]) -> None:
    said, before = watched(), torch.get_num_threads()
    cases = [CASE._replace(threads=3), CASE._replace(threads=3, busy=2, busy_nice=1)]
    idle, beside = lines_of(small_plan(rounds=2), cases, ("a",))
    timed = ["prepare", "call", "call", "call"]
    assert said == [("peak", 0, 3), *((what, 0, 3) for what in timed), *((what, 2, 3) for what in timed)]
    assert (counting(), torch.get_num_threads()) == ([], before)
    told = [tuple(line[field] for field in ("threads", "busy", "busy_nice", "peak_bytes")) for line in (idle, beside)]
    assert told == [(3, 0, 0, 1), (3, 2, 1, 1)]  # the peak is asked once


@needs_proc
@pytest.mark.parametrize(
    ("fails", "raised", "notes"),
    [(RuntimeError("no"), contextlib.nullcontext(), ["RuntimeError: no"]), (KeyboardInterrupt(), None, [])],
)
def test_nothing_is_busy_and_threads_are_as_before_where_it_failed(
    watched: Callable[..., list[Any]], fails: BaseException, raised: Any, notes: list[str]
) -> None:
    said, before, lines = watched(fails), torch.get_num_threads(), []
    with raised or pytest.raises(KeyboardInterrupt):
        Suite(small_plan(), lines.append, lambda what: None).run_case(CASE._replace(threads=3, busy=2), ("a",))
    assert [line["note"] for line in lines] == notes
    assert said[-1] == ("call", 2, 3)
    assert (counting(), torch.get_num_threads()) == ([], before)


@needs_proc
def test_the_first_trend_of_a_busy_case_is_beside_busy_processes(watched: Callable[..., list[Any]]) -> None:
    said = watched()
    lines_of(small_plan(check_spots=39, rounds=1), [CASE._replace(busy=1)], ("a",))
    small, (peak, *timed) = said[:4], said[4:]
    assert {beside for _, beside, _ in small} == {beside for _, beside, _ in timed} == {1}
    assert peak[:2] == ("peak", 0)


def test_a_busy_case_is_left_out_by_its_own_trend(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded()
    monkeypatch.setattr(suite, "busy_processes", lambda *_: contextlib.nullcontext())
    times = {0: 1.0, 2: 8.0}
    monkeypatch.setattr(
        suite.Entrant,
        "time",
        lambda self, turn: self.warm.append(25.0 * self.case.spots * times[self.case.busy]),
    )
    cases = [CASE._replace(spots=spots, busy=number) for number in (0, 2) for spots in (40, 80)]
    lines = lines_of(small_plan(rounds=1, seconds=30.0), cases, ("a",))
    # Two calls of 16 s: the peak of memory is known.
    assert [line["note"] for line in lines] == ["", "", "", "left out: some 32 s expected; raise --seconds"]


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


def test_the_committed_lines_load() -> None:
    lines = load(ROOT / command.COMMITTED)
    assert all(line["busy"] >= 0 and line["threads"] >= 1 for line in lines)


def test_providers_take_turns(recorded: Callable[..., list[Any]]) -> None:
    said = recorded()
    lines_of(small_plan(rounds=3), [CASE], ("a", "b"))
    turns = [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]  # nobody always follows the same
    assert said == [("a", 0), ("b", 0), *turns]


def test_what_fails_costs_its_own_line_alone(recorded: Callable[..., list[Any]]) -> None:
    said = recorded(a=RuntimeError("first\nsecond"), b=MemoryError())
    a, c, b = lines_of(small_plan(rounds=3), [CASE], ("a", "b", "c"))  # b once more by itself
    assert said.count(("b", 1)) == 2
    assert a["note"] == "RuntimeError: first"
    assert re.fullmatch(r"out of memory at [\d,]+ bytes", b["note"])
    assert (c["note"], c["rounds"]) == ("", 3)
    assert ("a", 2) not in said
    assert a["median_ms"] is b["median_ms"] is None


def test_left_out_by_the_trend(recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    recorded()
    seconds = {40: 1.0, 80: 4.0}
    monkeypatch.setattr(suite.Entrant, "time", lambda self, turn: self.warm.append(1e3 * seconds[self.case.spots]))
    cases = [CASE._replace(spots=spots) for spots in (40, 80, 160)]
    *_, last = lines_of(small_plan(rounds=2, seconds=40.0), cases, ("a",))
    assert last["note"] == "left out: some 48 s expected; raise --seconds"


def test_a_first_size_that_is_large_is_left_out_by_a_small_one(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded()
    monkeypatch.setattr(measure, "clocked", lambda function, device: (function(), 2.0))
    plan = small_plan(seconds=100.0)
    monkeypatch.setattr(jobs, "FEW_SPOTS", 20)
    small, large = (lines_of(plan, [CASE._replace(spots=spots)], ("a",))[0] for spots in (40, 40_000))
    assert small["note"] == ""
    assert large["note"] == "left out: some 12000 s expected; raise --seconds"  # 2 s at 20 spots, three times


def test_what_does_not_fit_beside_the_others_is_measured_alone(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recorded()
    monkeypatch.setattr(measure, "in_own_process", lambda *_: {"peak_bytes": 400})
    plan = dataclasses.replace(small_plan(rounds=1), memory_budget=1_000)
    lines = lines_of(plan, [CASE], ("a", "b", "c"))
    assert [(line["provider"], line["alone"], line["rounds"]) for line in lines] == [
        ("a", False, 1),
        ("b", False, 1),
        ("c", True, 1),
    ]
    assert [name for name, _ in said] == ["a", "b", "a", "b", "c", "c"]


def test_turns_end_with_the_time_that_a_case_may_take(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded()
    clock = iter(range(1000))
    monkeypatch.setattr(suite.time, "monotonic", lambda: 10.0 * next(clock))
    (line,) = lines_of(small_plan(rounds=9, seconds=70.0), [CASE], ("a",))
    assert 1 < line["rounds"] < 9
    (line,) = lines_of(small_plan(rounds=9, seconds=1.0), [CASE], ("a",))
    assert line["rounds"] == 1


def test_the_time_that_those_before_it_need_is_not_left(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded()
    monkeypatch.setattr(suite.time, "monotonic", lambda: 0.0)
    plan, found = small_plan(rounds=1, deadline=100.0, seconds=100.0), []
    measured = Suite(plan, found.append, lambda what: None)
    earlier = {**LINE, **CASE._asdict(), "median_ms": 20_000.0}
    measured.recall([{**earlier, "provider": name} for name in "ab"])
    measured.run_case(CASE, ("a", "b"))  # three calls each: 60 s, of which 40 are ahead of a when b is asked
    assert {line["provider"]: line["note"] for line in found} == {"a": "", "b": ""}
    measured.recall([{**earlier, "provider": name, "spots": 80, "median_ms": 25_000.0} for name in "ab"])
    found.clear()
    measured.run_case(CASE._replace(spots=80), ("a", "b"))
    assert {line["provider"]: line["note"] for line in found} == {"a": "", "b": suite.TIME_IS_UP}


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


def test_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    def commit(name: str, content: str) -> str:
        (tmp_path / name).write_text(content)
        git("add", name)
        git("commit", "-m", name)
        return git("rev-parse", "--short=12", "HEAD").strip()

    git("init")
    monkeypatch.setattr(measure, "__file__", str(tmp_path / "measure.py"))
    first = commit("measure.py", "1")
    assert measure.same_code(first)
    commit("results.jsonl", "{}")
    assert measure.same_code(first)
    assert not measure.same_code(measure.UNKNOWN)
    assert not measure.same_code("0123456789ab")
    last = commit("measure.py", "2")
    assert not measure.same_code(first)
    assert measure.same_code(last)
    (tmp_path / "measure.py").write_text("3")
    assert not measure.same_code(last)


def test_the_peak_of_a_sample_is_that_of_a_shorter_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.job_of(small_plan(), CASE, "reference")
    calls: list[None] = []
    job.sample_steps = jobs.STEADY_STEPS
    job.prepare(40, "visium")
    denoise = Denoiser.denoise_at
    monkeypatch.setattr(Denoiser, "denoise_at", lambda *arguments: calls.append(None) or denoise(*arguments))
    job.call(0)
    assert len(calls) == 3


def test_expected_seconds() -> None:
    assert suite.expected_seconds([], 10) is None
    assert suite.expected_seconds([(10, 2.0)], 30) == pytest.approx(6.0)
    assert suite.expected_seconds([(1, 9.0), (10, 1.0), (100, 100.0)], 1000) == pytest.approx(10_000)


class Driver:
    """Of a device whose memory in use is what a test says."""

    used = 5

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pynvml = pytest.importorskip("pynvml")
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self._answer)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))

    def _answer(self, handle: str) -> SimpleNamespace:
        assert handle == "GPU-12-ab"
        return SimpleNamespace(used=self.used)


def test_the_memory_that_the_device_names(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, device = Driver(monkeypatch), torch.device("cuda")
    with measure.device_memory(device) as most:
        driver.used = 9
        time.sleep(0.05)
        driver.used = 7
    assert most() == 9 - 5
    with measure.device_memory(device) as most:
        driver.used = 11  # may be over before it is asked again, but for the last time
    assert most() == 11 - 7


def test_a_device_that_does_not_answer_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    pynvml = sys.modules["pynvml"]

    def silent(handle: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", silent)
    with measure.device_memory(torch.device("cuda")) as most:
        driver.used = 9
    assert most() is None


def test_on_a_gpu_memory_is_that_of_making_and_of_two_calls(
    recorded: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = recorded()
    Driver(monkeypatch)
    monkeypatch.setattr(measure, "clocked", lambda function, device: (function(), 1.0))
    monkeypatch.setattr(measure, "flush_l2", lambda device: said.append("flush"))
    monkeypatch.setattr(measure, "event_ms", lambda function: (function(), 2.0)[1])
    monkeypatch.setattr(measure, "peak", lambda function, device: (function(), len(said))[1])
    monkeypatch.setattr(measure, "device_profile", lambda function: (function(), {"device_ms": 1.5})[1])
    monkeypatch.setattr(measure, "device_name", lambda device: "a GPU")
    for name, answer in {"empty_cache": None, "memory_reserved": 2, "max_memory_reserved": 8}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    plan = dataclasses.replace(small_plan(rounds=2), device=torch.device("cuda"))
    (line,) = lines_of(plan, [CASE], ("a",))
    assert said == [("a", 0), ("a", 0), "flush", ("a", 0), ("a", 0), "flush", ("a", 1), ("a", 1)]
    assert (line["note"], line["peak_bytes"], line["reserved_bytes"], line["device_bytes"]) == ("", 2, 6, 0)
    assert (line["median_ms"], line["cold_l2_ms"], line["device_ms"]) == (2.0, 2.0, None)
    said.clear()
    timed, profiled = lines_of(dataclasses.replace(plan, profile=True), [CASE], ("a",))
    assert timed == {**line, "date": timed["date"], "load": timed["load"]}  # written before a profiler begins
    assert profiled == {**timed, "device_ms": 1.5, "load": profiled["load"]}
    assert said[-1] == ("a", 0)


class Event(NamedTuple):
    key: str
    count: int
    self_device_time_total: float  # microseconds
    device_type: torch.autograd.DeviceType = torch.autograd.DeviceType.CUDA


EVENTS = [
    *(Event("copy", 1, 500.0), Event("a kernel", 4, 2500.0)),
    Event("aten::mm", 1, 9e9, torch.autograd.DeviceType.CPU),
]


@pytest.mark.parametrize(
    ("events", "fields"),
    [
        (EVENTS, {"device_ms": 3.0, "device_kernels": [["a kernel", 4, 2.5], ["copy", 1, 0.5]]}),
        ([], {}),
        (RuntimeError("no CUPTI"), {}),
    ],
)
def test_a_profile_counts_what_the_gpu_did(
    monkeypatch: pytest.MonkeyPatch, events: list[Event] | RuntimeError, fields: dict[str, Any]
) -> None:
    @contextlib.contextmanager
    def profile(activities: list[Any]) -> Iterator[Any]:
        yield SimpleNamespace(key_averages=lambda: events)
        if isinstance(events, RuntimeError):
            raise events

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    called = []
    assert measure.device_profile(lambda: called.append(1)) == fields
    assert called == [1]


def test_what_does_not_run_in_a_dtype_is_measured_beside_it_and_says_its_own() -> None:
    case = CASE._replace(dtype="bf16")
    published, ours = (jobs.job_of(small_plan(), case, name) for name in ("eager_stflow", "reference"))
    assert (published.arithmetic, ours.arithmetic) == ("float32", "bf16")


def test_after_the_deadline_nothing_runs(recorded: Callable[..., list[Any]]) -> None:
    said = recorded()
    (line,) = lines_of(small_plan(deadline=-math.inf), [CASE], ("a",))
    assert line["note"] == "left out: the time is up; raise --minutes"
    assert not said


@pytest.mark.parametrize("workload", ["sample", "train_step", "graph"])
def test_inputs_rotate_and_are_not_zero(workload: str) -> None:
    job = jobs.job_of(
        small_plan(),
        CASE._replace(workload=workload, layout="uniform"),
        "reference" if workload != "graph" else "scipy_kdtree",
    )
    job.prepare(40, "uniform")
    assert len(job.sets) == jobs.INPUT_SETS
    assert all((values != 0).all() for values in job.sets)
    assert not any(torch.equal(job.sets[0], other) for other in job.sets[1:])
    if workload == "sample":
        drawn = [job.call(turn) for turn in range(jobs.INPUT_SETS + 1)]
        assert torch.equal(drawn[0], drawn[-1])
        assert not torch.equal(drawn[0], drawn[1])


def test_only_the_command_line_imports_the_benchmarks() -> None:
    importing = re.compile(r"^\s*(from|import)\s+(\.+benchmarks|stflow_fast\.benchmarks|benchmarks)\b", re.MULTILINE)
    found = {path.name for path in (ROOT / "stflow_fast").rglob("*.py") if importing.search(path.read_text())}
    found |= {path.name for path in (ROOT / "kernels").rglob("*.py") if importing.search(path.read_text())}
    assert found == {"cli.py"}

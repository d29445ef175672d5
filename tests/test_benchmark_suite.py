"""What the suite does with the providers of a case: checks, turns, trends, and what becomes of those that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stflow_fast.benchmarks.suite import jobs, measure
from stflow_fast.benchmarks.suite import run as suite
from stflow_fast.benchmarks.suite.run import LINE, Suite

from stflow_fast import Denoiser

from .benchmark_jobs import CASE, Driver, Recorded, lines_of, needs_proc, small_plan


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


def test_over_the_budget_is_a_note_and_no_figure() -> None:
    plan = small_plan(memory_budget=2**20)
    (line,) = lines_of(plan, [CASE._replace(spots=2000)], ("dense_softmax",))
    assert line["note"] == "it needs 0.1 GiB, over the budget of 0.0 GiB"
    assert all(line[field] is None for field in ("median_ms", "peak_bytes", "compile_s", "spots_per_s"))


@needs_proc
def test_the_process_of_the_memory_tells_what_it_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(Recorded, "compiled_by_size", True)
    monkeypatch.setattr(suite, "job_of", lambda plan, case, name: Recorded(name, said))
    clock = iter([9.0, 2.0])
    monkeypatch.setattr(measure, "clocked", lambda function, device: (function(), next(clock)))
    assert suite.peak_of(small_plan(), CASE, "a")["compile_s"] == 7.0
    assert len(said) == 3  # one more, for the peak


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    def record(**fails: Exception) -> list[Any]:
        said: list[Any] = []
        for module in (jobs, suite):
            monkeypatch.setattr(module, "job_of", lambda plan, case, name: Recorded(name, said, fails.get(name)))
        monkeypatch.setattr(measure, "in_own_process", lambda *_: {"peak_bytes": 1})
        return said

    return record


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

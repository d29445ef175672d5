"""Busy processes beside what is timed: they begin before it and end with it, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stflow_fast.benchmarks.suite import busy, jobs, measure
from stflow_fast.benchmarks.suite import run as suite
from stflow_fast.benchmarks.suite.busy import busy_processes
from stflow_fast.benchmarks.suite.cases import Case, Plan
from stflow_fast.benchmarks.suite.run import Suite

from .benchmark_jobs import CASE, Recorded, lines_of, needs_proc, small_plan


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

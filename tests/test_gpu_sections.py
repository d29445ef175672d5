"""Sections of what is run on a GPU (``benchmarks.gpu``): each its own process, begun again where it was struck down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import page, sections
from benchmarks.gpu.plan import ALL_FIGURES, MINUTES, STARTING, Section, alone
from benchmarks.gpu.sections import DONE, TIME_UP, run
from benchmarks.pages.lines import newest, read

from .gpu_plan_cases import FIRST, ROOT, SAMPLE, python


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hangs here has nothing to write."""
    monkeypatch.setattr(sections, "GRACE", 0.3)


CRASH, KILLED = (
    python("import os; print('begun', flush=True); os.abort()"),
    python("import os; os.kill(os.getpid(), 9)"),
)
HANG = python("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
GOOD, REFUSED = (
    python("print('3 new lines')"),
    python("import sys; print('no such thing', file=sys.stderr); sys.exit(2)"),
)


def test_what_becomes_of_a_process_costs_its_section_alone(tmp_path: Path) -> None:
    commands = {
        "crash": CRASH,
        "hang": HANG,
        "memory": KILLED,
        "good": GOOD,
        "refused": REFUSED,
        "absent": ("no-such",),
    }
    found = run(Section("all", 4, commands), {}, 4.0, tmp_path / "log", lambda: "9 MHz")
    lines = {line["part"]: line for line in found}
    assert {name: line["outcome"] for name, line in lines.items()} == {
        "crash": "ended by SIGABRT",
        "hang": "no end within 4 s",
        "memory": "ended by SIGKILL, as the system does where memory is out",
        "good": DONE,
        "refused": "exit 2",
        "absent": "cannot run: no-such is not installed",
    }
    said = {name: lines[name]["said"] for name in ("good", "refused", "crash")}
    assert said == {"good": "3 new lines", "refused": "no such thing", "crash": "begun"}
    assert lines["hang"]["seconds"] >= 4 > lines["crash"]["seconds"]
    assert lines["hang"]["clocks"] == "9 MHz"
    assert "no such thing" in (tmp_path / "log").read_text()


def test_a_section_that_ends_leaves_no_child_behind(tmp_path: Path) -> None:
    """A child holds what the section writes to, and sleeps on."""
    child = f"import time; open({str(tmp_path / 'pid')!r}, 'w').write(str(__import__('os').getpid())); time.sleep(600)"
    wait = f"while not __import__('os').path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.1)"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n{wait}\ntime.sleep(0.5)"
    begun = time.monotonic()
    (line,) = run(alone("a", 60, python(code)), {}, 60.0, tmp_path / "log", lambda: "")
    assert line["outcome"] == DONE
    assert time.monotonic() - begun < 50
    child_id = int((tmp_path / "pid").read_text())
    for _ in range(100):  # until the system has taken it away
        if not alive(child_id):
            break
        time.sleep(0.1)
    assert not alive(child_id)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def rehearse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``make gpu`` rehearsed; its sections are processes of their own."""

    def rehearsed(out: Path, *arguments: str) -> int:
        monkeypatch.setattr(gpu, "BEGUN", time.monotonic())
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(out), "--rehearse", *arguments])
        return gpu.main()

    return rehearsed


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rehearse: Callable[..., int]) -> Callable[..., int]:
    """The same, of other sections."""

    def called(plan: list[Section], *arguments: str) -> int:
        monkeypatch.setattr(gpu, "plan", lambda *_: plan)
        monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
        return rehearse(tmp_path, *arguments)

    return called


def lines_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rehearsal-sections.jsonl").read_text().splitlines()]


def test_another_call_does_what_is_missing_and_first_what_was_never_begun(
    call: Callable[..., int], tmp_path: Path
) -> None:
    marks = [python(f"open({str(tmp_path / 'order')!r}, 'a').write('{name}')") for name in "abc"]
    first, crash, hang = alone(FIRST, 9, marks[0]), alone("crash", 9, CRASH), alone("hang", 1, HANG)
    late, mended = alone("late", 9, marks[1]), alone("crash", 9, marks[2])
    assert call([first, crash, hang, late], "--only", FIRST, "--only", "crash", "--only", "hang") == 1
    assert [line["outcome"] for line in lines_in(tmp_path)] == [DONE, "ended by SIGABRT", "no end within 1 s"]
    assert call([first, mended, hang._replace(commands={"": GOOD}), late]) == 0
    assert (tmp_path / "order").read_text() == "aabc"  # the first is done in every call
    newest = [line["section"] for line in lines_in(tmp_path)][3:]
    assert newest == [FIRST, "late", "crash", "hang"]
    assert call([first, mended, hang, late]) == 0
    assert len(lines_in(tmp_path)) == 8
    assert call([first, mended, late], "--again") == 0
    assert len(lines_in(tmp_path)) == 11
    page = (tmp_path / "rehearsal.md").read_text()
    assert page.startswith("# Rehearsal")
    assert "not begun" not in page


def test_where_the_time_is_up_the_page_is_there_and_the_section_is_as_new(
    call: Callable[..., int], tmp_path: Path
) -> None:
    plan = [alone(FIRST, 9, GOOD), alone("failed", 9, REFUSED), alone("cut", 9, HANG), alone("never", 9, GOOD)]
    assert call(plan, "--minutes", "0.05") == 1
    assert [line["outcome"] for line in lines_in(tmp_path)] == [DONE, "exit 2", TIME_UP]
    assert "| never | not begun |" in (tmp_path / "rehearsal.md").read_text()
    plan[2] = alone("cut", 9, GOOD)
    call(plan)
    assert [line["section"] for line in lines_in(tmp_path)][3:] == [FIRST, "cut", "never", "failed"]


def test_a_line_that_was_cut_off_is_a_section_that_is_run_again(call: Callable[..., int], tmp_path: Path) -> None:
    plan = [alone("a", 9, GOOD), alone("b", 9, GOOD)]
    assert call(plan) == 0
    path = tmp_path / "rehearsal-sections.jsonl"
    path.write_text(path.read_text()[:-30])
    assert call(plan) == 0
    assert [line["section"] for line in lines_in(tmp_path)] == ["a", "b"]


def test_a_page_that_cannot_be_drawn_costs_no_section(
    call: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, calls = page.drawn, []

    def fails(*arguments: Any) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a fault of the page")
        return drawn(*arguments)

    monkeypatch.setattr(page, "drawn", fails)
    assert call([alone("a", 9, GOOD), alone("b", 9, GOOD)]) == 0
    assert [line["outcome"] for line in lines_in(tmp_path)] == [DONE, DONE]


PLANTED = """
import os, pathlib, sys, threading, time

def fail(lines):
    while not (lines.exists() and lines.read_text().count(chr(10))):
        time.sleep(0.01)
    os.kill(os.getpid(), {signal})

if {workload!r} in sys.orig_argv and "1e4" in sys.orig_argv:
    lines = pathlib.Path(sys.orig_argv[sys.orig_argv.index("--out") + 1]) / "rehearsal.jsonl"
    threading.Thread(target=fail, args=(lines,), daemon=True).start()
"""
"""As ``sitecustomize.py`` on PYTHONPATH it strikes a section's process down when the first line is written."""


def test_a_rehearsal_goes_on_where_a_section_was_struck_down(
    tmp_path: Path, rehearse: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED.format(signal=11, workload="sample"))
    out = tmp_path / "out"
    monkeypatch.chdir(ROOT)
    for path, code in ((str(planted), 1), ("", 0), ("", 0)):
        monkeypatch.setenv("PYTHONPATH", path)
        assert rehearse(out, "--only", FIRST, "--only", SAMPLE) == code
    assert [(line["section"], line["outcome"]) for line in lines_in(out)] == [
        *((FIRST, DONE), (SAMPLE, "ended by SIGSEGV")),
        *((FIRST, DONE), (SAMPLE, DONE)),
        (FIRST, DONE),
    ]
    figures = newest(read(out / "rehearsal.jsonl"))
    assert {line["provider"] for line in figures} == set(ALL_FIGURES[SAMPLE][1].providers.split(","))
    for line in figures:
        if line["provider"] == "triton_graph":
            assert "needs a GPU" in line["note"]
        else:
            assert line["note"] == ""
            assert line["median_ms"] > 0
            assert line["check"] == ("green" if line["provider"] in ("triton", "eager_stflow") else "not compared")


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--out", tmp_path / "out"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "benchmarks gpu: nvidia-smi names no GPU; --rehearse runs the same plan on the CPU\n"
    assert not (tmp_path / "out").exists()


def test_a_process_is_told_how_long_it_has(tmp_path: Path) -> None:
    (line,) = run(alone("a", 90, (*python("import sys; print(sys.argv[1])"), MINUTES)), {}, 80.0, tmp_path / "log", str)
    assert float(line["said"]) == pytest.approx((80 - STARTING) / 60, abs=0.01)


@pytest.mark.parametrize(("seconds", "code", "outcome"), [(9.0, 1, "exit 1"), (8.0, 1, TIME_UP), (8.0, 2, "exit 2")])
def test_what_lacks_figures_for_want_of_time_is_as_new(seconds: float, code: int, outcome: str, tmp_path: Path) -> None:
    (line,) = run(alone("a", 9, python(f"import sys; sys.exit({code})")), {}, seconds, tmp_path / "log", str)
    assert line["outcome"] == outcome


def test_another_section_alone_has_its_kernels_too(call: Callable[..., int], tmp_path: Path) -> None:
    assert call([alone(FIRST, 9, GOOD), alone("a", 9, GOOD), alone("b", 9, GOOD)], "--only", "b") == 0
    assert [line["section"] for line in lines_in(tmp_path)] == [FIRST, "b"]

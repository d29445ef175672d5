"""What is run on a GPU that is at hand for some minutes (``benchmarks.gpu``), as far as a CPU goes."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stflow_fast.kernels import modules
from triton.runtime import cache as triton_cache

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cached, kernels, page, variants
from benchmarks.gpu.plan import ALL_FIGURES, MINUTES, STARTING, TEST_FILES, TESTS, Section, alone, plan
from benchmarks.gpu.sections import DONE, TIME_UP, run
from benchmarks.jobs import providers_of
from benchmarks.lines import NEWER, newest, read
from benchmarks.suite import LINE

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {name for module in modules() for name in vars(module) if name.endswith("_kernel")}
FIRST, SAMPLE = "kernels compiled", "sample of 10,000 spots in bf16"


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


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
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``make gpu`` rehearsed, of other sections."""

    def called(sections: list[Section], *arguments: str) -> int:
        monkeypatch.setattr(gpu, "plan", lambda *_: sections)
        monkeypatch.setattr(gpu, "BEGUN", time.monotonic())
        monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.5)
        monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path), "--rehearse", *arguments])
        return gpu.main()

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
    sections = [alone(FIRST, 9, GOOD), alone("failed", 9, REFUSED), alone("cut", 9, HANG), alone("never", 9, GOOD)]
    assert call(sections, "--minutes", "0.1") == 1
    assert [line["outcome"] for line in lines_in(tmp_path)] == [DONE, "exit 2", TIME_UP]
    assert "| never | not begun |" in (tmp_path / "rehearsal.md").read_text()
    sections[2] = alone("cut", 9, GOOD)
    call(sections)
    assert [line["section"] for line in lines_in(tmp_path)][3:] == [FIRST, "cut", "never", "failed"]


def test_a_line_that_was_cut_off_is_a_section_that_is_run_again(call: Callable[..., int], tmp_path: Path) -> None:
    sections = [alone("a", 9, GOOD), alone("b", 9, GOOD)]
    assert call(sections) == 0
    path = tmp_path / "rehearsal-sections.jsonl"
    path.write_text(path.read_text()[:-30])
    assert call(sections) == 0
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


def test_a_rehearsal_goes_on_where_a_section_was_struck_down(tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED.format(signal=11, workload="sample"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--only", FIRST, "--only", SAMPLE, "--out", out]
    for path, code in ((str(planted), 1), ("", 0), ("", 0)):
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
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
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", tmp_path / "out"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": ""}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "benchmarks.gpu: nvidia-smi names no GPU; --rehearse runs the same plan on the CPU\n"
    assert not (tmp_path / "out").exists()


def test_the_plan_names_what_there_is_and_all_gpu_tests(tmp_path: Path) -> None:
    places = []
    for _, figures in ALL_FIGURES.values():
        known = {name for workload in figures.workload.split(",") for name in providers_of(workload)}
        assert set(figures.providers.split(",")) <= known
        place = (figures.workload, figures.spots, figures.dtype, figures.providers)
        places += itertools.product(*(names.split(",") for names in place))
    assert len(set(places)) == len(places)  # the later would take the place of the earlier
    sections = plan(tmp_path, rehearse=False)
    names = [section.name for section in sections]
    assert len(set(names)) == len(names)
    assert names[:4] == [FIRST, "edge kernels in bf16", "other kernels in bf16", SAMPLE]
    marked = {
        path.name for path in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.gpu$", path.read_text(), re.M)
    }
    assert {Path(name).name for name in TEST_FILES} == marked


def test_what_runs_on_the_gpus_machine_imports_nothing_that_it_lacks() -> None:
    """Readers of files are not needed there, and tests of them may not stop those of the kernels."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in TEST_FILES]
    without = "import sys; sys.modules.update(dict.fromkeys(['anndata', 'zarr']))"
    code = f"{without}; import {', '.join(modules)}, benchmarks.gpu.variants, stflow_fast.cli"
    done = subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def figure(workload: str, provider: str, spots: int, **values: Any) -> dict[str, Any]:
    usual = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "check": "green", "dtype": "bf16", "arithmetic": "bf16"}
    place = {"workload": workload, "provider": provider, "spots": spots, "layout": "visium", "k": 8, "genes": 50}
    machine = {
        "threads": 16,
        "busy": 0,
        "busy_nice": 0,
        "device": "A GPU",
        "commit": "abc",
        "date": "2026",
        "versions": {},
    }
    return {**LINE, **NEWER, **place, **machine, **usual, **values}


COMMON = {"device": "A GPU", "driver": "580", "versions": {"torch": "2.11"}, "commit": "abc"}
PUBLISHED = figure("sample", "eager_stflow", 10_000, median_ms=75.0, arithmetic="tf32")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ([], "sample of 10,000 spots: 2 ms on the device: not measured"),
        ([figure("sample", "triton_graph", 10_000, median_ms=3.0, device_ms=1.9)], "2 ms on the device: met, 1.90 ms"),
        (
            [figure("sample", "triton_graph", 10_000, device_ms=4.0, device_kernels=[["a kernel", 16, 3.5]])],
            "2 ms on the device: missed, 4.00 ms\n    * of 4.00 ms: `a kernel` 16 launches 3.50 ms",
        ),
        ([PUBLISHED, figure("sample", "triton_graph", 10_000, median_ms=3.0)], "published algorithm: met, 25.00x"),
        ([PUBLISHED, figure("sample", "triton_graph", 10_000, median_ms=3.004)], "published algorithm: missed, 24.97x"),
        ([figure("sample", "triton_graph", 1_000_000, median_ms=201.0)], "1,000,000 spots: 200 ms: missed, 201 ms"),
        ([figure("sample", "triton_graph", 1_000_000, reserved_bytes=7_900_000_000)], "torch's pool: met, 7.90 GB"),
        (
            [figure("sample", "triton_graph", 1_000_000, median_ms=None, note="out of memory at 9 bytes", check="x")],
            "200 ms: not measured (out of memory)",
        ),
        ([figure("edge_forward", "triton_kept_edges", 1_000_000, of_floor=0.7)], "its floor: met, 1.43 times it"),
        ([figure("edge_forward", "triton_kept_edges", 1_000_000, of_floor=0.5)], "its floor: missed, 2.00 times it"),
        ([figure("edge_forward", "triton", 1_000_000, of_floor=0.9)], "its floor: not measured"),
    ],
)
def test_targets_are_judged_by_their_own_figure(figures: list[dict[str, Any]], said: str) -> None:
    text = page.drawn(COMMON, {}, [("a", "")], figures)
    assert said in text
    assert text.startswith("# A GPU\n\ntorch 2.11, driver 580; commit abc.")


def test_the_page_shows_red_checks_and_the_worst_errors_of_the_tests() -> None:
    line = {
        "outcome": DONE,
        "said": "a|b",
        "worst": ["0.94 of attention"],
        "seconds": 3.0,
        "clocks": "",
        "commit": "abc",
    }
    red = figure("sample", "triton", 10_000, median_ms=None, check="red", relative_error=0.5)
    text = page.drawn(COMMON, {("tests", "bf16"): {**line, "part": "bf16"}}, [("tests", "bf16")], [red])
    assert "* bf16: 0.94 of attention" in text
    assert "| tests: bf16 | done | 3 |  | a/b |" in text
    assert "| 5.0e-01 RED |" in text


def in_a_process(*arguments: str, cache: Path) -> dict[str, Any]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.variants", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_one_process_compiles_without_a_gpu_another_finds(tmp_path: Path) -> None:
    """With the key of an unpacked wheel, which is this Triton's own."""
    site = Path(triton_cache.__file__).parents[2]
    made = in_a_process("--share", "3/60", "--wheel", str(site), cache=tmp_path)
    found = in_a_process("--share", "3/60", cache=tmp_path)
    assert made["share"] == made["compiled"] >= 2
    assert found == {**made, "compiled": 0}
    assert found["key"] == variants.digest(triton_cache.triton_key())
    assert found["variants"] >= 60  # precisions, dropout, kept messages, autotune's tiles
    assert set(found["kernels"]) == KERNELS


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A packed cache of one file, for this Triton and this code."""
    for name, path in {"CARRIED": "carried", "ARCHIVE": "carried/a.tar.gz", "MANIFEST": "carried/m.json"}.items():
        monkeypatch.setattr(cached, name, tmp_path / path)
    monkeypatch.setattr(cached, "CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "x").mkdir(parents=True)
    (tmp_path / "cache" / "x" / "a.cubin").write_text("code")
    key = variants.digest(triton_cache.triton_key())
    return {"key": key, "triton": "3.6.0"}


@pytest.mark.parametrize(("changed", "said"), [({}, "is that"), ({"key": "another"}, "is not that")])
def test_kernels_that_travelled_are_unpacked_and_what_is_missing_compiled(
    carried: dict[str, Any], changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.pack(carried | changed)
    (cached.CACHE / "x" / "a.cubin").unlink()
    asked = []

    def compile_variants(*arguments: int) -> dict[str, int]:
        asked.append(arguments)
        assert (cached.CACHE / "x" / "a.cubin").read_text() == "code"
        return {"compiled": 2, "variants": 64}

    monkeypatch.setattr(kernels, "compile_variants", compile_variants)
    found = kernels.ready(90)
    assert f"{said} of the cache: 62 of 64 kernels found, 2 compiled by {os.cpu_count()} processes" in found
    assert asked == [(90, os.cpu_count())]


def test_where_nothing_travelled_kernels_are_compiled(carried: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_variants", lambda arch, processes: {"compiled": 64, "variants": 64})
    assert kernels.ready(90).startswith("no compiled kernels travelled: 0 of 64 kernels found, 64 compiled by")


def test_the_parts_of_the_tests_are_all_of_them_once() -> None:
    """The last part is of what no other word names; so no test may have two of them."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", *TEST_FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    words = ("published_code", "bf16", "fp16", "tf32", "ieee")
    found = [[word for word in words if word in name] for name in names]
    assert max(map(len, found)) == 1
    assert {word for each in found for word in each} == set(words)
    *parts, last = (which[-1] for which in TESTS.values())
    assert [part.partition(" ")[0] for part in parts] == list(words)
    assert last == f"not ({' or '.join(words)})"


def test_where_gpu_tests_must_run_their_absence_is_a_failure() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_kernel_gpu.py"]
    environment = {**os.environ, "STFLOW_TEST_GPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stdout + done.stderr


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

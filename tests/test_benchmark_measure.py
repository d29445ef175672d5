"""What benchmarks measure with: memory in a process of its own and on a device, profiles, the code measured."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from stflow_fast.benchmarks.suite import measure
from stflow_fast.benchmarks.suite import run as suite

from .benchmark_jobs import CASE, Driver, needs_proc, small_plan


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


def test_memory_that_was_freed_before_is_counted_again() -> None:
    assert measure.in_own_process(peak_after_the_same) > 90_000_000


def test_a_process_that_died_has_no_answer() -> None:
    assert measure.in_own_process(sys.exit, 1) is None


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

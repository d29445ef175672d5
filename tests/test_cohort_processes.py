"""Many slides by several processes and in shards: their deaths, and runs that go on."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata
import psutil
import pytest

from stflow_fast.cohort import RunConfig, predict, predict_iter, read_lines
from stflow_fast.cohort.local import Place, places_of
from stflow_fast.cohort.state import STATES
from stflow_fast.errors import InputError, OutputError, SlidesFailed

from .builders import slide_file
from .cohort_cases import folder, model, values
from .command_cases import say

__all__ = ["folder", "model", "say"]  # fixtures


def test_processes_write_what_one_writes(model: Path, folder: Path, tmp_path: Path) -> None:
    for out, config in ((tmp_path / "one", None), (tmp_path / "two", RunConfig(workers=2))):
        lines = list(predict_iter(model, folder, out, config=config))
        assert sorted((line.slide, line.status) for line in lines) == [
            *((name, "done") for name in ("S0", "S1", "S2", "S3")),
            ("broken", "failed"),
        ]
    assert values(tmp_path / "one") == values(tmp_path / "two")
    assert len(values(tmp_path / "one")) == 4


DEADLY = """
import os, signal
from stflow_fast.slides import registry

read = registry.read

def read_or_die(path, options=None):
    if path.stem == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(path, options)

registry.read = read_or_die
"""
"""As ``sitecustomize.py`` on PYTHONPATH of processes: reading a slide of that name is their end."""


def test_a_slide_that_kills_its_process_is_a_line_and_stops_none(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide_file(folder, "deadly")
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    lines = list(predict_iter(model, folder, tmp_path / "out", config=RunConfig(workers=2)))
    failed = {line.slide: line for line in lines if not line.is_done}
    assert sorted(failed) == ["broken", "deadly"]
    assert failed["deadly"].reason == (
        f"{folder / 'deadly.h5ad'}: the process that predicted it died (SIGKILL: out of memory?); try it by itself"
    )
    assert failed["deadly"].attempts >= 2
    assert sorted(values(tmp_path / "out")) == ["S0.h5ad", "S1.h5ad", "S2.h5ad", "S3.h5ad"]


SCRIPT = """
import sys
import stflow_fast

print(len(stflow_fast.predict(sys.argv[1], sys.argv[2], sys.argv[3], config=stflow_fast.cohort.RunConfig(workers=2))))
"""


def test_a_script_without_a_main_guard_is_run_once(model: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "broken.h5ad").unlink()
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", model, folder, tmp_path / "out"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "4\n", "")


def test_processes_end_with_the_one_that_started_them(model: Path, tmp_path: Path) -> None:
    for number in range(30):
        slide_file(tmp_path / "in", f"S{number}", n=900)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "stflow_fast", "predict", model, tmp_path / "in", "--out", out, "--workers", "2"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not read_lines(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert len(read_lines(out)) < 30


def test_a_process_that_cannot_start_ends_the_run(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for said, fault in (("ValueError: no room", "raise ValueError('no room')"), ("exit code 7", "os._exit(7)")):
        lines = ["import os", "from stflow_fast.cohort import local", "def load_model(*_):", f"    {fault}"]
        (tmp_path / "sitecustomize.py").write_text("\n".join([*lines, "local.load_model = load_model"]))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(InputError, match=said):
            predict(model, folder, tmp_path / "out", config=RunConfig(workers=2), overwrite=True)
    assert {line.slide for line in read_lines(tmp_path / "out").values()} == {"broken"}


def test_shards_of_another_number_are_not_let_in_at_once(model: Path, folder: Path, tmp_path: Path) -> None:
    first = predict_iter(model, folder, tmp_path / "out")
    next(first)
    with pytest.raises(OutputError, match=r"a process predicts shard 1-of-1 into it; wait for its end"):
        next(predict_iter(model, folder, tmp_path / "out", config=RunConfig(shard=(1, 2))))
    assert len(list(first)) == 4
    predict(model, folder / "S0.h5ad", tmp_path / "out", config=RunConfig(shard=(1, 2)))


def test_what_no_shard_can_predict_is_a_line_too(model: Path, folder: Path, tmp_path: Path) -> None:
    given = [tmp_path / "none.h5", folder / "S0.h5ad", folder / "S1.h5ad"]
    for index in (1, 2, 3):
        with contextlib.suppress(SlidesFailed):
            predict(model, given, tmp_path / "out", config=RunConfig(shard=(index, 3)))
    assert {name: line.status for name, line in read_lines(tmp_path / "out").items()} == {
        "none": "failed", "S0": "done", "S1": "done",
    }  # fmt: skip


def test_shards_share_a_folder_and_its_page_is_drawn_from_all(
    say: Callable[..., str], model: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "broken.h5ad").unlink()
    out, whole = tmp_path / "out", tmp_path / "whole"
    for index in (1, 2, 3):
        say("predict", model, folder, "--out", out, "--shard", f"{index}/3", code=0)
    predict(model, folder, whole)
    assert values(out) == values(whole)
    assert sorted(read_lines(out)) == ["S0", "S1", "S2", "S3"]
    assert sorted(path.name for path in (out / STATES).iterdir()) == [f"{i}-of-3.jsonl" for i in (1, 2, 3)]
    (out / "slides.csv").unlink()
    say("predict", "--summary", out, code=0)
    with (out / "slides.csv").open(newline="") as file:
        assert [row["slide"] for row in csv.DictReader(file)] == ["S0", "S1", "S2", "S3"]
    assert "holds no predictions.json" in say("predict", "--summary", tmp_path)
    before = values(out)
    another = say("predict", model, folder, "--out", out, "--shard", "1/3", "--seed", 7)
    assert "predictions.json: seed differs from this call; choose another --out, or --overwrite" in another
    assert values(out) == before
    say("predict", model, folder, "--out", out, "--shard", "1/3", "--seed", 7, "--overwrite", code=0)
    assert sorted(name for name, content in values(out).items() if content != before[name]) == ["S0.h5ad"]
    assert anndata.read_h5ad(out / "S3.h5ad").uns["stflow_fast"]["seed"] == 7  # one spot: noise reaches it by no edge
    for text in ("4/3", "0/3", "1", "a/b"):
        assert "shard: must be" in say("predict", model, folder, "--out", tmp_path / "x", "--shard", text)


def test_a_run_that_is_struck_down_goes_on_as_if_it_had_not_been(model: Path, folder: Path, tmp_path: Path) -> None:
    """SIGKILL at several moments; nothing is predicted twice that has a line, and nothing half written stays."""
    (folder / "broken.h5ad").unlink()
    for number in range(4, 10):
        slide_file(folder, f"S{number}", n=200)
    predict(model, folder, tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "stflow_fast", "predict", str(model), str(folder), "--out", str(out)]
    for wanted in (1, 6):
        process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(read_lines(out)) >= wanted:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.002)
        process.wait()
    assert 1 <= len(read_lines(out)) <= 10
    done = {name: line.when for name, line in read_lines(out).items()}
    missing = next(f"S{number}" for number in range(10) if f"S{number}" not in done)
    (out / f".{missing}.1.part.h5ad").write_bytes(b"half")
    (out / ".S99.1.part.h5ad").write_bytes(b"of another shard")
    predict(model, folder, out, resume=True)
    [of_others] = out.glob(".*")
    assert of_others.name == ".S99.1.part.h5ad"
    of_others.unlink()
    after = read_lines(out)
    assert {name: after[name].when for name in done} == done
    assert values(out) == values(tmp_path / "whole")


def test_processes_are_as_many_as_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert places_of(cpu, 15, None, None) == []
    assert places_of(cpu, 16, None, None) == [Place("cpu", 1)] * 4
    assert places_of(cpu, 2, 2, None) == [Place("cpu", 2)] * 2
    assert places_of(gpu, 1000, None, None) == []
    assert places_of(gpu, 2, None, (0, 3)) == [Place("cuda:0", None), Place("cuda:3", None)]

"""Options of the benchmark command that cannot be run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from stflow_fast import cli


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

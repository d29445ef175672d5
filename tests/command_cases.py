"""The program run in the process, with a task and a model to run it on, and its line of complaint."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stflow_fast import cli

from .builders import ENCODER, gene_names, write_model, write_task

TOLD = ["--n-neighbors", "8", "--no-non-negative"]
TRAIN = ["--encoder", ENCODER, "--epochs", "1", "--set", "hidden_dim=16", "--set", "pairwise_hidden_dim=16"]


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the program; return its one line of complaint, or with ``several`` all. Progress bars are none."""

    def run(*arguments: object, code: int = 2, several: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["stflow-fast", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capfd.readouterr()
        assert (ended.value.code or 0) == code, said.err
        assert "Traceback" not in said.err
        complaints = re.findall(r"^stflow-fast: .*$", said.err, flags=re.MULTILINE)
        if code:
            assert several or len(complaints) == 1
            assert said.err.rstrip().endswith("\n".join(complaints)), "a complaint has more than one line"
        return "\n".join(complaints)

    return run


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return write_task(tmp_path / "task")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", gene_names()[3:11])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

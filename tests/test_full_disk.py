"""A disk that fills up: one line, and nothing that was written before is lost."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from stflow_fast.model import Denoiser

from .builders import PANEL, gene_names, slide_file
from .command_cases import TOLD, TRAIN, contents, model, say, task

__all__ = ["model", "say", "task"]  # fixtures


def run_with_little_space(*arguments: object, most: int = 20_000) -> str:
    """Run the program where no file grows beyond ``most`` bytes, a real write error; return its one complaint."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    command = [sys.executable, "-m", "stflow_fast", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    [complaint] = re.findall(r"^stflow-fast: .*$", ended.stderr, flags=re.MULTILINE)
    return complaint


def test_predicting_on_a_disk_that_fills_up(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    slides, out = [slide_file(tmp_path / "in", name, n=900) for name in ("S0", "S1", "S2")], tmp_path / "out"
    say("predict", model, *slides[:2], "--out", out, code=0)
    before = {path: content for path, content in contents(out).items() if path.suffix == ".h5ad"}
    complaint = run_with_little_space("predict", model, *slides, "--out", out, "--overwrite", "--seed", 1)
    assert re.search(r"S0\.h5ad: cannot be written \(File too large\); free space", complaint)
    assert "S1" not in complaint  # the others would fail too
    assert {path: content for path, content in contents(out).items() if path.suffix == ".h5ad"} == before
    assert sorted(path.name for path in out.glob("*.h5ad")) == ["S0.h5ad", "S1.h5ad"]
    assert not [path for path in out.rglob("*.part*")]


def test_training_on_a_disk_that_fills_up(task: Path, tmp_path: Path) -> None:
    complaint = run_with_little_space("train", task, "--out", tmp_path / "run", *TRAIN)
    assert "checkpoint.safetensors: cannot be written" in complaint
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]


def test_overwriting_on_a_disk_that_fills_up(say: Callable[..., str], task: Path, model: Path, tmp_path: Path) -> None:
    say("train", task, "--out", tmp_path / "run", *TRAIN, code=0)
    state = Denoiser.from_pretrained(model).state_dict()
    torch.save(state, tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text(json.dumps(gene_names()[:PANEL]))
    before = contents(tmp_path)
    run_with_little_space("train", task, "--out", tmp_path / "run", *TRAIN, "--overwrite", "--seed", 1)
    convert = ["convert", tmp_path / "published.pth", "--genes", tmp_path / "genes.json", *TOLD]
    assert "cannot be written" in run_with_little_space(*convert, "--out", model, "--overwrite")
    assert contents(tmp_path) == before

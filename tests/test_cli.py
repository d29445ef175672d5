"""The command line from end to end on tiny data: what a new user types."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import anndata
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import stflow_fast
import stflow_fast.demo as demo
from benchmarks.baselines.eager_stflow import EagerDenoiser
from stflow_fast.cli import app
from stflow_fast.synthetic import make_cohort

from .builders import GENE_LIST, write_task


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_train_evaluate_predict(tmp_path: Path) -> None:
    task, out = write_task(tmp_path / "task"), tmp_path / "run"
    small = [option for pair in ("hidden_dim=16", "pairwise_hidden_dim=16", "n_layers=1") for option in ("--set", pair)]
    said = run("train", task, "--encoder", "tiny", "--out", out, "--epochs", 2, *small)
    assert "chosen on held-out regions" in said
    assert (out / "training.png").stat().st_size > 10_000
    genes = stflow_fast.HestTask(task, "tiny").genes(GENE_LIST)
    scores = tmp_path / "scores.json"
    said = run("evaluate", out, task, "--json", scores, "--biomarkers", f"{genes[0]},{genes[2]}")
    assert genes[2] in said
    assert "ridge alpha 1e4" in said
    written = json.loads(scores.read_text())
    assert -1 <= written["pearson_mean"] <= 1
    assert set(written["baselines"]) == {"train_mean", "hest_ridge", "ridge_alpha_1e4", "depth_oracle"}
    assert sorted(path.suffix for path in (out / "evaluation").iterdir()) == [".png", ".png"]
    embeddings = sorted((task / "embeddings" / "tiny" / "fp32").glob("*.h5"))
    run("predict", out, *embeddings, "--out", tmp_path / "predicted", "--seed", 3)
    for path in embeddings:
        table = anndata.read_h5ad(tmp_path / "predicted" / f"{path.stem}.h5ad")
        assert list(table.var_names) == list(genes)
        assert table.uns["stflow_fast"]["seed"] == 3


def test_convert(tmp_path: Path) -> None:
    published = EagerDenoiser(n_genes=3, feature_dim=5, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text('{"genes": ["A", "B", "C"]}')
    run("convert", tmp_path / "published.pth", "--out", tmp_path / "m", "--genes", tmp_path / "genes.json")
    model = stflow_fast.Denoiser.from_pretrained(tmp_path / "m")
    assert model.provenance.genes == ("A", "B", "C")


def test_doctor_says_what_would_run() -> None:
    said = run("doctor")
    for word in ("torch", torch.__version__, "edge attention", "device", "C++ compiler"):
        assert word in said


def test_demo_writes_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_cohort(n_train=2, train_spots=100, test_spots=200)
    monkeypatch.setattr(demo, "make_cohort", lambda seed: small)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    said = run("demo", "--out", tmp_path / "demo")
    assert "ridge alpha 1e4" in said
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "ERBB2" in page
    assert len(list((tmp_path / "demo" / "predictions").glob("*.h5ad"))) == 1


def test_the_demo_shows_what_neighbours_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a smaller cohort: the model beats ridge regression with neighbours, and not with wrong ones."""
    small = make_cohort(n_train=3, train_spots=500, test_spots=800)
    monkeypatch.setattr(demo, "make_cohort", lambda seed: small)
    page = demo.run_demo(tmp_path / "demo", seed=0, overwrite=False, console=Console(file=io.StringIO(), width=120))
    rows = re.findall(r"<td>([^<]+)</td><td>(0\.\d+)</td>", page.read_text())
    pearson = {name: float(value) for name, value in rows}
    assert pearson["stflow-fast"] > pearson["ridge alpha 1e4"] + 0.03
    assert pearson["stflow-fast"] > 2 * pearson["spots shuffled"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_program_and_the_module_start(arguments: list[str]) -> None:
    said = subprocess.run([sys.executable, "-m", "stflow_fast", *arguments], capture_output=True, text=True, check=True)
    assert "train" in said.stdout or stflow_fast.__version__ in said.stdout


def test_every_public_name_exists() -> None:
    for name in stflow_fast.__all__:
        assert getattr(stflow_fast, name) is not None
    with pytest.raises(AttributeError):
        stflow_fast.nothing  # noqa: B018

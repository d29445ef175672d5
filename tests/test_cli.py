"""The command line from end to end on tiny data: what a new user types."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anndata
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import stflow_fast
import stflow_fast.demo as demo
from benchmarks.opponents.eager_stflow import EagerDenoiser
from stflow_fast import cli, doctor
from stflow_fast.cli import app
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.synthetic import make_cohort

from .builders import BASELINES, GENE_LIST, write_task


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_training_says_how_many_genes_of_its_source_have_the_simpler_law(tmp_path: Path) -> None:
    task, out = write_task(tmp_path / "task"), tmp_path / "run"
    small = ["--set", "hidden_dim=16", "--set", "pairwise_hidden_dim=16", "--set", "n_layers=1", "--epochs", 1]
    said = run("train", task, "--encoder", "tiny", "--out", out, "--set", "prior=conditional", *small)
    source = Denoiser.from_pretrained(out / "model").source
    flat = source.fitted_on["fell_back"]
    assert flat > 0
    assert f"source conditional: {flat} of {len(source.genes)} genes show no over-dispersion, or no count" in said
    said = run("train", task, "--encoder", "tiny", "--out", out, "--overwrite", *small)
    assert "source " not in said


def test_train_evaluate_predict(tmp_path: Path) -> None:
    task, out = write_task(tmp_path / "task"), tmp_path / "run"
    small = [option for pair in ("hidden_dim=16", "pairwise_hidden_dim=16", "n_layers=1") for option in ("--set", pair)]
    said = run("train", task, "--encoder", "tiny", "--out", out, "--epochs", 2, *small)
    assert "model of epoch 2 of 2, no epoch chosen, weights averaged; in " in said
    chosen = ["--select-on", "validation", "--overwrite", "--set", "ema_decay=0.5"]
    assert "chosen on held-out regions" in run("train", task, "--encoder", "tiny", "--out", out, "--epochs", 2, *chosen)
    assert Denoiser.from_pretrained(out / "model").provenance.training["training"]["ema_decay"] == 0.5
    assert (out / "training.png").stat().st_size > 10_000
    genes = stflow_fast.HestTask(task, "tiny").genes(GENE_LIST)
    scores = tmp_path / "scores.json"
    said = run("evaluate", out, task, "--json", scores, "--biomarkers", f"{genes[0]},{genes[2]}")
    assert genes[2] in said
    assert "ridge alpha 1e4" in said
    written = json.loads(scores.read_text())
    assert -1 <= written["pearson_mean"] <= 1
    assert set(written["baselines"]) == BASELINES
    pictures = sorted(path.name for path in (out / "evaluation").iterdir())
    assert pictures == ["biomarkers_S2.png", "maps_S2.png", "scores.png"]
    assert set(written["biomarkers"]) == {genes[0], genes[2]}
    assert all(0 <= told["top_overlap"] <= 1 for told in written["biomarkers"].values())
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
    told = ("--n-neighbors", 6, "--non-negative")
    run("convert", tmp_path / "published.pth", "--out", tmp_path / "m", "--genes", tmp_path / "genes.json", *told)
    model = stflow_fast.Denoiser.from_pretrained(tmp_path / "m")
    assert model.provenance.genes == ("A", "B", "C")
    assert (model.config.n_neighbors, model.config.non_negative) == (6, True)


@pytest.mark.parametrize(
    "arguments",
    [
        "train DIR --encoder none --out OUT --embeddings DIR",
        "evaluate none DIR --json FILE --maps DIR --embeddings DIR",
        "predict none FILE --out DIR --embeddings DIR --genes FILE",
        "inspect FILE --model none --embeddings DIR",
        "convert FILE --out DIR --genes FILE",
        "embed DIR --encoder none --out DIR",
    ],
)
def test_what_may_not_be_read_is_refused_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    """One slide among others has no right to end the call, in a box, before anything is read."""
    (tmp_path / "file").write_text("A\nB")
    monkeypatch.setattr(os, "access", lambda *given, **options: False)
    known = {"DIR": tmp_path, "FILE": tmp_path / "file", "OUT": tmp_path / "out"}
    with pytest.raises(InputError):
        run(*(known.get(word, word) for word in arguments.split()))


def test_bad_input_is_a_line_each_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, lines in (
        (InputError("a.h5: is empty\nb.h5: is empty"), ["a.h5: is empty", "b.h5: is empty"]),
        (PermissionError(13, "Permission denied", "/closed/a"), ["/closed/a: Permission denied; .*name another path"]),
    ):
        monkeypatch.setattr(cli.program, "app", Mock(side_effect=error))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == len(lines)
        for line, expected in zip(said, lines, strict=True):
            assert re.fullmatch(f"stflow-fast: {expected}", line)


def test_evaluate_reads_the_names_of_genes_from_where_they_are(tmp_path: Path) -> None:
    """Test slides may keep them elsewhere than the training slides did."""
    task, out = write_task(tmp_path / "task"), tmp_path / "run"
    small = [option for pair in ("hidden_dim=16", "pairwise_hidden_dim=16", "n_layers=1") for option in ("--set", pair)]
    run("train", task, "--encoder", "tiny", "--out", out, "--epochs", 1, *small)
    for path in (task / "adata").iterdir():
        table = anndata.read_h5ad(path)
        table.var["symbol"] = list(table.var_names)
        table.var_names = [f"ENSG{i:011d}" for i in range(table.n_vars)]
        table.write_h5ad(path)
    with pytest.raises(
        InputError, match=r"has 8 of them: --gene-key symbol .*'GENE3', which is 'ENSG00000000003' here"
    ):
        run("evaluate", out, task)
    assert "ridge alpha 1e4" in run("evaluate", out, task, "--gene-key", "symbol")


def test_doctor_says_what_would_run() -> None:
    said = run("doctor")
    for word in ("torch", torch.__version__, "edge attention", "device", "threads", "C++ compiler"):
        assert word in said


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[str, str]]]:
    """What the doctor says of a machine: (found, remark) by row."""

    def diagnose(
        load: float, threads: int = 2, cores: int = 2, usable: int = 2, asked: str | None = None
    ) -> dict[str, tuple[str, str]]:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False)
        monkeypatch.setattr(doctor, "thread_count", lambda: threads)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        what, found, remark = (list(column.cells) for column in doctor.diagnose().columns)
        return {row[0]: row[1:] for row in zip(what, found, remark, strict=True)}

    return diagnose


@pytest.mark.parametrize(
    ("load", "threads", "cores", "said"),
    [
        (0.3, 2, 2, "idle"),
        (1.0, 1, 2, "1 other busy process: cores enough are free"),
        (2.1, 2, 2, "2 other busy processes: expect about 2.0 times the time; the result is the same"),
        (1.9, 1, 2, "2 other busy processes: expect about 1.5 times the time; the result is the same"),
        (8.0, 4, 16, "8 other busy processes: cores enough are free"),
        (2.0, 4, 2, "2 other busy processes: expect about 1.5 times the time; the result is the same"),
    ],
)
def test_doctor_says_whether_the_machine_is_loaded(
    diagnosed: Callable[..., dict[str, tuple[str, str]]], load: float, threads: int, cores: int, said: str
) -> None:
    assert diagnosed(load, threads, cores)["load"] == (f"{load:.1f} on {cores} cores", said)


def test_doctor_says_nothing_of_a_load_that_the_system_does_not_tell(
    diagnosed: Callable[..., dict[str, tuple[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    diagnosed(1.0)

    def unknown() -> None:
        raise OSError

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert "load" not in doctor.diagnose().columns[0].cells
    monkeypatch.delattr(os, "getloadavg")
    assert "load" not in doctor.diagnose().columns[0].cells


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({}, ("2 of 2 cores", "torch's default")),
        ({"threads": 1, "asked": "1"}, ("1 of 2 cores", "OMP_NUM_THREADS=1")),
        ({"threads": 2, "asked": "1"}, ("2 of 2 cores", "set by torch.set_num_threads")),
        ({"threads": 1}, ("1 of 2 cores", "set by torch.set_num_threads, or torch's default")),
        (
            {"threads": 4, "cores": 4, "asked": "4"},
            ("4 of 4 cores", "OMP_NUM_THREADS=4; this process may use 2 of the cores; too many: set OMP_NUM_THREADS=2"),
        ),
    ],
)
def test_doctor_says_how_many_threads_and_why(
    diagnosed: Callable[..., dict[str, tuple[str, str]]], machine: dict[str, Any], said: tuple[str, str]
) -> None:
    assert diagnosed(0.0, **machine)["threads"] == said


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("triton", "3.4.0", ("3.4.0", "triton 3.4.0 is older than 3.5: pip install 'triton>=3.5'")),
        ("triton", "3.5.0", ("3.5.0", "")),
        ("triton", None, ("not installed (optional)", "for the kernels on a GPU: pip install triton")),
        ("torch", "2.8.0+cu128", ("2.8.0+cu128", "torch 2.8.0+cu128 is older than 2.9: pip install 'torch>=2.9'")),
        ("torch", "2.9.0+cpu", ("2.9.0+cpu", "")),
        ("numpy", None, ("missing", "pip install numpy")),
    ],
)
def test_doctor_says_what_is_too_old_or_missing(
    name: str,
    version: str | None,
    said: tuple[str, str],
    pretend: Callable[..., None],
    diagnosed: Callable[..., dict[str, tuple[str, str]]],
) -> None:
    pretend(**{name: version})
    assert diagnosed(0.0)[name] == said


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
    small = make_cohort(n_train=3, train_spots=300, test_spots=600)
    monkeypatch.setattr(demo, "make_cohort", lambda seed: small)
    page = demo.run_demo(tmp_path / "demo", seed=0, overwrite=False, console=Console(file=io.StringIO(), width=120))
    rows = re.findall(r"<td>([^<]+)</td><td>(0\.\d+)</td>", page.read_text())
    pearson = {name: float(value) for name, value in rows}
    assert pearson["stflow-fast"] > pearson["ridge alpha 1e4"] + 0.03
    assert pearson["stflow-fast"] > 2 * pearson["spots shuffled"]


def test_the_program_and_the_module_start() -> None:
    command = [sys.executable, "-m", "stflow_fast", "--version"]
    assert stflow_fast.__version__ in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "train" in run("--help")


def test_every_public_name_exists() -> None:
    for name in stflow_fast.__all__:
        assert getattr(stflow_fast, name) is not None
    with pytest.raises(AttributeError):
        stflow_fast.nothing  # noqa: B018

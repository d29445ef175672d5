"""Bad input gets one line on standard error and exit code 2, and nothing that was written before is lost."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch

from stflow_fast import cli
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance
from stflow_fast.slides import Slide, embeddings

from .builders import (
    ENCODER,
    FEATURES,
    GENE_LIST,
    PANEL,
    arrays,
    embeddings_of,
    gene_names,
    write_embeddings,
    write_h5ad,
    write_model,
    write_split,
    write_task,
)

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


def slide_file(folder: Path, name: str = "S0", n: int = 60, **changes: np.ndarray) -> Path:
    return write_h5ad(folder / f"{name}.h5ad", {**arrays(name, n), **changes}, features=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def delete_key(path: Path, key: str) -> None:
    with h5py.File(path, "a") as file:
        del file[key]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_key(path: Path, key: str, value: object) -> None:
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = value


def regroup(path: Path, key: str) -> None:
    with h5py.File(path, "a") as file:
        file.move(key, "aside")
        file.create_group(key)


def spoil(path: Path, key: str, value: float) -> None:
    with h5py.File(path, "a") as file:
        file[key][3:5] = value


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing embeddings": (lambda t: embeddings_of(t, "S1").unlink(), r"S1\.h5: does not exist"),
    "missing expression": (lambda t: (t / "adata" / "S1.h5ad").unlink(), r"S1\.h5ad: does not exist"),
    "truncated embeddings": (lambda t: cut(embeddings_of(t, "S1")), r"S1\.h5: is not readable HDF5, or is truncated"),
    "truncated expression": (
        lambda t: cut(t / "adata" / "S1.h5ad"),
        r"S1\.h5ad: is not readable HDF5, or is truncated",
    ),
    "no embeddings key": (
        lambda t: delete_key(embeddings_of(t, "S1"), "embeddings"),
        "has no 'embeddings' or 'features'; it has barcodes, coords",
    ),
    "no barcodes key": (
        lambda t: delete_key(embeddings_of(t, "S1"), "barcodes"),
        r"S1\.h5: no barcode in common with .*S1\.h5ad \(they look like 480_480 and 0x0\)",
    ),
    "no common barcodes": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), {**arrays("S1"), "barcodes": np.arange(60).astype(str)}),
        r"S1\.h5: no barcode in common with .*S1\.h5ad",
    ),
    "duplicated barcodes": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), arrays("S1"), np.r_[0, 0, 1:60]),
        r"S1\.h5: 1 duplicated barcodes",
    ),
    "embeddings in a group": (lambda t: regroup(embeddings_of(t, "S1"), "embeddings"), "must be tables, not groups"),
    "coordinates of one number": (lambda t: replace_key(embeddings_of(t, "S1"), "coords", 3.0), "must have shape"),
    "barcodes that are no text": (
        lambda t: replace_key(embeddings_of(t, "S1"), "barcodes", np.full((60, 1), b"\xe9")),
        "barcodes are not UTF-8 text",
    ),
    "a slide twice in a split": (
        lambda t: write_split(t, "train", ("S0", "S1", "S0")),
        r"train_0\.csv: names S0 twice; remove one",
    ),
    "a split without names": (lambda t: write_split(t, "train", ("S0", "")), r"train_0\.csv: names no slide in row 3"),
    "a split of other columns": (
        lambda t: (t / "splits" / "train_0.csv").write_text("slide,path\nS0,x\n"),
        r"train_0\.csv: has no column sample_id; it has slide, path",
    ),
    "NaN features": (lambda t: spoil(embeddings_of(t, "S1"), "embeddings", np.nan), "slide S1: features of 2 of 60"),
    "infinite coordinates": (
        lambda t: write_h5ad(t / "adata" / "S1.h5ad", {**arrays("S1"), "centres": np.full((60, 2), np.inf)}),
        "slide S1: coords of 60 of 60 spots",
    ),
    "genes missing": (
        lambda t: (t / GENE_LIST).write_text('{"genes": ["GENE1", "NOSUCH"]}'),
        "1 of 2 genes are not in its expression: NOSUCH",
    ),
    "no gene list": (lambda t: (t / GENE_LIST).unlink(), f"{GENE_LIST}: does not exist"),
    "empty slide": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), arrays("S1"), np.arange(0)),
        r"S1\.h5: has no spots",
    ),
    "features of another size": (
        lambda t: write_embeddings(embeddings_of(t, "S1"), {**arrays("S1"), "features": np.zeros((60, 3), np.float32)}),
        "slide S1: features of size 3, others have 16",
    ),
    "no splits": (lambda t: [path.unlink() for path in (t / "splits").iterdir()], "fold: 0 is not in"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_training_on_broken_data(say: Callable[..., str], task: Path, tmp_path: Path, name: str) -> None:
    spoil_it, complaint = BREAKAGES[name]
    spoil_it(task)
    assert re.search(complaint, say("train", task, "--out", tmp_path / "run", *TRAIN))
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set", "n_heads=5"], "hidden_dim: must be a multiple of n_heads"),
        (["--set", "width=5"], "--set width: is not a setting"),
        (["--set", "n_layers=two"], "--set n_layers: 'two' is not a int"),
        (["--normalize", "sqrt"], "normalize: must be one of"),
        (["--select-on", "luck"], "select_on: must be none, validation or test, not 'luck'"),
        (["--fold", "4"], "fold: 4 is not in"),
        (["--learning-rate", "0"], "learning_rate: must be above 0"),
        (["--precision", "fp7"], "precision: must be one of no, bf16, fp16"),
        (["--set", "learning_rate=1"], "--set learning_rate: has a flag of its own, --learning-rate"),
        (["--set", "prior_total_count=0"], "total_count: must be above 0"),
        (["--seed", "-1"], "seed: must be a whole number from 0"),
        (["--seed", "99999999999999999999"], "seed: must be a whole number from 0"),
    ],
)
def test_training_with_bad_settings(
    say: Callable[..., str], task: Path, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    assert complaint in say("train", task, "--out", tmp_path / "run", *TRAIN, *arguments)


def test_an_occupied_folder_is_left_as_it_is(say: Callable[..., str], task: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    before = contents(other)
    for command in (["train", task, *TRAIN], ["predict", model, slide_file(tmp_path)]):
        assert "exists already" in say(*command, "--out", other)
        assert "not an earlier result" in say(*command, "--out", other, "--overwrite")
    (tmp_path / "genes.json").write_text("{}")
    assert contents(other) == before


def test_a_run_survives_bad_input_to_its_successor(say: Callable[..., str], task: Path, tmp_path: Path) -> None:
    say("train", task, "--out", tmp_path / "run", *TRAIN, code=0)
    before = contents(tmp_path / "run")
    cut(embeddings_of(task, "S1"))
    for mode in ([], ["--overwrite"], ["--resume"]):
        say("train", task, "--out", tmp_path / "run", *TRAIN, *mode)
    assert contents(tmp_path / "run") == before


def test_resuming_what_is_not_there_or_cut_off(say: Callable[..., str], task: Path, tmp_path: Path) -> None:
    assert "run.json: cannot be read" in say("train", task, "--out", tmp_path / "none", *TRAIN, "--resume")
    say("train", task, "--out", tmp_path / "run", *TRAIN, code=0)
    cut(tmp_path / "run" / "checkpoint.safetensors")
    complaint = say("train", task, "--out", tmp_path / "run", *TRAIN, "--resume")
    assert "checkpoint.safetensors: cannot be read" in complaint


def test_models_that_cannot_be_read(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    slide = slide_file(tmp_path)
    assert "none: is not a folder" in say("predict", tmp_path / "none", slide, "--out", tmp_path / "out")
    cut(model / "model.safetensors")
    assert "model.safetensors: cannot be read" in say("predict", model, slide, "--out", tmp_path / "out")
    (model / "config.json").write_text("{")
    assert "config.json: is not valid JSON" in say("predict", model, slide, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("n", [1, 2, 8, 9])
def test_slides_smaller_than_a_neighbourhood_are_predicted(
    say: Callable[..., str], model: Path, tmp_path: Path, n: int
) -> None:
    say("predict", model, slide_file(tmp_path, n=n), "--out", tmp_path / "out", code=0)
    table = anndata.read_h5ad(tmp_path / "out" / "S0.h5ad")
    assert table.shape == (n, PANEL)
    assert np.isfinite(table.X).all()


def test_one_bad_slide_does_not_stop_the_others(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    good = [slide_file(tmp_path / "in", name) for name in ("S0", "S2")]
    wide = {"features": np.zeros((60, 5), np.float32)}
    bad = slide_file(tmp_path / "in", "S1", **wide)
    complaint = say("predict", model, good[0], bad, good[1], "--out", tmp_path / "out", code=3, several=True)
    assert "slide S1: features: must have shape [N, 16], not [60, 5]; use embeddings of the encoder" in complaint
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5ad")) == ["S0.h5ad", "S2.h5ad"]
    slide_file(tmp_path / "in", "S1")
    say("predict", model, good[0], bad, good[1], "--out", tmp_path / "out", "--resume", code=0)
    assert len(list((tmp_path / "out").glob("*.h5ad"))) == 3


def test_whatever_a_file_raises_is_one_line_and_the_others_go_on(
    say: Callable[..., str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that can be wrong with files at once, and of what nobody has thought of."""
    good = [slide_file(tmp_path / "in", name) for name in ("S0", "S2")]
    folder = tmp_path / "in"
    (folder / "empty.h5").touch()
    (folder / "text.h5ad").write_text("404 Not Found")
    (folder / "folder.zarr").mkdir()
    torch.save(torch.zeros(3, 4), folder / "features.pt")
    cut(slide_file(folder, "half"))
    strange = write_embeddings(folder / "strange.h5", arrays("S1"))
    read_embeddings = embeddings.read_embeddings

    def raise_something(path: Path, **options: object) -> Slide:
        if path == strange:
            raise ZeroDivisionError("of a library\nthat nobody knows")
        return read_embeddings(path, **options)

    monkeypatch.setattr(embeddings, "read_embeddings", raise_something)
    bad = sorted(set(folder.iterdir()) - set(good))
    complaint = say("predict", model, good[0], *bad, good[1], "--out", tmp_path / "out", code=3, several=True)
    *lines, last = complaint.splitlines()
    assert any("strange.h5: cannot be read (ZeroDivisionError: of a library)" in line for line in lines)
    assert len(lines) == len(bad)
    for path in bad:
        assert sum(line.startswith(f"stflow-fast: {path}: ") for line in lines) == 1
    assert last == f"stflow-fast: 2 other slides are in {tmp_path / 'out'}"
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5ad")) == ["S0.h5ad", "S2.h5ad"]


def test_features_of_another_encoder_are_refused_unless_they_are_the_same(
    say: Callable[..., str], model: Path, task: Path, tmp_path: Path
) -> None:
    other = write_embeddings(tmp_path / "features_conch_v15" / "S0.h5", arrays("S0"))
    predict = ["predict", model, other, "--out", tmp_path / "out"]
    assert "features are of 'conch_v15', but the model was trained with 'tiny'; give those, or" in say(*predict)
    say(*predict, "--ignore-encoder", "--overwrite", code=0)
    for name in ("TINY", "tiny_v1", "Tiny-V1"):
        same = write_embeddings(tmp_path / f"features_{name}" / "S0.h5", arrays("S0"))
        say("predict", model, same, "--out", tmp_path / name, code=0)
    say("predict", model, embeddings_of(task, "S0"), "--out", tmp_path / "task_s", code=0)


def test_expression_is_not_needed_to_predict_nor_looked_at(
    say: Callable[..., str], model: Path, tmp_path: Path
) -> None:
    say("predict", model, slide_file(tmp_path / "a"), "--out", tmp_path / "plain", code=0)
    odd = slide_file(tmp_path / "b", counts=np.full((60, 30), -1.5, np.float32))
    say("predict", model, odd, "--out", tmp_path / "odd", code=0)
    plain, other = (anndata.read_h5ad(tmp_path / name / "S0.h5ad").X for name in ("plain", "odd"))
    assert np.array_equal(plain, other)


def test_bad_draws_are_refused_before_anything_is_written(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    slide, out = slide_file(tmp_path), tmp_path / "out"
    for flags, complaint in (
        (["--seed", "-1"], "seed: must be a whole number"),
        (["--n-sample-steps", "0"], "n_sample_steps: must be at least 2"),
        (["--prior", "dice"], "prior: must be one of"),
        (["--device", "gpu"], "device: must be auto"),
        (["--memory-budget", "much"], "memory_budget: must be a size"),
    ):
        assert complaint in say("predict", model, slide, slide_file(tmp_path, "S1"), "--out", out, *flags)
        assert not out.exists()


def test_a_failed_prediction_does_not_stand_in_the_way(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    assert "does not exist" in say("predict", model, tmp_path / "typo.h5ad", "--out", tmp_path / "out")
    say("predict", model, slide_file(tmp_path), "--out", tmp_path / "out", code=0)


def test_overwriting_with_bad_slides_takes_nothing_away(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    slides, out = [slide_file(tmp_path, name) for name in ("S0", "S1")], tmp_path / "out"
    say("predict", model, *slides, "--out", out, code=0)
    before = {path: content for path, content in contents(out).items() if path.suffix == ".h5ad"}
    say("predict", model, tmp_path / "typo.h5ad", "--out", out, "--overwrite", "--seed", 1)
    assert {path: content for path, content in contents(out).items() if path.suffix == ".h5ad"} == before


def test_what_a_killed_process_left_is_not_in_the_way(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".predictions.77.part.json").write_text("{")
    say("predict", model, slide_file(tmp_path), "--out", tmp_path / "out", code=0)


@pytest.mark.parametrize("section", ['"provenance": null', '"provenance": {"training": {"training": null}}'])
def test_settings_of_the_wrong_kind_are_named(
    say: Callable[..., str], model: Path, tmp_path: Path, section: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **json.loads("{" + section + "}")}))
    assert "must be a dict" in say("predict", model, slide_file(tmp_path), "--out", tmp_path / "out")


def test_predicting_from_files_without_features(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    bare = write_h5ad(tmp_path / "bare.h5ad", arrays("S0"))
    assert "has no obsm['features'] with patch embeddings; obsm has spatial" in say(
        "predict", model, bare, "--out", tmp_path / "out"
    )
    assert "x.svs: does not exist" in say("predict", model, tmp_path / "x.svs", "--out", tmp_path / "out2")


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


def test_evaluating_what_cannot_be_scored(say: Callable[..., str], task: Path, model: Path, tmp_path: Path) -> None:
    config = DenoiserConfig(PANEL, FEATURES, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    Denoiser(config).save_pretrained(tmp_path / "nameless")
    assert "names no genes or no encoder" in say("evaluate", tmp_path / "nameless", task)
    told = Provenance(tuple(gene_names()[3:11]), ENCODER, training={"train": {"S2": 60}})
    Denoiser(config, told).save_pretrained(tmp_path / "cheat")
    assert "trained or chosen on its test slides S2" in say("evaluate", tmp_path / "cheat", task)
    chosen = {"train": {"S0": 60}, "selection": {"S2": 60}, "selected_on": "held-out slides"}
    Denoiser(config, dataclasses.replace(told, training=chosen)).save_pretrained(tmp_path / "peek")
    assert "trained or chosen on its test slides S2" in say("evaluate", tmp_path / "peek", task)
    out = tmp_path / "maps"
    assert "GENE29" in say("evaluate", model, task, "--maps", out, "--biomarkers", "GENE3,GENE29")
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"\x80\x02}q\x00."])
def test_converting_what_is_no_checkpoint(say: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "published.pth").write_bytes(content)
    (tmp_path / "genes.json").write_text('["A"]')
    complaint = say(
        "convert", tmp_path / "published.pth", "--out", tmp_path / "out", "--genes", tmp_path / "genes.json"
    )
    assert re.search(r"published.pth: is truncated|parameters: not those of a STFlow", complaint)
    assert "weights_only" not in complaint  # torch's advice is to switch it off


def test_converting_without_the_right_genes(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    state = Denoiser.from_pretrained(model).state_dict()
    torch.save(state, tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text('["A", "B"]')
    command = ["convert", tmp_path / "published.pth", "--out", tmp_path / "out", "--genes", tmp_path / "genes.json"]
    command += TOLD
    assert "predicts 8 genes, but 2 names were given" in say(*command)
    (tmp_path / "genes.json").write_text('{"list": 3}')
    assert "genes.json: must be a JSON list" in say(*command)
    cut(tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text('["A"]')
    assert "published.pth: is truncated" in say(*command)
    torch.save(state, tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text(json.dumps(["A"] * PANEL))
    assert "genes.json: lists A twice; remove one" in say(*command)
    (tmp_path / "genes.json").write_text(json.dumps(gene_names()[:PANEL]))
    assert "normalize: must be one of" in say(*command, "--normalize", "banana")
    assert not (tmp_path / "out").exists()


class Hub(http.server.ThreadingHTTPServer):
    """A Hugging Face Hub of this machine: it serves the files of ``folder``, or answers all with another status."""

    daemon_threads = True

    def __init__(self, folder: Path, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder, self.status, self.asked = folder, status, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append((self.command, Path(self.path).name))
        path, status = self.server.folder / Path(self.path).name, self.server.status
        there = status == 200 and path.exists()
        content = path.read_bytes() if there else b""
        self.send_response(status if there or status != 200 else 404)
        self.send_header("Content-Length", str(len(content)))
        if there:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """It has the model at every name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)  # it asks the real one
    with Hub(model) as made:
        yield made
        made.shutdown()


def connections(listening: socket.socket) -> int:
    """How many wait at a socket where nobody answers."""
    listening.setblocking(False)
    for count in range(100):
        try:
            listening.accept()
        except BlockingIOError:
            return count
    raise AssertionError("more than anybody would make")


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def url_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def load(hub: str, cache: Path, **options: object) -> Denoiser:
    return Denoiser.from_pretrained("owner/name", endpoint=hub, cache_dir=cache, **options)


OUT_OF_REACH = r"^owner/name: is neither a folder with .* nor a model within reach on the Hugging Face Hub \({}.*\)$"


@pytest.mark.parametrize(("status", "most"), [(500, 1), (503, 1), (504, 1), (401, 2), (403, 2), (404, 2)])
def test_a_hub_without_the_model_is_not_asked_again(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int, most: int
) -> None:
    """What answers with an error of its own is asked no more; what refuses may give to who has a token."""
    hub.status = status
    with pytest.raises(InputError, match=OUT_OF_REACH.format(f".*{status}")):
        load(hub.url, tmp_path / "cache")
    assert hub.asked == [("HEAD", "config.json")] * most
    assert capfd.readouterr().err == ""


def test_a_hub_that_never_answers_is_asked_once(
    silent: socket.socket, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=OUT_OF_REACH.format("no answer within 0.2 s; HF_HUB_ETAG_TIMEOUT=10 waits")):
        load(url_of(silent), tmp_path / "cache", etag_timeout=0.2)
    assert connections(silent) == 1
    assert capfd.readouterr().err == ""


def test_a_hub_that_is_not_there(silent: socket.socket, tmp_path: Path) -> None:
    url = url_of(silent)
    silent.close()
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*refused")):
        load(url, tmp_path / "cache")


def test_names_that_no_hub_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^own er/name: is neither a folder .*'own er/name'"):
        Denoiser.from_pretrained("own er/name", cache_dir=tmp_path)


def test_models_are_downloaded_and_then_there_without_a_hub(
    hub: Hub, silent: socket.socket, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, cache = Denoiser.from_pretrained(model).state_dict(), tmp_path / "cache"

    def assert_loads(url: str, **options: object) -> None:
        found = load(url, cache, **options).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    assert_loads(hub.url)
    assert [name for command, name in hub.asked if command == "GET"] == ["config.json", "model.safetensors"]
    hub.asked.clear()
    assert_loads(hub.url)
    assert all(command == "HEAD" for command, _ in hub.asked)
    assert_loads(hub.url, revision="main")
    hub.status = 503
    assert_loads(hub.url)
    assert_loads(url_of(silent), etag_timeout=0.2)
    hub.asked.clear()
    assert_loads(hub.url, local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_loads(hub.url)
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*offline mode is enabled")):
        load(hub.url, tmp_path / "empty")
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*offline mode is enabled")):
        load(hub.url, cache, force_download=True)
    assert hub.asked == []


def test_a_hub_with_half_a_model(hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=OUT_OF_REACH.format(".*404")):
        load(hub.url, tmp_path / "cache")


def test_predicting_with_a_model_out_of_reach(silent: socket.socket, tmp_path: Path) -> None:
    """One connection and one line, also where huggingface_hub would ask for other things first."""
    environment = {"HF_ENDPOINT": url_of(silent), "HF_HOME": str(tmp_path / "home"), "HF_HUB_ETAG_TIMEOUT": "1"}
    command = [sys.executable, "-m", "stflow_fast", "predict", "owner/name", "x.h5", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert ended.returncode == 2
    *before, complaint = ended.stderr.splitlines()
    assert re.search(OUT_OF_REACH.format("no answer within 1 s"), complaint.removeprefix("stflow-fast: "))
    assert all(line.startswith("slide ") for line in before)  # the progress bar
    assert connections(silent) == 1
    assert not (tmp_path / "out").exists()

"""Bad input to prediction: one line for each slide, and the others are predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from stflow_fast.slides import Slide, embeddings

from .builders import PANEL, arrays, cut, embeddings_of, slide_file, write_embeddings, write_h5ad
from .command_cases import TRAIN, contents, model, say, task

__all__ = ["model", "say", "task"]  # fixtures


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


def test_predicting_from_files_without_features(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    bare = write_h5ad(tmp_path / "bare.h5ad", arrays("S0"))
    assert "has no obsm['features'] with patch embeddings; obsm has spatial" in say(
        "predict", model, bare, "--out", tmp_path / "out"
    )
    assert "x.svs: does not exist" in say("predict", model, tmp_path / "x.svs", "--out", tmp_path / "out2")

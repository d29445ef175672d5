"""Many slides, unattended: what is named, what a failure does, and what is written once."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from stflow_fast.cohort import RunConfig, SamplingConfig, predict, predict_iter, read_lines, summarize, would_do
from stflow_fast.cohort.inputs import given_slides
from stflow_fast.cohort.state import STATES, SlideLine, journal
from stflow_fast.cohort.worker import Summary
from stflow_fast.errors import InputError, OutputError, SlidesFailed
from stflow_fast.sampling import BlockSample, PreparedSlide
from stflow_fast.slides import ReadOptions, read

from .builders import arrays, cut, gene_names, slide_file, write_embeddings
from .cohort_cases import folder, model, values
from .command_cases import say

__all__ = ["folder", "model", "say"]  # fixtures


def test_a_folder_is_all_its_slides_and_a_broken_one_stops_none(
    say: Callable[..., str], model: Path, folder: Path, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("no slide")
    (folder / "deeper").mkdir()
    slide_file(folder / "deeper", "S9")
    out = tmp_path / "out"
    complaint = say("predict", model, folder, "--out", out, "--maps", gene_names()[4], code=3, several=True)
    first, last = complaint.splitlines()
    assert first.startswith(f"stflow-fast: {folder / 'broken.h5ad'}: ")
    assert last == f"stflow-fast: 4 other slides are in {out}"
    assert sorted(values(out)) == ["S0.h5ad", "S1.h5ad", "S2.h5ad", "S3.h5ad"]
    with (out / "slides.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["slide"], row["status"]) for row in rows] == [
        ("broken", "failed"),
        *((name, "done") for name in ("S0", "S1", "S2", "S3")),
    ]
    assert [row["spots"] for row in rows] == ["", "60", "9", "130", "1"]
    assert (out / "index.html").exists()
    assert len(list((out / "maps").iterdir())) == 4
    table = anndata.read_h5ad(out / "S2.h5ad")
    told = read_lines(out)["S2"].statistics
    assert told["genes"] == list(table.var_names)
    np.testing.assert_allclose(told["mean"], table.X.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(told["zeros"], (table.X == 0).mean(axis=0), rtol=1e-5)
    nested = given_slides(folder, ReadOptions(), nested=True)
    assert sorted(nested.slides) == ["S0", "S1", "S2", "S3", "S9"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_numbers_of_genes_are_gathered_by_blocks(size: int) -> None:
    numbers = np.random.default_rng(0).normal([5, 0, 1e4, 3], [1, 1, 1e-3, 0], (60, 4)).astype(np.float32)
    numbers[numbers < 0] = 0
    seen = Summary(["A", "B", "C", "D"], ["B"], 60)
    blocks = [(slice(start, start + size), [numbers[start : start + size], None]) for start in range(0, 60, size)]
    for (rows, parts), (_, passed) in zip(blocks, seen.of(iter(blocks)), strict=True):
        assert passed is parts, rows
    told, exact = seen.statistics(), numbers.astype(np.float64)
    assert told["genes"] == ["A", "B", "C", "D"]
    np.testing.assert_allclose(told["mean"], exact.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(told["std"], exact.std(axis=0), rtol=1e-5)
    assert told["std"][3] == 0
    np.testing.assert_allclose(told["zeros"], (exact == 0).mean(axis=0), rtol=1e-5)
    assert np.array_equal(seen.maps["B"], numbers[:, 1])


def test_where_nothing_could_be_done_the_code_is_2(
    say: Callable[..., str], model: Path, folder: Path, tmp_path: Path
) -> None:
    wide = slide_file(tmp_path, "wide", features=np.zeros((60, 5), np.float32))
    say("predict", model, folder / "broken.h5ad", "--out", tmp_path / "out")
    say("predict", model, wide, "--out", tmp_path / "out")
    assert read_lines(tmp_path / "out")["wide"].status == "failed"
    assert "wants a model, slides and --out" in say("predict", model)


def test_a_dry_run_says_what_would_be_done_and_what_not(
    say: Callable[..., str], capfd: pytest.CaptureFixture[str], model: Path, folder: Path, tmp_path: Path
) -> None:
    wide = slide_file(tmp_path, "wide", features=np.zeros((60, 5), np.float32))
    found = would_do(model, [folder, wide])
    assert {each.slide: each.problem is None for each in found} == {
        **dict.fromkeys(("S0", "S1", "S2", "S3"), True),
        "broken": False,
        "wide": False,
    }
    assert next(each for each in found if each.slide == "wide").problem.startswith(f"{wide}: has 5 features")
    say("predict", model, folder, "--dry-run", code=3, several=True)
    say("predict", model, folder, "--dry-run", "--limit", 2, code=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "wide.h5ad"]


def test_a_list_names_slides_and_how_each_is_read(model: Path, tmp_path: Path) -> None:
    slide_file(tmp_path / "in", "S0")
    table = anndata.read_h5ad(tmp_path / "in" / "S0.h5ad")
    table.obs["part"] = np.repeat(["left", "right"], 30)
    table.write_h5ad(tmp_path / "in" / "S5.h5ad")
    write_embeddings(tmp_path / "in" / "S7.h5", arrays("S7"))
    rows = [
        "path,sample_id,library_key",
        "in/S0.h5ad,patient 1,",
        "in/S5.h5ad,,part",
        "in/S7.h5,,",
        "in/none.h5,,",
        ",x,",
        "in/S5.h5ad,one name,part",
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    given = given_slides(tmp_path / "list.csv", ReadOptions())
    assert list(given.slides) == ["patient 1", "S5_left", "S5_right", "S7"]
    assert given.reading["S5_left"] == {"library_key": "part"}
    assert given.reading["S7"] == {}
    reasons = [reason for _, reason in given.refused.values()]
    assert f"{tmp_path / 'in' / 'none.h5'}: does not exist" in reasons[0]
    assert reasons[1] == f"{tmp_path / 'list.csv'}, line 6: names no path; mend the list"
    assert "sample_id: 'one name' is for one slide, the path has 2" in reasons[2]
    with pytest.raises(SlidesFailed) as raised:
        predict(model, tmp_path / "list.csv", tmp_path / "out")
    assert (len(raised.value.failed), raised.value.n_written) == (3, 4)
    assert anndata.read_h5ad(tmp_path / "out" / "S5_left.h5ad").uns["stflow_fast"]["reading"] == {"library_key": "part"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.h5ad")}
    with pytest.raises(SlidesFailed):
        predict(model, tmp_path / "list.csv", tmp_path / "out", resume=True)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.h5ad")}
    for text, said in (
        ("path\n", r"list\.csv: lists no slide; give it a row for each"),
        ("path\nin/S0.h5ad,more\n", r"list\.csv, line 2: has more cells than columns; mend the list"),
        (
            "file,sample_id\nin/S0.h5ad,a\n",
            r"list\.csv: a list of slides has a column 'path', this has file, sample_id;",
        ),
    ):
        (tmp_path / "list.csv").write_text(text)
        with pytest.raises(InputError, match=said):
            predict(model, tmp_path / "list.csv", tmp_path / "none")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(InputError, match=r"empty: is a folder, and of no format itself; .* --search-nested"):
        predict(model, tmp_path / "empty", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "list.csv").write_text("path,colour\nin/S0.h5ad,red\n")
    with pytest.raises(InputError, match=r"list\.csv: has a column 'colour'; columns are path, sample_id, format, "):
        given_slides(tmp_path / "list.csv", ReadOptions())


def test_names_that_are_no_files_and_names_of_several_slides_are_refused_alone(model: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        slide_file(tmp_path / place, "S1")
    other = slide_file(tmp_path / "a", "S2")
    rows = ["path,sample_id", "a/S2.h5ad,../../evil", f"a/S2.h5ad,{'x' * 300}", "a/S2.h5ad,fine"]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    given = given_slides([tmp_path / "a" / "S1.h5ad", tmp_path / "b" / "S1.h5ad", tmp_path / "list.csv"], ReadOptions())
    assert list(given.slides) == ["fine"]
    doubled, slash, long = (reason for _, reason in given.refused.values())
    assert slash.startswith(f"{other}: '../../evil': a slide's name becomes a file's, and cannot be empty or have a")
    assert "300 characters are too many" in long
    both = f"{tmp_path / 'a' / 'S1.h5ad'} and {tmp_path / 'b' / 'S1.h5ad'}"
    assert doubled == f"S1: is the name of several slides ({both}); rename one, each becomes a file"
    with pytest.raises(SlidesFailed, match="is the name of several slides"):
        predict(model, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert list(values(tmp_path / "out")) == [other.name]


def test_a_device_that_runs_out_of_memory_keeps_less_between_steps(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, budgets, enough = PreparedSlide.draw_blocks, [], 2**30

    def too_much(prepared: PreparedSlide, seed: int, draws: int) -> BlockSample:
        budgets.append(prepared.sampler.memory_budget)
        if budgets[-1] > enough:
            raise torch.OutOfMemoryError("CUDA is out of memory")
        return draw(prepared, seed)

    predict(model, [folder / "S0.h5ad", folder / "S2.h5ad"], tmp_path / "one")
    monkeypatch.setattr(PreparedSlide, "draw_blocks", too_much)
    sampling = SamplingConfig(memory_budget="4GiB")
    predict(model, [folder / "S0.h5ad", folder / "S2.h5ad"], tmp_path / "two", sampling=sampling)
    assert budgets == [2**32, 2**31, 2**30, 2**30]
    assert values(tmp_path / "one") == values(tmp_path / "two")
    notes = [line.notes for line in read_lines(tmp_path / "two").values()]
    assert notes == [("the device ran out of memory; --memory-budget was 4294967296 bytes, is 1073741824",), ()]
    enough = -1
    with pytest.raises(SlidesFailed, match=r"S0\.h5ad: OutOfMemoryError: CUDA is out of memory"):
        predict(model, [folder / "S0.h5ad", folder / "S2.h5ad"], tmp_path / "three", sampling=sampling)
    assert budgets[-1] == 0


def test_a_slide_that_is_given_twice_is_one_and_a_broken_namesake_another(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    cut(slide_file(tmp_path / "b", "S0"))
    given = given_slides([folder, folder / "S0.h5ad", tmp_path / "b" / "S0.h5ad"], ReadOptions())
    assert [name for name in given.order if "S0" in name] == ["S0", "S0 (2)"]
    assert given.slides["S0"].path == folder / "S0.h5ad"
    assert given.refused["S0 (2)"][0] == str(tmp_path / "b" / "S0.h5ad")


def test_slides_in_memory_have_no_processes(model: Path, folder: Path, tmp_path: Path) -> None:
    slide = read(folder / "S0.h5ad")
    with pytest.raises(InputError, match="^workers: slides in memory are predicted in this process; leave it out$"):
        predict(model, [slide], tmp_path / "out", config=RunConfig(workers=2))
    assert len(predict(model, [slide], tmp_path / "out", config=RunConfig(workers=1))) == 1


def test_resuming_makes_maps_that_are_missing(model: Path, folder: Path, tmp_path: Path) -> None:
    one, other = gene_names()[4:6]
    for genes in ((one,), (other,)):
        predict(model, folder / "S0.h5ad", tmp_path / "out", config=RunConfig(maps=genes), resume=True)
    assert list(read_lines(tmp_path / "out")["S0"].maps) == [other]


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    with journal(tmp_path, (1, 1)) as kept:
        kept.add(SlideLine("S0", "", "done"))
        kept.add(SlideLine("S1", "", "done"))
    path = tmp_path / STATES / "1-of-1.jsonl"
    path.write_text(path.read_text()[:-20])
    assert list(read_lines(tmp_path)) == ["S0"]
    with journal(tmp_path, (1, 1)) as kept:
        kept.add(SlideLine("S2", "", "failed", reason="gone"))
    assert sorted(read_lines(tmp_path)) == ["S0", "S2"]
    assert json.loads(path.read_text().splitlines()[-1])["reason"] == "gone"


def test_two_runs_into_one_folder_are_not_let_in(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = predict_iter(model, folder, out)
    next(first)
    with pytest.raises(OutputError, match=f"{out}: another process predicts into it; wait for its end"):
        next(predict_iter(model, folder, out, resume=True))
    told = (out / "predictions.json").read_text()
    with pytest.raises(OutputError, match="another process predicts into it"):
        next(predict_iter(model, folder, out, sampling=SamplingConfig(seed=1), overwrite=True))
    assert (out / "predictions.json").read_text() == told
    assert len(list(first)) == 4
    assert len(values(out)) == 4


def test_what_is_not_written_ends_the_run_at_once(
    say: Callable[..., str], model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "replace", _refuse)  # the superuser may write anywhere
    else:
        (tmp_path / "out").mkdir(mode=0o500)
    complaint = say("predict", model, folder, "--out", tmp_path / "out")
    assert "cannot be written" in complaint


def _refuse(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shard": (3, 2)}, "shard: must be I/N"),
        ({"limit": 0}, "limit: must be 1 at least"),
        ({"workers": -1}, "workers: must be 1 at least"),
        ({"gpus": (99,)}, "gpus: must be different numbers below 0, the GPUs here"),
        ({"engine": "ray", "gpus": (0,)}, "gpus: is of the local engine"),
        ({"engine": "slurm"}, "engine: must be local or ray"),
        ({"address": "auto"}, "address: is of the ray engine"),
    ],
)
def test_settings_out_of_range_are_named(changed: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RunConfig(**changed)


def test_a_map_of_a_gene_that_is_not_written_is_refused(say: Callable[..., str], model: Path, folder: Path) -> None:
    out = folder.parent / "out"
    assert "maps: NOPE is not among the 8 genes" in say("predict", model, folder, "--out", out, "--maps", "NOPE")
    assert not out.exists()


def test_a_summary_leaves_out_what_is_gone(model: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(predict_iter(model, [folder / "S0.h5ad", folder / "S1.h5ad"], out))
    (out / "S0.h5ad").unlink()
    assert [line.slide for line in summarize(out)] == ["S1"]

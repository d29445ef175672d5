"""Slides of STImage-1K4M, and the benchmark on them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from stflow_fast.cli import app
from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, Slide, read, recognise
from stflow_fast.slides.places import SeveralSections
from stflow_fast.slides.registry import sources
from stflow_fast.slides.stimage import read_counts
from stflow_fast.slides.stimage_task import N_GENES, ORGANS, SEEDS, StImageTask

from .store_cases import F, N, lattice, refused

ORGAN_SLIDES = tuple(f"Human_Breast_10X_{i:02d}_Visium" for i in range(10))


def write_stimage(
    folder: Path, name: str, n: int = N, genes: Sequence[str] = ("A", "B", "C"), seed: int = 0, kind: str = "JPEG"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A slide in the folder of a technology, and what is in its tables."""
    rng = np.random.default_rng(seed)
    barcodes = pd.Index([f"{name}_{row}x{column}" for row, column in zip(*divmod(np.arange(n), 8), strict=True)])
    xy = lattice(n) * 7
    places = pd.DataFrame({"yaxis": xy[:, 1], "xaxis": xy[:, 0], "r": 27.5}, index=barcodes)
    counts = pd.DataFrame(rng.poisson(rng.gamma(0.5, 4, len(genes)), (n, len(genes))), index=barcodes, columns=genes)
    for part in ("coord", "gene_exp", "image"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    places.to_csv(folder / "coord" / f"{name}_coord.csv")
    counts.to_csv(folder / "gene_exp" / f"{name}_count.csv")
    PIL.Image.new("RGB", (120, 80)).save(folder / "image" / f"{name}.png", format=kind)
    return places, counts


def write_features(path: Path, barcodes: Sequence[str], seed: int = 0) -> np.ndarray:
    """STFlow's embeddings of the spots of :func:`write_stimage`, in another order than they are given."""
    order = np.random.default_rng(seed).permutation(len(barcodes))
    features = np.random.default_rng(seed).normal(size=(len(barcodes), F)).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["embeddings"], file["coords"] = features[order], (lattice(len(barcodes)) * 7 - 28)[order]
        file["barcodes"] = np.array(barcodes, dtype="S")[order]
    return features


def by_barcode(slide: Slide) -> pd.DataFrame:
    return pd.DataFrame(np.asarray(slide.features), index=slide.barcodes)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
def test_a_folder_of_stimage_is_many_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    folder = tmp_path / "Visium"
    made = {name: write_stimage(folder, name, seed=i, kind=kind) for i, name in enumerate(("S1", "S2"))}
    features = {name: write_features(tmp_path / "uni" / f"{name}.h5", list(made[name][0].index)) for name in made}
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)  # what all but small images are over
    found = sources(folder, ReadOptions(embeddings=tmp_path / "uni", expression=True))
    assert [each.id for each in found] == ["S1", "S2"]
    for each in found:
        places, counts = made[each.id]
        slide = each.read()
        assert slide.id == each.id
        assert sorted(slide.barcodes) == sorted(places.index)
        want = places.loc[slide.barcodes]
        assert np.array_equal(slide.coords, want[["xaxis", "yaxis"]])
        assert np.array_equal(slide.counts.toarray(), counts.loc[slide.barcodes])
        assert slide.gene_names == ("A", "B", "C")
        assert np.array_equal(by_barcode(slide).loc[places.index], features[each.id])
        assert slide.origin.image_size == (120, 80)
        assert slide.origin.scalefactors == {"spot_diameter_fullres": 55.0}
        assert slide.notes == ()
    assert "no features" in refused(folder, section="S1")
    assert "has no slide 'S3'; it has 2, such as S1, S2" in refused(folder, section="S3", require_features=False)
    with pytest.raises(SeveralSections, match="has 2 slides"):
        read(folder, ReadOptions(require_features=False))


def test_one_file_of_places_is_one_slide(tmp_path: Path) -> None:
    places, _ = write_stimage(tmp_path / "ST", "S1")
    path = tmp_path / "ST" / "coord" / "S1_coord.csv"
    assert recognise(path) == "stimage"
    [source] = sources(path, ReadOptions(require_features=False))
    slide = source.read()
    assert source.id == slide.id == "S1"
    assert np.array_equal(slide.coords, places[["xaxis", "yaxis"]])
    assert slide.features is None
    assert slide.counts is None
    (tmp_path / "ST" / "image" / "S1.png").write_bytes(b"no image")
    assert read(path, ReadOptions(require_features=False)).origin.image_size is None


def test_spots_without_counts_or_place_are_counted(tmp_path: Path) -> None:
    places, counts = write_stimage(tmp_path, "S1")
    counts.iloc[::-1].iloc[:-3].to_csv(tmp_path / "gene_exp" / "S1_count.csv")
    places.iloc[:-2].to_csv(tmp_path / "coord" / "S1_coord.csv")
    slide = read(tmp_path, ReadOptions(section="S1", expression=True, require_features=False))
    assert slide.notes == (
        "3 of 38 spots have no counts and are left out",
        "2 of 37 spots with counts have no place and are left out",
    )
    assert slide.barcodes.tolist() == places.index[3:-2].tolist()
    assert np.array_equal(slide.counts.toarray(), counts.iloc[3:-2])


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("coord/S1_coord.csv", ",yaxis,r\na,1,2\n", "has no column xaxis; its columns: yaxis, r"),
        ("coord/S1_coord.csv", ",yaxis,xaxis,r\n", "has no spots"),
        ("coord/S1_coord.csv", ",yaxis,xaxis,r\na,1,2,3,4\nb,1\nc,1,2,3,4,5\n", "cannot be read"),
        ("gene_exp/S1_count.csv", "", "does not begin with names of genes"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,2\n", "line 2 has 2 counts for 3 genes"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,two,3\n", "line 2 is not a barcode and counts"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,,3\n", "line 2 is not a barcode and counts"),
        ("gene_exp/S1_count.csv", ",A,B,C\nx,1,2,3\n", "no barcode in common"),
        ("gene_exp/S1_count.csv", ",A,B,C\nS1_0x0,1,2,3\nS1_0x0,1,2,3\n", "1 duplicated barcodes"),
    ],
)
def test_broken_tables_of_stimage_are_one_line(tmp_path: Path, file: str, content: str, said: str) -> None:
    write_stimage(tmp_path, "S1")
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError) as error:
        read(tmp_path, ReadOptions(section="S1", expression=True, require_features=False))
    assert said in str(error.value)
    assert "S1" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "barcodes",
    [["001", "002", "010", "1"], ["1.10", "1.1", "2.0", "1e5"], ["NA", "nan", "", "null"], ["a,b", 'c"d', "e", "'f'"]],
)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL])
def test_barcodes_are_text_whatever_they_look_like(tmp_path: Path, barcodes: list[str], quoting: int) -> None:
    write_stimage(tmp_path, "S1", 4)
    places = pd.DataFrame({"yaxis": np.arange(4) * 9.5, "xaxis": 100 / 3, "r": 50.0}, index=barcodes)
    counts = pd.DataFrame(np.arange(8).reshape(4, 2), index=barcodes[::-1], columns=["A", "B"])
    places.to_csv(tmp_path / "coord" / "S1_coord.csv", quoting=quoting)
    counts.to_csv(tmp_path / "gene_exp" / "S1_count.csv", quoting=quoting)
    assert recognise(tmp_path / "coord" / "S1_coord.csv") == "stimage"
    slide = read(tmp_path, ReadOptions(section="S1", expression=True, require_features=False))
    assert slide.barcodes.tolist() == barcodes
    assert np.array_equal(slide.coords, places[["xaxis", "yaxis"]])
    assert np.array_equal(slide.counts.toarray(), counts.to_numpy()[::-1])
    assert slide.gene_names == ("A", "B")


def test_a_place_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    places, _ = write_stimage(tmp_path, "S1")
    for value, said in (("far", "S1_coord.csv: xaxis is not a column of numbers"), ("NA", "coords of 1 of 40 spots")):
        places["xaxis"] = [value, *range(N - 1)]
        places.to_csv(tmp_path / "coord" / "S1_coord.csv")
        with pytest.raises(InputError, match=said):
            read(tmp_path, ReadOptions(section="S1", require_features=False))
    places["xaxis"], places["r"] = np.arange(N), ["wide", *["inf"] * (N - 1)]
    places.to_csv(tmp_path / "coord" / "S1_coord.csv")
    assert read(tmp_path, ReadOptions(section="S1", require_features=False)).origin.scalefactors == {}


def test_names_of_genes_are_read_without_their_counts(tmp_path: Path) -> None:
    write_stimage(tmp_path, "S1")
    with (tmp_path / "gene_exp" / "S1_count.csv").open("a") as file:
        file.write("no line of counts\n")
    slide = read(tmp_path, ReadOptions(section="S1", gene_names=True, require_features=False))
    assert (slide.gene_names, slide.counts) == (("A", "B", "C"), None)


def test_the_folder_above_says_which_to_give(tmp_path: Path) -> None:
    write_stimage(tmp_path / "Visium", "S1")
    assert "give its ST, Visium or VisiumHD" in refused(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 6).flatmap(
        lambda n_genes: st.lists(
            st.lists(
                st.one_of(st.just(0), st.integers(0, 10**6), st.floats(0, 1e6, width=32)),
                min_size=n_genes,
                max_size=n_genes,
            ),
            min_size=1,
            max_size=6,
        )
    )
)
def test_counts_are_what_pandas_reads(tmp_path: Path, rows: list[list[float]]) -> None:
    path = tmp_path / "count.csv"
    genes = [f"GENE,{i}" for i in range(len(rows[0]))]  # quoted in the file
    pd.DataFrame(rows, index=[f"b{i}" for i in range(len(rows))], columns=genes, dtype=object).to_csv(path)
    barcodes, names, counts = read_counts(path)
    want = pd.read_csv(path, index_col=0)
    assert barcodes.tolist() == want.index.tolist()
    assert names == tuple(genes)
    assert np.array_equal(counts.toarray(), want.to_numpy(dtype=np.float32))


def write_bench(root: Path, names: Sequence[str] = ORGAN_SLIDES) -> dict[str, pd.DataFrame]:
    """The Visium folder, meta/ and embeddings of an organ's slides; what is returned are their counts."""
    genes = [f"GENE{i}" for i in range(N_GENES + 20)]
    made = {}
    for i, name in enumerate(names):
        own = [gene for gene in genes if gene != f"GENE{i}"] + [f"ONLY{i}"]  # none of these is shared
        _, made[name] = write_stimage(root / "Visium", name, 16 + i, own, seed=i)
        write_features(root / "embeddings" / "Breast" / "uni" / "fp32" / f"{name}.h5", list(made[name].index))
    rows = [(name, "human", "breast", "True", "Visium") for name in names]
    others = [
        ("Human_Breast_ST", "human", "breast", "True", "ST"),
        ("Human_Breast_healthy", "human", "breast", "False", "Visium"),
        ("Mouse_Breast", "mouse", "breast", "True", "Visium"),
        ("Human_Brain", "human", "brain", "True", "Visium"),
    ]
    columns = ["slide", "species", "tissue", "involve_cancer", "tech"]
    (root / "meta").mkdir()
    for file, content in (
        ("meta_all_gene.csv", others),
        ("meta_all_gene02122025.csv", rows[::-1] + others),
        ("meta_all_gene11302024.csv", others),
    ):
        pd.DataFrame(content, columns=columns).to_csv(root / "meta" / file, index=False)
    return made


def test_splits_of_the_bench(tmp_path: Path) -> None:
    write_bench(tmp_path)
    task = StImageTask(tmp_path, "uni")
    assert task.folds() == list(SEEDS)
    folds = [task.fold(number) for number in task.folds()]
    for fold in folds:
        assert (len(fold.train), len(fold.val), len(fold.test)) == (8, 1, 1)
        assert sorted((*fold.train, *fold.val, *fold.test)) == sorted(ORGAN_SLIDES)
    assert len(set(folds)) == len(SEEDS)
    assert folds == [StImageTask(tmp_path / "Visium", "uni", tmp_path / "embeddings").fold(k) for k in SEEDS]
    with pytest.raises(InputError, match="fold: must be one of 0, 1, 2, not 3"):
        task.fold(3)


def test_genes_of_the_bench_vary_most_among_those_that_all_slides_have(tmp_path: Path) -> None:
    made = write_bench(tmp_path)
    task = StImageTask(tmp_path, "uni")
    together = np.log1p(pd.concat(made.values(), join="inner"))
    variance = together.var().sort_index().sort_values(ascending=False, kind="stable")
    assert len(variance) == N_GENES + 20 - len(made)
    assert task.genes() == tuple(variance.index[:N_GENES])
    (tmp_path / "mine.txt").write_text("GENE30\nGENE40\n")
    assert task.genes("mine.txt") == ("GENE30", "GENE40")
    with pytest.raises(InputError, match="does not exist"):
        task.genes("other.txt")


def test_slides_of_the_bench_have_features_and_counts(tmp_path: Path) -> None:
    made = write_bench(tmp_path)
    name = ORGAN_SLIDES[2]
    slide = StImageTask(tmp_path, "uni").slide(name)
    assert isinstance(slide.features, np.ndarray)
    want = np.log1p(made[name].loc[slide.barcodes, ["GENE30", "GENE40"]].to_numpy()).astype(np.float32)
    assert np.array_equal(slide.expression(["GENE30", "GENE40"]), want)
    lazy = StImageTask(tmp_path, "uni").slide(name, expression=False)
    assert lazy.counts is None
    assert np.array_equal(lazy.features, slide.features)


def test_what_the_bench_lacks_is_said(tmp_path: Path) -> None:
    write_bench(tmp_path)
    for organ, said in (("Lung", "organ: must be one of Breast"), ("Brain", "names 1 human Visium cancer slides")):
        with pytest.raises(InputError, match=said):
            StImageTask(tmp_path, "uni", organ=organ)
    with pytest.raises(InputError, match="encoders there: uni"):
        StImageTask(tmp_path, "conch")
    (tmp_path / "Visium" / "coord" / f"{ORGAN_SLIDES[0]}_coord.csv").unlink()
    with pytest.raises(InputError, match="one of 1 missing files; download the whole organ"):
        StImageTask(tmp_path, "uni")
    shutil.rmtree(tmp_path / "meta")
    with pytest.raises(InputError, match="has no meta_all_gene"):
        StImageTask(tmp_path, "uni")


def test_the_bench_is_trained_and_scored_from_the_command_line(tmp_path: Path) -> None:
    write_bench(tmp_path / "stimage")
    small = [part for name in ("hidden_dim", "pairwise_hidden_dim") for part in ("--set", f"{name}=16")]
    train = ["train", tmp_path / "stimage", "--encoder", "uni", "--epochs", 1, "--set", "n_layers=1", *small]

    def say(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    said = say(*train, "--out", tmp_path / "run")
    assert f"is the folder of STImage-1K4M; name one of {', '.join(ORGANS)} with --organ" in str(said.exception)
    chosen = ["--select-on", "validation"]
    said = say(*train, "--organ", "Breast", "--fold", 2, "--out", tmp_path / "run", *chosen)
    assert said.exit_code == 0, said.output
    [val] = StImageTask(tmp_path / "stimage", "uni").fold(2).val
    assert f"chosen on held-out slides ({val})" in said.output
    said = say("evaluate", tmp_path / "run", tmp_path / "stimage", "--fold", 2, "--json", tmp_path / "scores.json")
    assert said.exit_code == 0, said.output
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores["per_slide"]) == list(StImageTask(tmp_path / "stimage", "uni").fold(2).test)
    assert scores["n_genes"] == N_GENES

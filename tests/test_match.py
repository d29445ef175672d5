"""Features of one file for the spots of another: by the name of the barcode, only where they lie as the spots do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast.errors import InputError
from stflow_fast.slides import HestTask, ReadOptions, Slide, match, read
from stflow_fast.slides.embeddings import PatchFeatures, open_features
from stflow_fast.slides.match import common
from stflow_fast.slides.match import match as matched
from stflow_fast.slides.patches import PatchSize

from .builders import ENCODER, PATCH, arrays, embeddings_of, write_embeddings, write_h5ad, write_task

N = 60
MADE = arrays("S0", N)


def slide_at(places: np.ndarray, **more: object) -> Slide:
    return Slide("S0", None, places, MADE["barcodes"][: len(places)], **more)


def features_at(corners: np.ndarray, barcodes: np.ndarray | None = None) -> PatchFeatures:
    barcodes = MADE["barcodes"][: len(corners)] if barcodes is None else barcodes
    size = PatchSize(float(PATCH), 0.25)
    return PatchFeatures(Path("S0.h5"), MADE["features"][: len(corners)], corners, barcodes, size, "uni", None)


def turned(places: np.ndarray, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (places - places.mean(axis=0)) @ np.array([[c, -s], [s, c]]) + places.mean(axis=0)


def big_lattice(rows: int, pitch: float = 250.0) -> np.ndarray:
    """Spots of a hexagonal array, as large as those are."""
    row, column = np.divmod(np.arange(rows * rows), rows)
    return np.column_stack([column + 0.5 * (row % 2), row * 0.866]) * pitch + 3000.0


def write_features(path: Path, corners: np.ndarray, barcodes: np.ndarray = MADE["barcodes"]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["embeddings"], file["coords"], file["barcodes"] = MADE["features"], corners, barcodes.astype("S")
    return path


@given(
    half=st.sampled_from([0, 20, 56.5, 112]),
    scale=st.sampled_from([1.0, 0.1, 0.3, 2.0]),
    rounded=st.booleans(),
    pitch=st.floats(90, 400),
)
def test_features_fit_the_slide_that_they_are_of(half: float, scale: float, rounded: bool, pitch: float) -> None:
    """Whether corners or centres, cut to whole numbers or not, of the same image or a smaller one."""
    places = MADE["centres"] * pitch / 100
    corners = np.trunc(places - half)
    shown = places * scale
    slide = matched(slide_at(np.rint(shown) if rounded else shown), features_at(corners))
    assert slide.n_spots == N
    assert slide.notes == ()
    assert slide.micron_per_pixel == (0.25 if scale == 1 else None)


@given(degrees=st.floats(0.5, 359.5), half=st.sampled_from([0, 112]), scale=st.sampled_from([1.0, 0.3, 2.0]))
def test_features_of_an_array_that_lies_otherwise_are_refused(degrees: float, half: float, scale: float) -> None:
    """Barcodes of a Visium slide stand on all of them, and no two arrays lie alike on their images."""
    places = big_lattice(40)
    barcodes = np.array([f"b{i}" for i in range(len(places))])
    found = PatchFeatures(
        Path("S0.h5"), np.zeros((len(places), 2)), turned(places, degrees) - half, barcodes, PatchSize(), "", None
    )
    with pytest.raises(InputError, match=r"^S0\.h5: features of another slide than S0: .* give the features of this"):
        matched(Slide("S0", None, places * scale, barcodes), found)


def test_some_patches_may_have_been_moved_into_the_image() -> None:
    corners = MADE["centres"] - 20
    corners[:5] += 15
    assert matched(slide_at(MADE["centres"]), features_at(corners)).notes == ()
    corners[:20] += 15
    with pytest.raises(InputError, match=r"\(33% of 60 are off"):
        matched(slide_at(MADE["centres"]), features_at(corners))


def test_a_shift_that_is_none_of_a_patch_is_noted() -> None:
    """An array that lies just as another, elsewhere, cannot be told from an image of which a part was cut out."""
    corners = MADE["centres"] - [20, 320]
    [note] = matched(slide_at(MADE["centres"]), features_at(corners)).notes
    assert note.startswith("S0.h5: spots lie (20, 320) pixels from the corners of their patches")
    assert note.endswith("see that it is of this slide")
    for shift in ([300, 0], [-40, -40], [9000, 9000]):
        assert len(matched(slide_at(MADE["centres"]), features_at(MADE["centres"] - shift)).notes) == 1


@pytest.mark.parametrize("corners", [np.zeros((N, 2)), np.full((N, 2), np.nan)])
def test_features_without_places_are_noted(corners: np.ndarray) -> None:
    [note] = matched(slide_at(MADE["centres"]), features_at(corners)).notes
    assert "corners of patches are all at one place, so nothing shows that features are of this slide" in note


def test_one_file_is_not_taken_for_every_slide(tmp_path: Path) -> None:
    """As a shell's *.h5ad with --embeddings FILE: both slides have all of the barcodes."""
    for name, at in (("A", 0.0), ("B", 5000.0)):
        write_h5ad(tmp_path / f"{name}.h5ad", {**MADE, "centres": MADE["centres"] + at})
    of_a = write_features(tmp_path / "feats_of_A.h5", MADE["centres"] - 20)
    options = ReadOptions(embeddings=of_a)
    slide = read(tmp_path / "A.h5ad", options)
    assert np.array_equal(slide.features, MADE["features"])
    assert slide.notes == (f"features are those of {of_a}",)
    with pytest.raises(InputError, match=r"feats_of_A\.h5: spots lie .*; call it B\.h5 if it is of slide B"):
        read(tmp_path / "B.h5ad", options)
    placeless = write_features(tmp_path / "feats.h5", np.zeros((N, 2)))
    with pytest.raises(InputError, match=r"feats\.h5: corners .* at one place.*; call it A\.h5 if it is of slide A"):
        read(tmp_path / "A.h5ad", ReadOptions(embeddings=placeless))
    assert read(tmp_path / "A.h5ad", ReadOptions(embeddings=placeless.rename(tmp_path / "A.h5"))).n_spots == N


def test_training_takes_no_features_of_another_slide(tmp_path: Path) -> None:
    root = write_task(tmp_path / "task")
    write_embeddings(embeddings_of(root, "S0"), {**MADE, "centres": turned(MADE["centres"], 5)})
    with pytest.raises(InputError, match=r"S0\.h5: features of another slide than S0"):
        HestTask(root, ENCODER).slide("S0")


def test_rows_come_in_the_order_of_the_slide(tmp_path: Path) -> None:
    path, order = write_h5ad(tmp_path / "S0.h5ad", MADE), np.random.default_rng(0).permutation(N)[:50]
    embedded = write_embeddings(tmp_path / "emb" / "S0.h5", MADE, order)
    for where in (embedded, tmp_path / "emb"):
        slide, kept = read(path, ReadOptions(embeddings=where)), np.sort(order)
        assert slide.barcodes.tolist() == MADE["barcodes"][kept].tolist()
        assert np.array_equal(slide.features, MADE["features"][kept])
        assert np.array_equal(slide.coords, MADE["centres"][kept])
        assert slide.notes == (f"10 of 60 spots have no features in {embedded} and are left out",)


def test_rows_of_features_without_a_spot_are_counted(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "S0.h5ad", {name: values[:44] for name, values in MADE.items()})
    write_embeddings(tmp_path / "emb" / "S0.h5", MADE)
    slide = read(path, ReadOptions(embeddings=tmp_path / "emb"))
    assert slide.notes == (f"16 of 60 rows of features have no spot in {path} and are left out",)


def test_a_slide_keeps_the_features_that_it_has(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "S0.h5ad", MADE, features=True)
    write_embeddings(tmp_path / "emb" / "S0.h5", {**MADE, "features": MADE["features"] + 1})
    slide = read(path, ReadOptions(embeddings=tmp_path / "emb"))
    assert np.array_equal(slide.features, MADE["features"])
    assert slide.notes == (f"features of its own are kept; those of {tmp_path / 'emb'} are for slides that have none",)


def test_whatever_breaks_in_a_file_of_features_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, options: ReadOptions) -> PatchFeatures:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(match, "open_features", broken)
    write_h5ad(tmp_path / "S0.h5ad", MADE)
    with pytest.raises(InputError, match=r"emb/S0\.h5: cannot be read \(ZeroDivisionError: deep inside\)"):
        read(tmp_path / "S0.h5ad", ReadOptions(embeddings=tmp_path / "emb" / "S0.h5"))


@given(st.lists(st.text("abc", max_size=3), unique=True, min_size=1), st.lists(st.text("abc", max_size=3), unique=True))
def test_names_in_common(names: list[str], more: list[str]) -> None:
    others = [*more, *(name for name in names[:1] if name not in more)]
    rows, there = common("one", np.array(names, dtype=str), "other", np.array(others, dtype=str))
    assert [names[row] for row in rows] == [others[row] for row in there] == [name for name in names if name in others]


def test_names_that_stand_twice_or_are_foreign_are_refused() -> None:
    one, twice, foreign = np.array(["a", "b"]), np.array(["a", "a"]), np.array(["c"])
    with pytest.raises(InputError, match="^x: 1 duplicated barcodes; make them unique$"):
        common("x", twice, "y", one)
    with pytest.raises(InputError, match="^y: 1 duplicated barcodes; make them unique$"):
        common("x", one, "y", twice)
    with pytest.raises(InputError, match=r"^y: no barcode in common with x \(they look like c and a\)$"):
        common("x", one, "y", foreign)


def test_real_features_fit_no_other_slide(shared: Callable[[str], Path]) -> None:
    root = shared("data/her2st")
    task = HestTask(root, "efficientnet_lite0")
    names = ("A1", "B4", "C2", "C3", "C4", "C5", "C6")
    found = {name: open_features(task.embeddings_folder / f"{name}.h5", ReadOptions()) for name in names}
    for name in names:
        slide = task.slide(name)
        for other, features in found.items():
            if other == name:
                assert matched(slide, features).notes == ()
            else:
                with pytest.raises(InputError, match=f"{other}.h5: features of another slide than {name}"):
                    matched(slide, features)

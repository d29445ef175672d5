"""Features of patches of TRIDENT, CLAM and others: how large a patch is, and rows that stay on the disk."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from stflow_fast.errors import InputError
from stflow_fast.slides import HestTask, ReadOptions, StoredRows, read, recognise

from .builders import ENCODER, arrays, embeddings_of, write_embeddings, write_task
from .format_cases import F, N, clam, features, lattice, save_as_trident, trident


@pytest.mark.parametrize("leading", [False, True])
def test_trident(tmp_path: Path, leading: bool) -> None:
    path = trident(tmp_path / "20x_256px_0px_overlap" / "features_uni_v1" / "slide.h5", leading)
    assert recognise(path) == "trident"
    slide = read(path)
    assert isinstance(slide.features, StoredRows)
    assert np.array_equal(slide.features, features())
    assert np.array_equal(slide.coords, lattice() + 256)
    assert list(slide.barcodes[:2]) == ["2048_2048", "2560_2048"]
    assert slide.origin.encoder == "uni_v1"
    assert slide.origin.image_size == (9000, 8000)
    assert slide.origin.scalefactors == {"spot_diameter_fullres": 512.0}
    assert slide.notes == ()


def test_the_encoder_is_told_by_the_folder_where_the_file_does_not(tmp_path: Path) -> None:
    assert read(trident(tmp_path / "features_conch_v15" / "a.h5", encoder="None")).origin.encoder == "conch_v15"
    assert read(trident(tmp_path / "somewhere" / "a.h5", encoder="")).origin.encoder == ""
    made = write_embeddings(tmp_path / "phikon" / "fp16" / "a.h5", arrays("S0"))
    assert read(made).origin.encoder == "phikon"


@pytest.mark.parametrize(
    ("patches", "half"),
    [
        ({"patch_size": 256, "patch_level": 0, "downsample": (1.0, 1.0)}, 128),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 512),
        ({"patch_size": 256, "patch_level": 0}, 128),
        ({"patch_size": 256, "patch_level": 0, "custom_downsample": 2}, 256),
        ({"patch_size": 224, "level": 0}, 112),
        ({"patch_size_src": 163.5}, 81.75),
    ],
)
def test_clam_with_its_patches_beside(tmp_path: Path, patches: dict[str, object], half: float) -> None:
    path = clam(tmp_path, patches)
    assert recognise(path) == "clam"
    assert np.array_equal(read(path).coords, lattice() + half)
    assert read(path).notes == ()


@pytest.mark.parametrize("patches", [None, {"patch_size": 256, "patch_level": 1}])
def test_what_was_sought_is_said_where_no_file_tells_the_size(tmp_path: Path, patches: dict[str, object]) -> None:
    """Level 1 without a downsample is no size: the levels of a pyramid differ."""
    slide = read(clam(tmp_path, patches))
    assert np.array_equal(slide.coords, lattice())
    [note] = slide.notes
    assert "patch_size_level0, patch_size_src, patch_size with downsample or patch_level 0" in note
    assert (f"nor have those of {tmp_path / 'patches' / 'slide.h5'}" in note) == (patches is not None)


def test_files_beside_a_link_come_before_those_beside_its_target(tmp_path: Path) -> None:
    """Hubs and workflow managers keep files in a store, and links to them in folders that people see."""
    path, store = clam(tmp_path / "job", {"patch_size_level0": 100}), tmp_path / "store" / "blobs"
    store.mkdir(parents=True)
    path.rename(store / "0123abcd")
    path.symlink_to(os.path.relpath(store / "0123abcd", path.parent))
    assert np.array_equal(read(path).coords, lattice() + 50)
    assert read(path).id == "slide"
    other = tmp_path / "elsewhere" / "slide.h5"
    other.parent.mkdir()
    of_target = tmp_path / "store" / "patches" / "0123abcd"
    save_as_trident(of_target, {"coords": lattice()}, {"coords": {"patch_size_src": 60}})
    other.symlink_to(store / "0123abcd")
    assert np.array_equal(read(other).coords, lattice() + 30)
    (store / "0123abcd").unlink()
    with pytest.raises(InputError, match=r"slide\.h5: does not exist \(it is a link to .*0123abcd\)"):
        read(path)


def test_options_that_a_format_does_not_have_are_said(tmp_path: Path) -> None:
    assert read(trident(tmp_path / "a.h5"), ReadOptions(library_key="x", table="y")).notes == (
        "--library-key is nothing that TRIDENT features has, and was not looked at",
        "--table is nothing that TRIDENT features has, and was not looked at",
    )


def write_patches(path: Path, corners: np.ndarray, **attributes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = corners
        file["coords"].attrs.update(attributes)
    return path


def write_features(path: Path, corners: np.ndarray, **attributes: object) -> Path:
    """As TRIDENT and CLAM write them, with attributes of coords."""
    write_patches(path, corners, **attributes)
    with h5py.File(path, "r+") as file:
        file["features"] = np.random.default_rng(0).normal(size=(len(corners), 4)).astype(np.float32)
    return path


CORNERS = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) * 512 + 2048


@pytest.mark.parametrize(
    "other", [CORNERS[:60], CORNERS + 7, CORNERS + np.array([256, 0])], ids=["fewer", "shifted", "aside"]
)
def test_patches_of_another_project_tell_no_size(tmp_path: Path, other: np.ndarray) -> None:
    """What lies in patches/ above may have only the name in common."""
    path = write_features(tmp_path / "project" / "features" / "s.h5", CORNERS)
    above = write_patches(tmp_path / "patches" / "s.h5", other, patch_size_level0=1000)
    slide = read(path)
    assert np.array_equal(slide.coords, CORNERS)
    assert f"{above} is of other patches: its corners differ" in slide.notes[0]
    write_patches(above, np.concatenate([other, CORNERS + 0.4])[::-1], patch_size_level0=512)
    assert np.array_equal(read(path).coords, CORNERS + 256)
    write_patches(tmp_path / "project" / "patches" / "s.h5", other, patch_size_level0=1000)
    assert np.array_equal(read(path).coords, CORNERS + 256), "the next one above is"
    assert read(path).notes == ()


@pytest.mark.parametrize("content", [b"garbage", b"", b"\x89HDF\r\n\x1a\n"])
def test_patches_that_cannot_be_read_are_in_nobodys_way(tmp_path: Path, content: bytes) -> None:
    path = write_features(tmp_path / "h5_files" / "s.h5", CORNERS)
    beside = tmp_path / "patches" / "s.h5"
    beside.parent.mkdir()
    beside.write_bytes(content)
    slide = read(path)
    assert np.array_equal(slide.coords, CORNERS)
    assert f"and {beside}: is " in slide.notes[0]
    write_patches(beside, np.zeros((64, 3)), patch_size_level0=512)
    assert f"and {beside}: coords must have shape [N, 2]" in read(path).notes[0]


@pytest.mark.parametrize(
    ("attributes", "half"),
    [
        ({"patch_size": 256, "level0_magnification": 40, "target_magnification": 20}, 256),
        ({"patch_size": 225, "level0_magnification": 20, "target_magnification": 40}, 56),
        ({"patch_size": 256, "patch_level": np.array([0, 1])}, 128),
        ({"patch_size": 256, "patch_level": "0"}, 128),
        ({"patch_size": 256, "level": "n/a"}, 0),
        ({"patch_size": 256, "patch_level": 0.5}, 0),
        ({"patch_size": 256, "level": h5py.Empty("f4")}, 0),
        ({"patch_size": "large", "level": 0}, 0),
        ({"patch_size_level0": np.nan, "level0_width": np.inf, "level0_height": 1}, 0),
        ({"patch_size_level0": 0, "patch_size": -256, "level": 0}, 0),
        ({"patch_size": 256, "target_magnification": 0, "level0_magnification": 40}, 0),
    ],
)
def test_whatever_stands_in_attributes_is_a_size_or_none(
    tmp_path: Path, attributes: dict[str, object], half: float
) -> None:
    root, path = write_task(tmp_path / "task"), write_features(tmp_path / "s.h5", CORNERS, **attributes)
    assert np.array_equal(read(path).coords, CORNERS + half)
    assert read(path).origin.image_size is None
    with h5py.File(embeddings_of(root, "S0"), "r+") as file:
        file["coords"].attrs.update(attributes)
    assert HestTask(root, ENCODER).slide("S0").n_spots == 60


def test_patches_at_one_place_are_numbered(tmp_path: Path) -> None:
    corners = CORNERS.copy()
    corners[[5, 9]] = corners[2]
    slide = read(write_features(tmp_path / "s.h5", corners, patch_size_level0=512))
    assert slide.barcodes[[0, 2, 5, 9]].tolist() == ["2048_2048", "3072_2048", "3072_2048_1", "3072_2048_2"]
    assert len(set(slide.barcodes.tolist())) == 64
    assert any("2 of 64 spots lie where another one does" in note for note in slide.notes)


# Rows that stay on the disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", "i4", "u1"])
@pytest.mark.parametrize("leading", [False, True])
def test_stored_rows_are_the_array(tmp_path: Path, dtype: str, leading: bool) -> None:
    values = (features() * 20).astype(dtype)
    assets = {"features": values[None] if leading else values, "coords": lattice()}
    path = save_as_trident(tmp_path / "a.h5", assets, {})
    rows, expected = read(path).features, values.astype(np.float32)
    assert (rows.shape, rows.dtype, rows.stored) == ((N, F), np.float32, np.dtype(dtype))
    for index in (slice(3, 9), slice(60, 99), slice(5, 5), np.array([7, 7, 0]), np.arange(N) % 3 == 0, slice(0, 9, 2)):
        assert np.array_equal(rows[index], expected[index])
    part = rows.between(10, 20)
    assert np.array_equal(part, expected[10:20])
    assert np.array_equal(part[5:], expected[15:20])
    _ = rows[:1]
    for twin in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
        assert np.array_equal(twin, expected)


def test_what_is_too_large_becomes_infinite_in_silence(tmp_path: Path) -> None:
    path = save_as_trident(tmp_path / "a.h5", {"features": np.full((N, F), 1e300), "coords": lattice()}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isinf(read(path).features[:2]).all()


def test_subsets_of_stored_rows_stay_stored_where_they_can(tmp_path: Path) -> None:
    slide = read(trident(tmp_path / "a.h5"))
    assert isinstance(slide.subset(np.arange(5, 9)).features, StoredRows)
    picked = slide.subset(np.array([9, 2, 30]))
    assert np.array_equal(picked.features, features()[[9, 2, 30]])

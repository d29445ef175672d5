"""Files that cannot be read or are no use: each refused in one line, with the mend."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.slides import ReadOptions, read, read_embeddings

from .format_cases import F, N, clam, features, lattice, save_as_trident, table, trident


def test_chunks_that_are_missing_are_not_zeros(tmp_path: Path) -> None:
    """A zarr store that was copied in part would be read as zeros."""
    made, path = table(), tmp_path / "a.zarr"
    made.write_zarr(path, chunks=(16, F))
    lost = [part for part in (path / "obsm" / "features").rglob("*") if part.is_file() and "zarr" not in part.name]
    lost[0].unlink()
    with pytest.raises(
        InputError, match=r"a\.zarr: 1 of \d+ chunks of obsm/features are missing; copy the store again"
    ):
        read(path)


def test_a_locked_file_is_called_locked(tmp_path: Path) -> None:
    path = trident(tmp_path / "a.h5")
    write = (
        f"import h5py, sys\nwith h5py.File({str(path)!r}, 'a'):\n    print('open', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", write], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(InputError, match=r"a\.h5: is locked: another program is writing it"):
            read(path)
        writer.stdin.close()
    assert read(path).n_spots == N


@pytest.mark.parametrize("name", ["a.h5", "a.h5ad", "a.csv"])
def test_an_empty_file_is_called_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: is empty \\(0 bytes\\)"):
        read(tmp_path / name)


@pytest.mark.parametrize("keep", [9, 3000])
def test_a_truncated_file_is_called_truncated(tmp_path: Path, keep: int) -> None:
    path = trident(tmp_path / "a.h5")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.h5: is not readable HDF5, or is truncated"):
        read(path)
    path.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(InputError, match=r"a\.h5: is not readable HDF5"):
        read(path)


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """A file that was damaged after its head: the table is there, and some of its rows are not."""
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = lattice().astype(np.int64)
        file.create_dataset("features", data=features(), chunks=(8, F), compression="gzip", shuffle=True)
        where = file["features"].id.get_chunk_info(5)
    slide = read(path)
    with path.open("r+b") as file:
        file.seek(where.byte_offset)
        file.write(b"\xff" * where.size)
    assert np.array_equal(slide.features[:40], features()[:40])
    with pytest.raises(InputError, match=r"a\.h5: rows 40 to 48 of features cannot be read"):
        slide.features[40:48]


USELESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pt": (lambda path: torch.save(torch.zeros(3, 4), path), r"holds features without coordinates .* give the \.h5"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([1, 2])), "features without coordinates"),
    "npz": (lambda path: np.savez(path.open("wb"), x=features()), "is a zip or a NumPy archive; give what it holds"),
    "zarr in a zip": (
        lambda path: zipfile.ZipFile(path, "w").writestr("zarr.json", "{}"),
        "is a zarr store in a zip; unpack it",
    ),
    "coords": (lambda path: save_as_trident(path, {"coords": lattice()}, {}), "places of patches and no features"),
    "no tissue": (
        lambda path: save_as_trident(path, {"features": np.empty((0,)), "coords": np.empty((0, 2), int)}, {}),
        "has no spots",
    ),
    "two slides": (
        lambda path: save_as_trident(path, {"features": np.zeros((2, N, F)), "coords": lattice()}, {}),
        r"features must have shape \[N, F\], not \[2, 64, 12\]; give one slide at a time",
    ),
    "text": (
        lambda path: save_as_trident(path, {"features": np.full((N, F), b"x"), "coords": lattice()}, {}),
        "features is not a table of numbers",
    ),
    "unequal": (
        lambda path: save_as_trident(path, {"features": features(60), "coords": lattice()}, {}),
        r"features, coords disagree in size \(\[60, 12\], \[64, 2\] and 64\)",
    ),
}


@pytest.mark.parametrize("kind", USELESS)
def test_what_is_no_use_is_refused_with_the_mend(tmp_path: Path, kind: str) -> None:
    make, complaint = USELESS[kind]
    make(tmp_path / "slide")
    with pytest.raises(InputError, match=f"slide: .*{complaint}"):
        read(tmp_path / "slide")


def test_a_format_is_forced_or_unknown(tmp_path: Path) -> None:
    path = clam(tmp_path, None)
    assert read(path, ReadOptions(format="trident")).origin.format == "trident"
    with pytest.raises(InputError, match=r"format: must be one of .*anndata, .*, not 'excel'"):
        read(path, ReadOptions(format="excel"))
    with pytest.raises(InputError, match=r"slide\.h5: has no obs, so it is not AnnData; it has coords, features"):
        read(path, ReadOptions(format="anndata"))


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    (tmp_path / "slide.svs").write_bytes(b"II*\0 an image")
    with pytest.raises(InputError, match=r"slide\.svs: is an image; give features of its patches"):
        read(tmp_path / "slide.svs")
    (tmp_path / "slide.txt").write_text("nothing of the kind")
    with pytest.raises(InputError, match=r"slide\.txt: is of no format that is known"):
        read(tmp_path / "slide.txt")
    with pytest.raises(InputError, match="does not exist"):
        read_embeddings(tmp_path / "slide.h5")

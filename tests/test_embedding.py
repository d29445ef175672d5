"""Patches to embeddings: real ones, what the files hold, how they are computed, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

import stflow_fast
from stflow_fast.cli import app
from stflow_fast.embedding import AHEAD, CPU_BLOCK
from stflow_fast.encoders import LITE0, PUBLISHED, Encoder, Preprocessing
from stflow_fast.errors import InputError, OutputError
from stflow_fast.slides import read_embeddings

from .builders import SLIDES, arrays, write_task
from .embedding_cases import (
    DIMENSION,
    SIDE,
    embed_plainly,
    embedded,
    images_of,
    run,
    slides,
    small_encoder,
    transformers,
    vit,
    write_patches,
)

__all__ = ["slides", "transformers", "vit"]  # fixtures


# The embeddings of real patches


@pytest.mark.parametrize("name", ["B4", "C3"])
def test_the_first_64_patches_of_a_real_slide(shared: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """All of both slides: 7e-6."""
    path, n = tmp_path / "her2st" / "patches" / f"{name}.h5", 64
    path.parent.mkdir(parents=True)
    with h5py.File(shared(f"data/her2st/patches/{name}.h5")) as whole, h5py.File(path, "w") as file:
        for key in ("img", "coords", "barcode"):
            file[key] = whole[key][:n]
        file["coords"].attrs.update(whole["coords"].attrs)
    result = CliRunner().invoke(app, ["embed", str(path.parents[1]), "--encoder", LITE0], catch_exceptions=False)
    assert result.exit_code == 0
    found = path.parents[1] / "embeddings" / LITE0 / "fp32" / path.name
    expected = shared(f"data/her2st/embeddings/{LITE0}/fp32/{name}.h5")
    np.testing.assert_allclose(embedded(found), embedded(expected)[:n], atol=1e-4)
    slide = read_embeddings(found)
    table = anndata.read_h5ad(shared(f"data/her2st/adata/{name}.h5ad"))
    assert slide.barcodes.tolist() == table.obs_names[:n].tolist()
    np.testing.assert_allclose(slide.coords, table.obsm["spatial"][:n], atol=0.51)
    assert not slide.notes


def test_what_is_written_is_trained_on(vit: Path, tmp_path: Path) -> None:
    task, out = write_task(tmp_path / "task"), tmp_path / "run"
    for seed, name in enumerate(SLIDES):
        made = arrays(name)
        barcodes, coords = made["barcodes"], made["centres"].astype(int) - 23
        write_patches(task / "patches" / f"{name}.h5", images_of(len(barcodes), seed=seed), barcodes, coords=coords)
    small = [option for pair in ("hidden_dim=16", "pairwise_hidden_dim=16", "n_layers=1") for option in ("--set", pair)]
    for command in (
        ["embed", task, "--encoder", vit, "--name", "mine"],
        ["train", task, "--encoder", "mine", "--out", out, "--epochs", 1, *small],
    ):
        result = CliRunner().invoke(app, [str(word) for word in command], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert stflow_fast.load_model(out).config.feature_dim == 16
    assert stflow_fast.HestTask(task, "mine").slide(SLIDES[0]).n_spots == len(arrays(SLIDES[0])["barcodes"])


# Files


def test_what_a_file_says(slides: Path) -> None:
    encoder = small_encoder()
    told: list[tuple[str, int, int]] = []
    paths = stflow_fast.embed(slides, encoder, batch_size=4, on_patches=lambda *said: told.append(said))
    assert paths == [slides / "embeddings" / "small" / "fp32" / f"{name}.h5" for name in "AB"]
    assert told == [("A", 4, 9), ("A", 8, 9), ("A", 9, 9), ("B", 4, 10), ("B", 8, 10), ("B", 10, 10)]
    with h5py.File(paths[0]) as file, h5py.File(slides / "patches" / "A.h5") as patches:
        assert file["embeddings"].shape == (9, DIMENSION)
        assert file["embeddings"].dtype == np.float32
        assert file["barcodes"].shape == (9, 1)
        assert (file["barcodes"][()] == patches["barcode"][()]).all()
        assert (file["coords"][()] == patches["coords"][()]).all()
        assert dict(file["coords"].attrs) == dict(patches["coords"].attrs)
        about = dict(file.attrs)
    assert about["encoder"] == "small"
    assert about["weights"] == "w"
    assert about["version"] == stflow_fast.__version__
    assert Preprocessing(**json.loads(about["preprocessing"])).crop == encoder.preprocessing.crop


def test_centres_of_older_patches_are_found(tmp_path: Path) -> None:
    """Where only the images say how much larger they were at level 0; and barcodes are text."""
    path = write_patches(tmp_path / "A.h5", images_of(3), np.array(["a", "b", "c"]), barcode=None)
    with h5py.File(path, "r+") as file:
        file["coords"].attrs.pop("patch_size_src")
        file["img"].attrs["downsample"] = 1.5
        file.create_dataset("barcodes", data=["ä", "b", "c"], dtype=h5py.string_dtype())
    [made] = stflow_fast.embed(path, small_encoder(), tmp_path / "out")
    slide = read_embeddings(made)
    assert slide.coords[0].tolist() == [1.5 * SIDE / 2, 50 + 1.5 * SIDE / 2]
    assert slide.barcodes.tolist() == ["ä", "b", "c"]


@given(
    n=st.integers(1, 3 * CPU_BLOCK + 1),
    batch_size=st.integers(1, 16),
    threads=st.sampled_from([1, 2]),
)
def test_every_patch_is_embedded_as_it_would_be_alone(
    tmp_path_factory: pytest.TempPathFactory, n: int, batch_size: int, threads: int
) -> None:
    folder, images, encoder = tmp_path_factory.mktemp("embed"), images_of(n), small_encoder()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        [made] = stflow_fast.embed(
            write_patches(folder / "A.h5", images), encoder, folder / "out", batch_size=batch_size
        )
    finally:
        torch.set_num_threads(before)
    alone = [embed_plainly(encoder, image[None]) for image in images]
    np.testing.assert_allclose(embedded(made), torch.cat(alone).numpy(), atol=1e-5)


def test_patches_are_read_ahead_by_another_thread_and_not_far(slides: Path) -> None:
    read, computed = [], []

    class Watched(Preprocessing):
        def prepare(self, images: np.ndarray) -> np.ndarray:
            read.append(threading.current_thread())
            return super().prepare(images)

    encoder = small_encoder(Watched(None, SIDE))

    def forward(images: Tensor) -> Tensor:
        computed.append(threading.current_thread())
        assert len(read) <= len(computed) + AHEAD
        return encoder.forward(images)

    watched = dataclasses.replace(encoder, forward=forward)
    stflow_fast.embed(slides / "patches" / "A.h5", watched, batch_size=1)
    assert len(read) == len(computed) == 9
    assert not set(read) & set(computed)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-6), ("bf16", 0.05), ("fp16", 0.01)])
def test_precision(slides: Path, precision: str, error: float) -> None:
    """By autocast; float32 is not tf32, which torch would take on a GPU."""
    encoder, seen = small_encoder(), []

    def forward(images: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32))
        return encoder.forward(images)

    exact = stflow_fast.embed(slides, encoder)[0]
    watched = dataclasses.replace(encoder, forward=forward, name="watched")
    made = stflow_fast.embed(slides, watched, precision=precision)[0]
    assert set(seen) == {(precision != "float32", False)}
    difference = np.abs(embedded(made) - embedded(exact)).max()
    assert difference < error * np.abs(embedded(exact)).max()
    assert (difference > 0) == (precision != "float32")


def test_half_as_many_bytes(slides: Path) -> None:
    single = embedded(stflow_fast.embed(slides, small_encoder())[0])
    half = embedded(stflow_fast.embed(slides, small_encoder(), name="half", dtype="float16")[0])
    assert half.dtype == np.float16
    assert (half == single.astype(np.float16)).all()


# Bad input


def broken_chunk(path: Path) -> None:
    """Its images cannot be decompressed, which shows when they are read."""
    with h5py.File(path) as file:
        place = file["img"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(content)


def test_bad_slides_do_not_stop_the_good_ones(slides: Path) -> None:
    images, patches = images_of(7), slides / "patches"
    write_patches(patches / "no_images.h5", None)
    write_patches(patches / "floats.h5", images.astype(np.float32))
    write_patches(patches / "oblong.h5", images[:, :20])
    write_patches(patches / "grey.h5", images[..., 0])
    write_patches(patches / "empty.h5", images[:0])
    write_patches(patches / "few_coords.h5", images, coords=np.zeros((6, 2), int))
    write_patches(patches / "no_coords.h5", images, coords=None)
    write_patches(patches / "text.h5", images, coords=np.full((7, 2), b"1"))
    write_patches(patches / "no_barcodes.h5", images, barcode=None)
    write_patches(patches / "small.h5", images_of(7, side=SIDE - 1))
    broken_chunk(write_patches(patches / "chunk.h5", images))
    cut = write_patches(patches / "cut.h5", images)
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(InputError) as raised:
        stflow_fast.embed([slides, patches / "gone.h5"], small_encoder(), slides / "out")
    *said, last = str(raised.value).splitlines()
    for name, complaint in {
        "no_images": "holds no images (img), only barcode, coords",
        "floats": "img must be uint8 [N, S, S, 3] (RGB), not float32 [7, 32, 32, 3]",
        "oblong": "img must be uint8 [N, S, S, 3] (RGB), not uint8 [7, 20, 32, 3]",
        "grey": "img must be uint8 [N, S, S, 3] (RGB), not uint8 [7, 32, 32]",
        "empty": "holds no images (img is empty)",
        "few_coords": "img, coords and barcode disagree in size ([7, ...], [6, 2] and [7])",
        "no_coords": "has no 'coords'; it has barcode, img",
        "text": "coords must be numbers, not |S1",
        "no_barcodes": "has no 'barcode'; it has coords, img",
        "small": "patches of 31 pixels are smaller than the 32 that the encoder takes",
        "chunk": "cannot be read, or is truncated",
        "cut": "is not readable HDF5, or is truncated",
        "gone": "does not exist",
    }.items():
        [line] = [line for line in said if f"{name}.h5: " in line]
        assert f"{name}.h5: {complaint}" in line
    assert len(said) == 13
    assert last == f"2 other slides are in {slides / 'out' / 'small' / 'fp32'}"
    assert sorted(path.name for path in (slides / "out" / "small" / "fp32").iterdir()) == ["A.h5", "B.h5"]


def test_embeddings_that_are_not_finite(slides: Path) -> None:
    def forward(images: Tensor) -> Tensor:
        return images.mean((2, 3)) * 1e6

    encoder = Encoder("large", 3, Preprocessing(None, SIDE), forward, "")
    stflow_fast.embed(slides, encoder)
    with pytest.raises(InputError, match=r"A\.h5: embeddings of patches 0 to 3 are NaN or infinite .*--dtype float16"):
        stflow_fast.embed(slides, encoder, name="half", dtype="float16", batch_size=4)


def test_what_cannot_be_written_is_said_once(slides: Path) -> None:
    (slides / "file").write_text("")
    with pytest.raises(OutputError, match=r"A\.h5: cannot be written"):
        stflow_fast.embed(slides, small_encoder(), slides / "file")


def test_settings_out_of_their_range(slides: Path, tmp_path: Path) -> None:
    of = (slides, "--encoder")
    assert run(*of, "nothing") == (
        f"encoder: nothing is none of {', '.join((LITE0, *PUBLISHED))}, timm:NAME, hf-hub:OWNER/NAME, OWNER/NAME, "
        "nor a folder"
    )
    assert "batch_size: must be at least 1" in run(*of, LITE0, "--batch-size", 0)
    assert "precision: must be one of float32, bf16, fp16" in run(*of, LITE0, "--precision", "tf32")
    assert "dtype: must be float32 or float16" in run(*of, LITE0, "--dtype", "int8")
    assert "device: must be auto" in run(*of, LITE0, "--device", "tpu")
    (tmp_path / "none").mkdir()
    assert "none: holds no .h5; give files of patches" in run(tmp_path / "none", "--encoder", LITE0)
    assert "out: must be given" in run(slides / "patches" / "A.h5", tmp_path / "B.h5", "--encoder", LITE0)
    twice = write_patches(tmp_path / "other" / "A.h5", images_of(2))
    assert "is of the same slide" in run(slides, twice, "--encoder", LITE0)
    with pytest.raises(InputError, match="patches: none are given"):
        stflow_fast.embed([], small_encoder())


def test_libraries_that_are_missing(slides: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("timm", "transformers", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run(slides, "--encoder", "uni_v1").endswith("; pip install timm")
    assert run(slides, "--encoder", LITE0).endswith("; pip install 'stflow-fast[embed]'")
    assert run(slides, "--encoder", "owner/name").endswith("; pip install 'stflow-fast[embed]'")

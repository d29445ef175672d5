"""Embeddings that are there already: what is kept, refused and replaced."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from torch import Tensor

import stflow_fast
from stflow_fast.embedding import CPU_BLOCK
from stflow_fast.encoders import Preprocessing
from stflow_fast.errors import InputError

from .embedding_cases import SIDE, embedded, images_of, slides, small_encoder, write_patches

__all__ = ["slides"]  # a fixture


def test_what_stands_there_is_an_error_that_names_both_flags(slides: Path) -> None:
    stflow_fast.embed(slides / "patches" / "B.h5", small_encoder())
    with pytest.raises(InputError, match=r"B\.h5: exists already \(1 of 2 do\).*--resume.*--overwrite"):
        stflow_fast.embed(slides, small_encoder())


def test_an_interrupted_call_goes_on(slides: Path) -> None:
    """Files are those of a call that was not interrupted, and what was done is not done again."""
    whole = [path.read_bytes() for path in stflow_fast.embed(slides, small_encoder())]
    out, encoder, done = slides / "again", small_encoder(), []

    def forward(images: Tensor) -> Tensor:
        done.append(len(images))
        if sum(done) > 9:
            raise KeyboardInterrupt
        return encoder.forward(images)

    with pytest.raises(KeyboardInterrupt):
        stflow_fast.embed(slides, dataclasses.replace(encoder, forward=forward), out)
    assert [path.name for path in (out / "small" / "fp32").iterdir()] == ["A.h5"]
    told: list[tuple[str, int, int]] = []
    paths = stflow_fast.embed(
        slides, encoder, out, resume=True, batch_size=CPU_BLOCK, on_patches=lambda *said: told.append(said)
    )
    assert told == [("A", 9, 9), ("B", 4, 10), ("B", 8, 10), ("B", 10, 10)]
    assert [path.read_bytes() for path in paths] == whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder": small_encoder(weights="others", seed=1)}, "other weights"),
        ({"encoder": small_encoder(Preprocessing(None, SIDE, mean=(0.5, 0.5, 0.5)))}, "other preprocessing"),
        ({"precision": "bf16"}, "other precision"),
        ({"dtype": "float16"}, "other dtype"),
    ],
)
def test_only_what_this_call_would_write_is_kept(slides: Path, change: dict[str, Any], said: str) -> None:
    kept, _ = stflow_fast.embed(slides, small_encoder())
    before = embedded(kept)
    wanted = {"encoder": small_encoder(), **change, "resume": True}
    with pytest.raises(InputError, match=rf"A\.h5: was made with {said} .*--overwrite\n.*B\.h5: was made with"):
        stflow_fast.embed(slides, **wanted)
    assert (embedded(kept) == before).all()
    stflow_fast.embed(slides, **wanted, overwrite=True)
    assert (embedded(kept) != before).any()


@pytest.mark.parametrize(
    "change",
    [
        {"images": images_of(12)},
        {"images": images_of(9, seed=5)},
        {"images": images_of(9, side=SIDE + 8)},
        {"coords": np.arange(18).reshape(9, 2) * 51},
        {"barcodes": np.array([f"{i}y{i}" for i in range(9)])},
    ],
    ids=["more", "images", "size", "coords", "barcodes"],
)
def test_embeddings_of_other_patches_are_not_kept(slides: Path, change: dict[str, Any]) -> None:
    made, _ = stflow_fast.embed(slides, small_encoder())
    before = made.read_bytes()
    write_patches(slides / "patches" / "A.h5", **{"images": images_of(9), **change})
    with pytest.raises(
        InputError, match=r"A\.h5: was made with other patches than this call's; choose .*\(1 other slide is in"
    ):
        stflow_fast.embed(slides, small_encoder(), resume=True)
    assert made.read_bytes() == before
    stflow_fast.embed(slides, small_encoder(), resume=True, overwrite=True)
    assert made.read_bytes() != before
    assert len(embedded(made)) == len(change.get("images", images_of(9)))


def test_the_size_of_a_patch_is_part_of_it(slides: Path) -> None:
    stflow_fast.embed(slides, small_encoder())
    with h5py.File(slides / "patches" / "A.h5", "r+") as file:
        file["coords"].attrs["patch_size_src"] = 92
    with pytest.raises(InputError, match="was made with other patches"):
        stflow_fast.embed(slides, small_encoder(), resume=True)


def test_patches_that_are_stored_otherwise_are_the_same(slides: Path) -> None:
    made = stflow_fast.embed(slides, small_encoder())
    before = [path.stat().st_ctime_ns for path in made]
    with h5py.File(slides / "patches" / "A.h5", "r+") as file:
        images = file["img"][()]
        del file["img"]
        file["img"] = images
    stflow_fast.embed(slides, small_encoder(), resume=True)
    assert [path.stat().st_ctime_ns for path in made] == before


def test_files_that_do_not_say_what_they_were_made_of_are_not_kept(slides: Path) -> None:
    made, _ = stflow_fast.embed(slides, small_encoder())
    with h5py.File(made, "r+") as file:
        del file.attrs["patches"]
    with pytest.raises(InputError, match=r"A\.h5: does not say what patches it was made with; choose"):
        stflow_fast.embed(slides, small_encoder(), resume=True)
    made.write_bytes(made.read_bytes()[:500])
    with pytest.raises(InputError, match=r"A\.h5: is not readable; choose"):
        stflow_fast.embed(slides, small_encoder(), resume=True)
    stflow_fast.embed(slides, small_encoder(), resume=True, overwrite=True)
    assert len(embedded(made)) == 9


def test_patches_are_never_replaced_by_their_embeddings(tmp_path: Path) -> None:
    path = write_patches(tmp_path / "20x" / "fp32" / "A.h5", images_of(3))
    before = path.read_bytes()
    for flags in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(InputError, match=r"A\.h5: its embeddings would take its own place; choose another --out"):
            stflow_fast.embed(path, small_encoder(), tmp_path, name="20x", **flags)
    assert path.read_bytes() == before

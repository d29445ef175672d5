"""Patches to embeddings: the encoders, the files, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import stflow_fast
from stflow_fast.cli import app
from stflow_fast.embedding import AHEAD, CPU_BLOCK
from stflow_fast.encoders import LITE0, PUBLISHED, Encoder, Preprocessing, load_encoder
from stflow_fast.errors import InputError, OutputError
from stflow_fast.slides import read_embeddings

from .builders import SLIDES, arrays, write_task

SIDE, DIMENSION = 32, 24


def run(*arguments: object) -> str:
    """The one line that a bad input gives."""
    result = CliRunner().invoke(app, ["embed", *map(str, arguments)])
    assert isinstance(result.exception, InputError), result.output
    [line] = str(result.exception).splitlines()
    return line


def embedded(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return file["embeddings"][()]


def images_of(n: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def write_patches(path: Path, images: np.ndarray | None, barcodes: np.ndarray | None = None, **parts: Any) -> Path:
    """HEST's file; ``parts`` replaces what is in it, or leaves out what is None."""
    n = 7 if images is None else len(images)
    names = np.array([f"{i}x{i}" for i in range(n)]) if barcodes is None else barcodes
    content = {"img": images, "coords": np.arange(2 * n).reshape(n, 2) * 50, "barcode": names.astype("S")[:, None]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in {**content, **parts}.items():
            if value is not None:
                file.create_dataset(key, data=value, **({"compression": "gzip"} if key == "img" else {}))
        if "coords" in file:
            file["coords"].attrs.update({"patch_size_src": 46, "name": path.stem})
    return path


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A task folder with two slides' patches."""
    for seed, name in enumerate(("A", "B")):
        write_patches(tmp_path / "task" / "patches" / f"{name}.h5", images_of(9 + seed, seed=seed))
    return tmp_path / "task"


def small_encoder(preprocessing: Preprocessing | None = None, weights: str = "w", seed: int = 0) -> Encoder:
    """A convolution and a mean."""
    torch.manual_seed(seed)
    network = nn.Conv2d(3, DIMENSION, 5, 3)

    def forward(images: Tensor) -> Tensor:
        return network(images).relu().mean((2, 3))

    return Encoder("small", DIMENSION, preprocessing or Preprocessing(None, SIDE), forward, weights)


def embed_plainly(encoder: Encoder, images: np.ndarray) -> Tensor:
    """Without files, batches and threads."""
    with torch.no_grad():
        return encoder.forward(encoder.preprocessing.normalize(torch.from_numpy(encoder.preprocessing.prepare(images))))


@pytest.fixture(scope="module")
def transformers() -> types.ModuleType:
    import transformers  # takes some seconds

    return transformers


@pytest.fixture
def vit(transformers: types.ModuleType, tmp_path: Path) -> Path:
    """A tiny vision transformer of random weights, in a folder."""
    return save_vit(transformers, tmp_path / "models" / "vit")


def vision_config(**more: Any) -> dict[str, Any]:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return {"hidden_size": 16, "intermediate_size": 32, "image_size": SIDE, "patch_size": 8, **heads, **more}


def save_vit(transformers: types.ModuleType, folder: Path, pooler: bool = True) -> Path:
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**vision_config()), add_pooling_layer=pooler).save_pretrained(folder)
    return save_processor(folder, image_processor_type="ViTImageProcessor", size={"height": SIDE, "width": SIDE})


def save_processor(folder: Path, **content: Any) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return folder


def pixels_of(transformers: types.ModuleType, folder: Path, images: np.ndarray) -> Tensor:
    """As transformers itself prepares them."""
    return transformers.AutoImageProcessor.from_pretrained(folder)(images=list(images), return_tensors="pt")[
        "pixel_values"
    ]


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


# Resuming and replacing


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


# The encoders of transformers


@pytest.mark.parametrize("pooler", [True, False])
def test_a_folder_of_transformers(transformers: types.ModuleType, tmp_path: Path, pooler: bool) -> None:
    """With larger patches than it takes. A pooler that nobody trained is not asked."""
    folder, images = save_vit(transformers, tmp_path / "vit", pooler), images_of(6, side=48)
    [made] = stflow_fast.embed(write_patches(tmp_path / "A.h5", images), str(folder), tmp_path / "out", batch_size=4)
    network = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=pooler)
    with torch.no_grad():
        output = network(pixel_values=pixels_of(transformers, folder, images))
    expected = output.pooler_output if pooler else output.last_hidden_state[:, 0]
    np.testing.assert_allclose(embedded(made), expected, atol=1e-5)
    assert made.parts[-3] == "vit"


def test_weights_are_known_by_their_values(transformers: types.ModuleType, vit: Path, tmp_path: Path) -> None:
    """Not by where they lie, nor by how they are stored."""
    first = load_encoder(str(vit), "cpu")
    state = safetensors.torch.load_file(vit / "model.safetensors")
    torch.save(state, vit / "pytorch_model.bin")
    (vit / "model.safetensors").unlink()
    second = load_encoder(str(vit.rename(tmp_path / "moved")), "cpu")
    assert first.weights == second.weights
    assert (first.name, second.name) == ("vit", "moved")
    state["layernorm.bias"][0] += 1e-6
    torch.save(state, tmp_path / "moved" / "pytorch_model.bin")
    assert load_encoder(str(tmp_path / "moved"), "cpu").weights != first.weights


def test_a_model_of_images_and_texts_gives_its_image_features(transformers: types.ModuleType, tmp_path: Path) -> None:
    text = vision_config(vocab_size=50, bos_token_id=1, eos_token_id=2)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision_config(), projection_dim=8)
    torch.manual_seed(0)
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(tmp_path / "clip")
    size = {"height": SIDE, "width": SIDE}
    crop = {"size": {"shortest_edge": SIDE}, "do_center_crop": True, "crop_size": size}
    save_processor(tmp_path / "clip", image_processor_type="CLIPImageProcessor", **crop)
    images = images_of(2, side=40)
    found = embed_plainly(load_encoder(str(tmp_path / "clip"), "cpu"), images)
    with torch.no_grad():
        hidden = network.vision_model(pixels_of(transformers, tmp_path / "clip", images)).pooler_output
        expected = network.visual_projection(hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


PROCESSORS = [
    {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32},
    {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_normalize": False},
    {"image_processor_type": "ViTImageProcessor", "size": 32, "resample": 1, "image_std": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize("stated", PROCESSORS)
@pytest.mark.parametrize("side", [32, 55])
def test_images_are_prepared_as_transformers_does(
    transformers: types.ModuleType, vit: Path, stated: dict[str, Any], side: int
) -> None:
    save_processor(vit, **stated)
    images, preprocessing = images_of(2, side=side), load_encoder(str(vit), "cpu").preprocessing
    found = preprocessing.normalize(torch.from_numpy(preprocessing.prepare(images)))
    torch.testing.assert_close(found, pixels_of(transformers, vit, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"image_processor_type": "MobileViTImageProcessor", "crop_size": 32}, "does more than to resize, crop and"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 40}}, "are not square"),
        ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "does not say how large images are"),
    ],
)
def test_images_that_cannot_be_prepared(vit: Path, slides: Path, stated: dict[str, Any], said: str) -> None:
    assert said in run(slides, "--encoder", save_processor(vit, **stated))


def test_folders_that_are_no_encoder(vit: Path, slides: Path, transformers: types.ModuleType) -> None:
    def said() -> str:
        line = run(slides, "--encoder", vit)
        assert line.startswith(f"encoder {vit}: ")
        return line

    state = safetensors.torch.load_file(vit / "model.safetensors")
    part = {name: value for name, value in state.items() if not name.startswith("layernorm")}
    save_processor(vit, image_processor_type="ViTImageProcessor", size=2 * SIDE)
    assert "Input image size (64*64) doesn't match model (32*32)" in said()
    safetensors.torch.save_file(part, vit / "model.safetensors", {"format": "pt"})
    assert "its weights lack layernorm.bias and 1 other parameters" in said()
    (vit / "model.safetensors").write_bytes(b"\x08")
    assert "cannot be loaded" in said()
    (vit / "model.safetensors").unlink()
    assert "no file named model.safetensors" in said()
    (vit / "config.json").write_text('{"model_type": "nothing"}')
    assert "has model type `nothing`" in said()
    (vit / "preprocessor_config.json").unlink()
    assert "Can't load image processor" in said()


class _Executes:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_of_a_model_is_executed(vit: Path, slides: Path, tmp_path: Path) -> None:
    (vit / "model.safetensors").unlink()
    torch.save({"layernorm.bias": _Executes(tmp_path / "executed")}, vit / "pytorch_model.bin")
    assert "its weights are a pickle that is broken, or could execute something" in run(slides, "--encoder", vit)
    (vit / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (vit / "config.json").write_text(json.dumps(own))
    assert "contains custom code" in run(slides, "--encoder", vit)
    assert not (tmp_path / "executed").exists()


def test_a_hub_that_is_out_of_reach(
    slides: Path, monkeypatch: pytest.MonkeyPatch, transformers: types.ModuleType
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = run(slides, "--encoder", "owner/name")
    assert line.startswith("encoder owner/name: cannot be loaded (the Hub is out of reach, Cannot reach")
    assert "offline mode is enabled" in line


def test_what_was_downloaded_before_needs_no_hub(vit: Path, slides: Path, tmp_path: Path) -> None:
    """One question, to a port where nobody is, and not the half minute of the libraries."""
    repository = tmp_path / "home" / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    vit.rename(repository / "snapshots" / ("c" * 40))
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "stflow_fast", "embed", str(slides), "--encoder", "owner/name"]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert ended.returncode == 0, ended.stderr
    assert "Retrying" not in ended.stderr
    with h5py.File(slides / "embeddings" / "name" / "fp32" / "A.h5") as file:
        assert file.attrs["source"] == f"owner/name@{'c' * 40}"


# The encoders of timm, by a stand-in: without torchvision it cannot be imported


class _Tokens(nn.Module):
    """What timm's vision transformers give: all tokens where nothing pools them, else the class token's."""

    num_prefix_tokens = 5

    def __init__(self, global_pool: str | None) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 112, 112)
        self.prefix = nn.Parameter(torch.randn(self.num_prefix_tokens, 4))
        self.global_pool = global_pool

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.prefix + patches.mean(1, keepdim=True), patches], dim=1)
        return tokens if self.global_pool == "" else tokens[:, 0]


class _Timm(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("timm")
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.layers = types.SimpleNamespace(SwiGLUPacked=object())
        self.data = types.SimpleNamespace(resolve_data_config=self.resolve_data_config)

    def create_model(self, model_name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        assert pretrained
        self.made.append((model_name, arguments))
        return _Tokens(arguments.get("global_pool"))

    @staticmethod
    def resolve_data_config(
        args: dict[str, Any] | None = None, pretrained_cfg: Any = None, model: nn.Module | None = None
    ) -> dict[str, Any]:
        assert model is not None
        colours = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
        crop = {"input_size": (3, 224, 224), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
        return {**crop, **colours}


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Timm]:
    module = _Timm()
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # nothing is asked
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pathology_models(timm: _Timm, name: str) -> None:
    encoder = load_encoder(name, "cpu")
    [(model, arguments)] = timm.made
    assert model.startswith("hf-hub:")
    assert arguments["num_classes"] == 0
    assert ("mlp_layer" in arguments) == (arguments.get("act_layer") is nn.SiLU) == PUBLISHED[name].swiglu
    assert encoder.name == name
    assert encoder.dimension == (8 if name.startswith("virchow") else 4)
    assert encoder.preprocessing.crop == 224


def test_registers_are_in_no_embedding(timm: _Timm) -> None:
    torch.manual_seed(0)
    encoder = load_encoder("virchow2", "cpu")
    torch.manual_seed(0)
    network, images = _Tokens(""), torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        tokens, found = network(images), encoder.forward(images)
    assert (found[:, :4] == tokens[:, 0]).all()
    torch.testing.assert_close(found[:, 4:], tokens[:, 5:].sum(1) / 4)


def test_timm_says_how_it_wants_its_images(timm: _Timm) -> None:
    found = load_encoder("timm:vit_tiny_patch16_224.augreg", "cpu")
    assert found.preprocessing == Preprocessing(248, 224, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert timm.made == [("vit_tiny_patch16_224.augreg", {"num_classes": 0})]
    assert found.name == "vit_tiny_patch16_224.augreg"
    assert load_encoder("hf-hub:owner/odd", "cpu").name == "odd"


def test_an_output_that_is_no_vector(timm: _Timm, slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm, "create_model", lambda *names, **arguments: _Tokens(""))
    assert "makes [1, 9, 4] of an image, and not one vector" in run(slides, "--encoder", "timm:odd")


def test_a_model_that_timm_cannot_load(timm: _Timm, slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: Any, **arguments: Any) -> None:
        raise RuntimeError("Unknown model (odd)\nand more")

    monkeypatch.setattr(timm, "create_model", refuse)
    said = run(slides, "--encoder", "timm:local-dir:odd")
    assert said == "encoder timm:local-dir:odd: cannot be loaded (Unknown model (odd))"


def test_libraries_that_are_missing(slides: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("timm", "transformers", "efficientnet_lite_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert run(slides, "--encoder", "uni_v1").endswith("; pip install timm")
    assert run(slides, "--encoder", LITE0).endswith("; pip install 'stflow-fast[embed]'")
    assert run(slides, "--encoder", "owner/name").endswith("; pip install 'stflow-fast[embed]'")

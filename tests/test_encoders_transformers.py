"""Encoders of transformers: a folder or a name of the Hub, prepared as it says, and nothing of it executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import stflow_fast
from stflow_fast.encoders import load_encoder

from .embedding_cases import (
    SIDE,
    embed_plainly,
    embedded,
    images_of,
    pixels_of,
    run,
    save_processor,
    save_vit,
    slides,
    transformers,
    vision_config,
    vit,
    write_patches,
)

__all__ = ["slides", "transformers", "vit"]  # fixtures


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

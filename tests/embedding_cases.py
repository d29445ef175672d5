"""Files of patches, and small encoders that embed them: one of torch, one of transformers."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from stflow_fast.cli import app
from stflow_fast.encoders import Encoder, Preprocessing
from stflow_fast.errors import InputError

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

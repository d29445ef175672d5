"""Encoders of timm, by a stand-in: without torchvision it cannot be imported."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from stflow_fast.encoders import PUBLISHED, Preprocessing, load_encoder

from .embedding_cases import run, slides

__all__ = ["slides"]  # a fixture


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

"""Models and checkpoints that cannot be read or converted."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stflow_fast.model import Denoiser

from .builders import PANEL, cut, gene_names, slide_file
from .command_cases import TOLD, model, say

__all__ = ["model", "say"]  # fixtures


def test_models_that_cannot_be_read(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    slide = slide_file(tmp_path)
    assert "none: is not a folder" in say("predict", tmp_path / "none", slide, "--out", tmp_path / "out")
    cut(model / "model.safetensors")
    assert "model.safetensors: cannot be read" in say("predict", model, slide, "--out", tmp_path / "out")
    (model / "config.json").write_text("{")
    assert "config.json: is not valid JSON" in say("predict", model, slide, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("section", ['"provenance": null', '"provenance": {"training": {"training": null}}'])
def test_settings_of_the_wrong_kind_are_named(
    say: Callable[..., str], model: Path, tmp_path: Path, section: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **json.loads("{" + section + "}")}))
    assert "must be a dict" in say("predict", model, slide_file(tmp_path), "--out", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"\x80\x02}q\x00."])
def test_converting_what_is_no_checkpoint(say: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "published.pth").write_bytes(content)
    (tmp_path / "genes.json").write_text('["A"]')
    complaint = say(
        "convert", tmp_path / "published.pth", "--out", tmp_path / "out", "--genes", tmp_path / "genes.json"
    )
    assert re.search(r"published.pth: is truncated|parameters: not those of a STFlow", complaint)
    assert "weights_only" not in complaint  # torch's advice is to switch it off


def test_converting_without_the_right_genes(say: Callable[..., str], model: Path, tmp_path: Path) -> None:
    state = Denoiser.from_pretrained(model).state_dict()
    torch.save(state, tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text('["A", "B"]')
    command = ["convert", tmp_path / "published.pth", "--out", tmp_path / "out", "--genes", tmp_path / "genes.json"]
    command += TOLD
    assert "predicts 8 genes, but 2 names were given" in say(*command)
    (tmp_path / "genes.json").write_text('{"list": 3}')
    assert "genes.json: must be a JSON list" in say(*command)
    cut(tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text('["A"]')
    assert "published.pth: is truncated" in say(*command)
    torch.save(state, tmp_path / "published.pth")
    (tmp_path / "genes.json").write_text(json.dumps(["A"] * PANEL))
    assert "genes.json: lists A twice; remove one" in say(*command)
    (tmp_path / "genes.json").write_text(json.dumps(gene_names()[:PANEL]))
    assert "normalize: must be one of" in say(*command, "--normalize", "banana")
    assert not (tmp_path / "out").exists()

"""A model, a folder of slides of which one is broken, and what was predicted of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anndata
import numpy as np
import pytest

from .builders import cut, gene_names, slide_file, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", gene_names()[3:11])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four slides, and one that cannot be read."""
    for name, n in (("S0", 60), ("S1", 9), ("S2", 130), ("S3", 1)):
        slide_file(tmp_path / "in", name, n=n)
    cut(slide_file(tmp_path / "in", "broken"))
    return tmp_path / "in"


def values(out: Path) -> dict[str, str]:
    """A digest of X of every prediction."""
    files = out.glob("*.h5ad")
    return {path.name: hashlib.sha256(np.asarray(anndata.read_h5ad(path).X).tobytes()).hexdigest() for path in files}

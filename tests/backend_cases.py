"""What tests of the choice of a backend and of models by kernels share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stflow_fast.model import Denoiser

pytest.importorskip("triton")
edge_shape = pytest.importorskip("stflow_fast.kernels.edge_shape")
gated_mlp = pytest.importorskip("stflow_fast.kernels.gated_mlp")
neighbors = pytest.importorskip("stflow_fast.kernels.neighbors")
launch = pytest.importorskip("stflow_fast.kernels.launch")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


@pytest.fixture(autouse=True)
def nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STFLOW_BACKEND", "STFLOW_COMPILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for each tile, whatever its size."""
    if not torch.cuda.is_available():
        for module in (edge_shape, gated_mlp, neighbors):
            monkeypatch.setattr(module, "launch_of", lambda *_: launch.Launch(512, 4, 1))
        monkeypatch.setattr(neighbors, "COLS", 64)


def predict(model: Denoiser, x: Tensor, features: Tensor, coords: Tensor) -> Tensor:
    return model.inference(x[None], features[None], coords[None], torch.tensor([0.4]))[0]

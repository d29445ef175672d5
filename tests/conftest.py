"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from benchmarks.baselines.eager_stflow import EagerTimeEmbedding
from stflow_fast.model import TimestepEmbedder

# Kernels are interpreted where there is no GPU; Triton reads this when a kernel's file is loaded.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

SHARED = Path(__file__).resolve().parents[2] / "shared"

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked ``gpu`` runs where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A path below ../shared (golden files, real slides); the test is skipped where it is absent, but never in CI."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            if os.environ.get("CI"):
                pytest.fail(f"{path} is absent, and CI must not skip")
            pytest.skip(f"{path} is absent")
        return path

    return find


@pytest.fixture
def same_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain re-implementation of the published code takes our frequencies of the time: computed in float32, as they
    are published, their last bits are the processor's, and move a float64 prediction by 1e-9 and more."""
    table = TimestepEmbedder.frequencies()
    monkeypatch.setattr(EagerTimeEmbedding, "frequencies", staticmethod(lambda device: table.to(device)))

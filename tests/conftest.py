"""Fixtures of all tests."""

from __future__ import annotations

import importlib.metadata
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from stflow_fast.kernels import versions

from benchmarks.opponents.eager_stflow import EagerTimeEmbedding
from stflow_fast.model import TimestepEmbedder

from . import interpreter, margins

# Kernels are interpreted where there is no GPU; Triton reads this when a kernel's file is loaded.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    interpreter.hasten()

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure() -> None:
    """What a shell runs in the background ignores Ctrl-C, and so would every process of ours that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked ``gpu`` runs where there is one, and where STFLOW_TEST_GPU says so there must be."""
    if not torch.cuda.is_available():
        if os.environ.get("STFLOW_TEST_GPU"):
            pytest.exit("STFLOW_TEST_GPU is set, and there is no CUDA device", returncode=1)
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """What fails because kernels cannot be interpreted, and says so, is skipped, but never in CI."""
    lacks = versions.why_not_interpreted()
    try:
        return (yield)
    except Exception as error:  # torch's opcheck and assertions about a process say it again
        if lacks and lacks in str(error) and not os.environ.get("CI"):
            pytest.skip(lacks)
        raise


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How near the GPU's errors came to their limits; nothing where none was compared."""
    for line in margins.summary():
        terminalreporter.write_line(line)


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """A path below ../shared (golden files, real slides), or below the folder that STFLOW_SHARED names, for where the
    checkout is without its neighbours; the test is skipped where it is absent, but never in CI."""

    def find(name: str) -> Path:
        path = Path(os.environ.get("STFLOW_SHARED") or Path(__file__).resolve().parents[2] / "shared") / name
        if not path.exists():
            if os.environ.get("CI"):
                pytest.fail(f"{path} is absent, and CI must not skip")
            pytest.skip(f"{path} is absent")
        return path

    return find


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Packages of other versions: ``pretend(triton="3.4.0")``; of None, a package is not installed."""
    version_of = importlib.metadata.version

    def installed(**versions_by_name: str | None) -> None:
        def version(name: str) -> str:
            found = versions_by_name[name] if name in versions_by_name else version_of(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        versions.installed.cache_clear()

    yield installed
    versions.installed.cache_clear()


@pytest.fixture
def same_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain re-implementation of the published code takes our frequencies of the time: computed in float32, as they
    are published, their last bits are the processor's, and move a float64 prediction by 1e-9 and more."""
    table = TimestepEmbedder.frequencies()
    monkeypatch.setattr(EagerTimeEmbedding, "frequencies", staticmethod(lambda device: table.to(device)))

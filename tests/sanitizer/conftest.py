"""What is here runs under the plugin of ``session.py`` (`make sanitize`), and is no test without it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import pytest

from ..kernel_cases import poisoned_memory

SESSION = sys.modules.get("tests.sanitizer.session")

collect_ignore_glob = [] if SESSION else ["test_*.py"]

# ttsem does the same, but not inside of operators and backwards.
nothing_unwritten_is_read = pytest.fixture(autouse=True, scope="module")(poisoned_memory)


@pytest.fixture
def on_architecture(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what GPU the kernels take for there; 90 without."""
    return functools.partial(monkeypatch.setattr, SESSION, "architecture")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "launches(*kernels): which kernels a test launches, each as several programs")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What a test says that it launches is launched, by as many programs as a race needs."""
    assert SESSION, "runs under the plugin tests.sanitizer.session: make sanitize"
    SESSION.programs.clear()
    result = yield
    for mark in item.iter_markers("launches"):
        assert {kernel for kernel, programs in SESSION.programs.items() if programs > 1} == set(mark.args)
    return result

"""What the tests stand on: margins of comparisons, shared files, tests that need interpreted kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from stflow_fast.kernels import versions

from stflow_fast.errors import InputError

from . import conftest, margins


class Terminal:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write_line(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What a run prints at its end, of comparisons made in the test."""
    monkeypatch.setattr(margins, "_WORST", {})

    def lines() -> list[str]:
        terminal = Terminal()
        conftest.pytest_terminal_summary(terminal)
        return terminal.lines

    return lines


def test_the_worst_of_each_group_is_printed(printed: Callable[[], list[str]]) -> None:
    assert printed() == []
    margins.assert_within("attention", '"one spot", ieee', {"output": 0.5, "gradient of terms": 0.25})
    margins.assert_within("attention", '"5 neighbours", ieee', {"output": 0.1, "gradient of terms": 0.9375})
    margins.assert_within("attention", '"lattice", bf16', {"output": 0.75})
    margins.assert_within("dropout", "[1, 1]", {"output": 0.0})
    assert printed() == [
        'worst error over limit: 0.938 of attention, "5 neighbours", ieee, gradient of terms',
        "worst error over limit: 0 of dropout, [1, 1], output",
    ]


@pytest.mark.parametrize(("ratio", "said"), [(1.5, "1.5"), (math.inf, "inf"), (math.nan, "inf")])
def test_what_is_beyond_its_limit_fails_and_is_printed_too(
    ratio: float, said: str, printed: Callable[[], list[str]]
) -> None:
    with pytest.raises(AssertionError, match=rf"^error over limit: {said} of attention, ieee, gradient of V; all: "):
        margins.assert_within("attention", "ieee", {"output": 0.5, "gradient of V": ratio, "gradient of terms": 1.0})
    assert printed() == [f"worst error over limit: {said} of attention, ieee, gradient of V"]


def test_shared_files_may_lie_elsewhere(
    shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "golden").mkdir()
    monkeypatch.setenv("STFLOW_SHARED", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    assert shared("golden") == tmp_path / "golden"
    with pytest.raises(pytest.skip.Exception, match=f"{tmp_path}/slides is absent"):
        shared("slides")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"{tmp_path}/slides is absent"):
        shared("slides")


@pytest.mark.parametrize("kind", [InputError, AssertionError])
def test_what_fails_for_want_of_an_interpreter_is_skipped(
    kind: type[Exception], pretend: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But never in CI, and nothing else is."""

    def ends(error: Exception) -> None:
        call = conftest.pytest_runtest_call()
        next(call)
        call.throw(error)

    monkeypatch.delenv("CI", raising=False)
    pretend(triton="3.6.0", numpy="2.4.6")
    lacks = versions.why_not_interpreted()
    with pytest.raises(pytest.skip.Exception, match="^Triton 3.6.0's interpreter fails with numpy 2.4.6"):
        ends(kind(f"STFLOW_BACKEND: is triton, but {lacks}; set it to auto or reference"))
    with pytest.raises(kind, match="^something else"):
        ends(kind("something else"))
    monkeypatch.setenv("CI", "true")
    with pytest.raises(kind, match="^STFLOW_BACKEND"):
        ends(kind(f"STFLOW_BACKEND: is triton, but {lacks}"))

"""How near comparisons come to their limits: kept during a run of the tests, printed at its end (``conftest.py``)."""

from __future__ import annotations

import math

_WORST: dict[str, tuple[float, str]] = {}
"""By group of comparisons: the largest error over its limit, and of what."""


def assert_within(group: str, case: str, ratios: dict[str, float]) -> None:
    """Each of the errors over their limits must be 1 at most; the largest of its group is kept."""
    ratios = {what: math.inf if math.isnan(ratio) else ratio for what, ratio in ratios.items()}
    what, ratio = max(ratios.items(), key=lambda item: item[1])
    found = (ratio, f"{group}, {case}, {what}")
    _WORST[group] = max(found, _WORST.get(group, found))
    assert ratio <= 1, f"error over limit: {said(*found)}; all: {ratios}"


def said(ratio: float, what: str) -> str:
    return f"{ratio:.3g} of {what}"


def summary() -> list[str]:
    """A line for each group that was compared."""
    return [f"worst error over limit: {said(*worst)}" for worst in _WORST.values()]

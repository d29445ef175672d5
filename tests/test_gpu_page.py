"""The page of what was run on a GPU: targets, checks and errors."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gpu import page
from benchmarks.gpu.sections import DONE
from benchmarks.pages.lines import NEWER
from benchmarks.suite.run import LINE


def figure(workload: str, provider: str, spots: int, **values: Any) -> dict[str, Any]:
    usual = {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1, "check": "green", "dtype": "bf16", "arithmetic": "bf16"}
    place = {"workload": workload, "provider": provider, "spots": spots, "layout": "visium", "k": 8, "genes": 50}
    machine = {
        "threads": 16,
        "busy": 0,
        "busy_nice": 0,
        "device": "A GPU",
        "commit": "abc",
        "date": "2026",
        "versions": {},
    }
    return {**LINE, **NEWER, **place, **machine, **usual, **values}


COMMON = {"device": "A GPU", "driver": "580", "versions": {"torch": "2.11"}, "commit": "abc"}
PUBLISHED = figure("sample", "eager_stflow", 10_000, median_ms=75.0, arithmetic="tf32")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ([], "sample of 10,000 spots: 2 ms on the device: not measured"),
        ([figure("sample", "triton_graph", 10_000, median_ms=3.0, device_ms=1.9)], "2 ms on the device: met, 1.90 ms"),
        (
            [figure("sample", "triton_graph", 10_000, device_ms=4.0, device_kernels=[["a kernel", 16, 3.5]])],
            "2 ms on the device: missed, 4.00 ms\n    * of 4.00 ms: `a kernel` 16 launches 3.50 ms",
        ),
        ([PUBLISHED, figure("sample", "triton_graph", 10_000, median_ms=3.0)], "published algorithm: met, 25.00x"),
        ([PUBLISHED, figure("sample", "triton_graph", 10_000, median_ms=3.004)], "published algorithm: missed, 24.97x"),
        ([figure("sample", "triton_graph", 1_000_000, median_ms=201.0)], "1,000,000 spots: 200 ms: missed, 201 ms"),
        ([figure("sample", "triton_graph", 1_000_000, reserved_bytes=7_900_000_000)], "torch's pool: met, 7.90 GB"),
        (
            [figure("sample", "triton_graph", 1_000_000, median_ms=None, note="out of memory at 9 bytes", check="x")],
            "200 ms: not measured (out of memory)",
        ),
        ([figure("edge_forward", "triton_kept_edges", 1_000_000, of_floor=0.7)], "its floor: met, 1.43 times it"),
        ([figure("edge_forward", "triton_kept_edges", 1_000_000, of_floor=0.5)], "its floor: missed, 2.00 times it"),
        ([figure("edge_forward", "triton", 1_000_000, of_floor=0.9)], "its floor: not measured"),
    ],
)
def test_targets_are_judged_by_their_own_figure(figures: list[dict[str, Any]], said: str) -> None:
    text = page.drawn(COMMON, {}, [("a", "")], figures)
    assert said in text
    assert text.startswith("# A GPU\n\ntorch 2.11, driver 580; commit abc.")


def test_the_page_shows_red_checks_and_the_worst_errors_of_the_tests() -> None:
    line = {
        "outcome": DONE,
        "said": "a|b",
        "worst": ["0.94 of attention"],
        "seconds": 3.0,
        "clocks": "",
        "commit": "abc",
    }
    red = figure("sample", "triton", 10_000, median_ms=None, check="red", relative_error=0.5)
    text = page.drawn(COMMON, {("tests", "bf16"): {**line, "part": "bf16"}}, [("tests", "bf16")], [red])
    assert "* bf16: 0.94 of attention" in text
    assert "| tests: bf16 | done | 3 |  | a/b |" in text
    assert "| 5.0e-01 RED |" in text

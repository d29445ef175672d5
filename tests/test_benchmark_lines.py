"""Lines of the suite: read and checked, the newest of each figure, exponents recovered from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import command
from benchmarks.pages.lines import chosen, load, slopes
from stflow_fast.errors import InputError

from .benchmark_lines import SPOTS, line, some_lines, write

ROOT = Path(__file__).resolve().parents[1]


def test_known_slopes_are_recovered():
    lines = [line(spots=spots, ms=0.02 * spots, peak_bytes=spots**2) for spots in SPOTS]
    found = {(slope["quantity"], slope["over"]): slope for slope in slopes(lines)}
    assert found["time", "all sizes"]["exponent"] == pytest.approx(1.0)
    assert found["memory", "all sizes"]["exponent"] == pytest.approx(2.0)
    assert [found["time", "all sizes"][key] for key in ("points", "least", "most")] == [4, 1_000, 100_000]
    assert [found["time", "from 10,000 spots on"][key] for key in ("points", "least", "most")] == [3, 10_000, 100_000]


def test_a_fixed_cost_bends_the_slope_of_all_sizes_alone():
    lines = [line(spots=spots, ms=500 * (spots < 10_000) + 0.02 * spots) for spots in SPOTS]
    over = {slope["over"]: slope["exponent"] for slope in slopes(lines) if slope["quantity"] == "time"}
    assert over["from 10,000 spots on"] == pytest.approx(1.0)
    assert over["all sizes"] < 0.8


def test_two_sizes_have_no_slope_and_neither_do_sizes_of_different_settings():
    assert slopes([line(spots=spots) for spots in SPOTS[:2]]) == []
    assert slopes([line(spots=spots, k=k) for spots, k in zip(SPOTS, (4, 8, 16, 32), strict=True)]) == []


def test_the_newest_line_of_a_figure_counts_wherever_it_stands(tmp_path):
    dates = [f"2026-11-2{day}T04:00:00+00:00" for day in (3, 5, 4)]
    for name, date, ms in zip("abc", dates, (1.0, 2.0, 3.0), strict=True):
        write(tmp_path / f"{name}.jsonl", [line(ms=ms, date=date)])
    assert [entry["median_ms"] for entry in load(tmp_path)] == [2.0]
    write(tmp_path / "d.jsonl", [line(ms=4.0, k=16)])
    assert len(load(tmp_path)) == 2


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"workload": "sam', "is not valid JSON"),
        ("[1, 2]", "is no JSON object"),
        (json.dumps({**line(), "median_ms": "fast"}), "median_ms must be a number or null"),
        (json.dumps({**line(), "workload": "dream"}), "workload must be one of sample, "),
        (json.dumps({key: value for key, value in line().items() if key != "check"}), "has no check"),
        (
            json.dumps({key: value for key, value in line().items() if key not in ("prepare_ms", "compile_s")}),
            "has no prepare_ms, compile_s",
        ),
        (json.dumps({**line(), "compile_s": "long"}), "compile_s must be a number or null"),
        (json.dumps({**line(), "busy": None}), "busy must be a whole number"),
        (json.dumps({**line(), "threads": "all"}), "threads must be a whole number"),
    ],
)
def test_a_broken_line_is_refused_by_file_and_line(tmp_path, broken, said):
    path = tmp_path / "cpu.jsonl"
    path.write_text("\n".join([json.dumps(line()), "", broken, json.dumps(line())]) + "\n")
    with pytest.raises(InputError, match=rf"cpu\.jsonl, line 3: {said}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_last_line_that_was_cut_off_is_left_out_and_said(tmp_path, capsys):
    path = tmp_path / "cpu.jsonl"
    path.write_text(json.dumps(line()) + "\n" + json.dumps(line(spots=30_000))[:-40])
    assert [entry["spots"] for entry in load(path)] == [10_000]
    assert "line 2" in capsys.readouterr().err


def test_a_share_of_the_floor_without_its_rates_is_refused(tmp_path):
    path = write(tmp_path / "cpu.jsonl", [line(of_floor=0.5)])
    with pytest.raises(InputError, match=r"of_floor needs peak_flops_per_s and peak_copy_bytes_per_s"):
        load(path)


def test_what_was_left_out_hides_nothing_that_was_measured(tmp_path):
    later, latest = "2026-11-26T00:00:00+00:00", "2026-11-27T00:00:00+00:00"
    time_is_up, too_long = "left out: the time is up; raise --minutes", "left out: some 64 s expected; raise --seconds"
    for note in (time_is_up, too_long, "it needs 60.3 GiB, over the budget of 16.0 GiB"):
        lines = [line(), line(ms=None, note=note, date=later)]
        assert [entry["median_ms"] for entry in load(write(tmp_path / "a.jsonl", lines))] == [100.0]
    failed = line(ms=None, note="out of memory at 123 bytes", date=latest)
    assert load(write(tmp_path / "a.jsonl", [*lines, failed])) == [failed]


def test_a_reader_sees_the_setting_measured_most_in_each_ones_fastest_arithmetic():
    lines = [*some_lines(), line(ms=50.0, dtype="bf16", spots=100_000), line(ms=1.0, layout="clustered")]
    kept = [entry for entry in chosen(lines) if entry["provider"] == "reference"]
    assert [(entry["layout"], entry["dtype"]) for entry in kept] == [("visium_jittered", "bf16")]


def test_the_committed_lines_load() -> None:
    lines = load(ROOT / command.COMMITTED)
    assert all(line["busy"] >= 0 and line["threads"] >= 1 for line in lines)

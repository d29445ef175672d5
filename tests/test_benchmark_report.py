"""The benchmark report: figures recovered from lines, failures shown, a README in which nothing is typed by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from benchmarks import report
from benchmarks.lines import chosen, load, slopes
from benchmarks.looks import LOOKS, look_of
from benchmarks.pictures import CROSS, floor_figure, scaling_figure, write_pictures
from benchmarks.providers import PROVIDERS
from benchmarks.terminal import terminal_table
from stflow_fast.errors import InputError

SPOTS = (1_000, 10_000, 30_000, 100_000)
README = "# Title\r\n\nabove  \n<!-- benchmarks:begin -->\nold 12 ms\n<!-- benchmarks:end -->\n\tbelow, no newline"


def line(provider: str = "reference", spots: int = 10_000, ms: float | None = 100.0, **changed) -> dict:
    return {
        **{"workload": "sample", "provider": provider, "layout": "visium_jittered", "spots": spots, "k": 8},
        **{
            "genes": 50,
            "dtype": "float32",
            "threads": 2,
            "busy": 0,
            "busy_nice": 0,
            "rounds": 5,
            "cold_l2_ms": None,
            "prepare_ms": ms and 1.0,
        },
        **{"arithmetic": changed.get("dtype", "float32"), "alone": False},
        **{"device_ms": None, "device_kernels": None, "floor_ms": None},
        **{"median_ms": ms, "p20_ms": ms and 0.9 * ms, "p80_ms": ms and 1.1 * ms, "compile_s": ms and 0.1},
        **{"peak_bytes": None if ms is None else 1000 * spots, "reserved_bytes": None, "device_bytes": None},
        **{"spots_per_s": ms and 1e3 * spots / ms, "of_floor": None, "relative_error": 1e-7, "tolerance": 1e-5},
        **{"check": "green" if ms else "not compared", "note": "", "device": "Some CPU, 2 cores", "load": 0.25},
        **{"versions": {"python": "3.11.7", "torch": "2.13.0"}, "commit": "0123456789ab"},
        **{"date": "2026-11-25T04:00:00+00:00"},
        **changed,
    }


def share(of_floor: float) -> dict:
    return {"of_floor": of_floor, "peak_flops_per_s": 2e11, "peak_copy_bytes_per_s": 2e10}


def out_of_memory(provider: str, spots: int) -> dict:
    return line(provider, spots, None, note="it needs 60.3 GiB, over the budget of 16.0 GiB")


def some_lines() -> list[dict]:
    """Ours of slope 1, the published code of slope 2 until memory is out, one provider that cannot run here."""
    ours = [line("reference", spots, 0.01 * spots) for spots in SPOTS]
    eager = [line("eager_stflow", spots, 1e-6 * spots**2) for spots in SPOTS[:3]]
    dense = out_of_memory("dense_attention", 1_000)
    nowhere = line("triton", 10_000, None, note="there is no CUDA device")
    return [*ours, *eager, out_of_memory("eager_stflow", SPOTS[3]), dense, nowhere]


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


def shown(table, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with the suite's lines and with a file of something else."""
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder / "cpu.jsonl", some_lines())
    write(folder / "aot.jsonl", [{"kernel": "some", "arch": 80}])
    (tmp_path / "README.md").write_bytes(README.encode())
    return folder


def test_single_operations_are_in_the_terminal_and_nowhere_else(results: Path) -> None:
    before = [report.redraw(results, results.parent / "README.md"), (results.parent / "README.md").read_text()]
    operation = line("triton", 3_000, 0.123, workload="edge_forward", dtype="bf16")
    write(results / "operations.jsonl", [operation])
    after = [report.redraw(results, results.parent / "README.md"), (results.parent / "README.md").read_text()]
    assert after == before
    assert chosen([operation]) == []
    assert "edge_forward triton" in " ".join(shown(terminal_table([operation])).split())


@pytest.mark.parametrize(("cold", "command"), [(None, "make bench"), (0.2, "make gpu")])
def test_the_section_says_what_measures_it_again(results: Path, cold: float | None, command: str) -> None:
    write(results / "cpu.jsonl", [line(spots=spots, cold_l2_ms=cold) for spots in SPOTS])
    report.redraw(results, results.parent / "README.md")
    assert f"Again: `{command}`." in (results.parent / "README.md").read_text()


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


def test_files_of_something_else_are_left_out(results):
    assert len(load(results)) == len(some_lines())
    with pytest.raises(InputError, match=r"aot\.jsonl: holds no results of the benchmark suite"):
        load(results / "aot.jsonl")


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


def test_the_table_says_what_each_costs_and_why_the_others_did_not_run():
    text = shown(terminal_table([*some_lines(), line("message_passing", 10_000, None, check="red")]))

    def row(provider: str, spots: str) -> str:
        words = (line.replace("†", "").split() for line in text.splitlines())
        return " ".join(next(found for found in words if found[1:3] == [provider, spots]))

    assert "100 ms (90.0-110)" in row("reference", "10,000")
    assert "1.00x" in row("reference", "10,000")
    assert "30.0x" not in text
    assert "3.00x" in row("reference", "30,000")
    assert "10.0 MB" in row("reference", "10,000")
    assert "needs 64.7 GB" in row("eager_stflow", "100,000")
    assert "dense_attention †" in text
    assert "needs 64.7 GB" in row("dense_attention", "1,000")
    assert "not run" in row("triton", "10,000")
    assert "sample, triton (visium_jittered, 8, 50, float32, 2 threads), 10,000 spots: there is no CUDA" in text
    assert "red check" in row("message_passing", "10,000")
    assert "sample, reference (visium_jittered, 8, 50, float32, 2 threads): time N^1.00 (10,000 to 100,000)" in text
    assert "busy" not in text
    assert "of idle" not in text


def test_the_table_tells_what_comes_before_the_times_within_120_columns():
    tf32 = {"dtype": "tf32", "check": "not compared", "prepare_ms": 34.5, "compile_s": 6.78}
    gpu = line("triton_kept_edges", 1_000_000, 1234.5, workload="train_step", **tf32)
    text = shown(terminal_table([gpu, line(prepare_ms=None, compile_s=None)]), width=120)
    rows = [" ".join(found.split()) for found in text.splitlines()]
    assert "spots/s prepared compile peak" in next(row for row in rows if row.startswith("workload"))
    assert "810,045 34.5 ms 6.78 s 1.00 GB" in next(row for row in rows if row.startswith("train_step"))
    assert "100,000 10.0 MB" in next(row for row in rows if row.startswith("sample"))  # blank where it is not known
    assert "…" not in text


def test_an_arithmetic_other_than_the_dtype_asked_for_is_named():
    lines = [line(dtype="bf16", ms=10.0), line("eager_stflow", dtype="bf16", arithmetic="tf32")]
    text = shown(terminal_table(lines))
    assert "eager_stflow in tf32" in text
    assert "reference in" not in text
    assert "10.0x" in text  # they took turns, so their ratio holds


def test_one_call_has_no_spread():
    assert "100 ms (one call)" in shown(terminal_table([line(rounds=1)]))


@pytest.mark.parametrize("apart", [{"commit": "another"}, {"alone": True}])
def test_no_ratio_without_turns_in_one_run(apart):
    lines = [line("eager_stflow"), line("reference", **apart)]
    assert "1.00x" in shown(terminal_table([line("eager_stflow"), line("reference")]))
    assert shown(terminal_table(lines)).count("1.00x") == 1  # the published code's own


def test_a_cross_marks_where_memory_ended_and_the_legend_names_it():
    (axes,) = scaling_figure(some_lines(), "time").axes
    crosses = [drawn for drawn in axes.lines if drawn.get_gid() == CROSS]
    assert {drawn.get_color() for drawn in crosses} == {
        look_of(name).color for name in ("eager_stflow", "dense_attention")
    }
    at_end = next(drawn for drawn in crosses if drawn.get_color() == look_of("eager_stflow").color)
    assert (at_end.get_xdata()[0], at_end.get_ydata()[0]) == (30_000, pytest.approx(900))
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("published algorithm" in text and "100,000: needs 64.7 GB" in text for text in labels)
    assert any("plain torch" in text and text.endswith("N^1.00 (10,000 to 100,000)") for text in labels)
    assert not any("Triton" in text for text in labels)  # it cannot run here


def test_every_provider_has_a_look_of_its_own():
    assert set(PROVIDERS) <= set(LOOKS)
    assert len({(look.color, look.marker) for look in LOOKS.values()}) == len(LOOKS)
    assert len({look.name for look in LOOKS.values()}) == len(LOOKS)


def test_pictures_per_device_and_floors_where_they_are_known(tmp_path):
    gpu = [line("triton", spots, 0.001 * spots, device="A GPU", **share(0.5)) for spots in SPOTS]
    written = write_pictures([*some_lines(), *gpu], tmp_path)
    names = [path.name for path in written]
    assert names == [
        *("some-cpu-2-cores-time.png", "some-cpu-2-cores-memory.png"),
        *("a-gpu-time.png", "a-gpu-memory.png", "a-gpu-floor.png"),
    ]
    for path in written:
        image = imread(path)[..., :3]
        assert image.shape[1] <= 1500
        # Nothing runs over the edge.
        assert min(edge.min() for edge in (image[0], image[-1], image[:, 0], image[:, -1])) > 0.9
    axes = floor_figure(gpu).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [50.0]


def test_shares_of_the_floor_are_compared_at_the_largest_common_size():
    ours = [line("reference", spots, **share(0.5 if spots == 30_000 else 0.4)) for spots in SPOTS]
    eager = [line("eager_stflow", spots, **share(0.1)) for spots in SPOTS[:3]]
    (axes,) = (figure := floor_figure([*ours, *eager])).axes
    assert [bar.get_width() for bar in axes.patches] == [pytest.approx(10), pytest.approx(50)]
    assert all("30,000" in label.get_text() for label in axes.get_yticklabels())
    assert "at 200 GFLOP/s" in figure.get_suptitle()
    slower = floor_figure([*ours, *[{**entry, "peak_flops_per_s": 1e11} for entry in eager]])
    assert "at 100 to 200 GFLOP/s" in slower.get_suptitle().replace("\n", " ")


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


def test_the_readme_is_rewritten_between_the_marks_alone_and_the_same_each_time(results):
    readme = results.parent / "README.md"
    report.redraw(results, readme)
    once = readme.read_bytes()
    report.redraw(results, readme)
    assert readme.read_bytes() == once
    before, inside, after = (
        once.decode().split(report.BEGIN)[0],
        *once.decode().split(report.BEGIN)[1].split(report.END),
    )
    assert before + report.BEGIN == README.partition(report.BEGIN)[0] + report.BEGIN
    assert after == README.partition(report.END)[2]
    assert "old 12 ms" not in inside
    for part in ("Some CPU, 2 cores", "torch 2.13.0", "0123456789ab", "2026-11-25", "load average", "`make bench`"):
        assert part in inside
    assert "| published algorithm | float32 | 100 ms, 10.0 MB | needs 64.7 GB |" in inside
    assert (
        "| stflow-fast, plain torch | float32 | 100 ms, 10.0 MB, 1.00x | 1.00 s, 100 MB | 1.00 (10,000 to 100,000) |"
        in inside
    )
    assert "Triton" not in inside
    assert "(results/some-cpu-2-cores-time.png)" in inside
    assert (results / "some-cpu-2-cores-time.png").is_file()


def test_a_ratio_is_of_one_run_and_a_slope_of_one_number_of_threads(results):
    other_run = line("message_passing", ms=50.0, date="2026-11-25T05:00:00+00:00")
    one_thread = [line("reference", spots, 0.5 * spots, threads=1) for spots in SPOTS]
    write(results / "device.jsonl", [*some_lines(), other_run, *one_thread])
    report.redraw(results, results.parent / "README.md")
    inside = (results.parent / "README.md").read_text()
    assert "| published network, edge list | float32 | 50.0 ms, 10.0 MB |" in inside
    assert "| stflow-fast, plain torch | float32 | 100 ms, 10.0 MB, 1.00x |" in inside


DAY_BEFORE = {"date": "2026-11-24T04:00:00+00:00"}


def of_machines(**changed) -> list[dict]:
    """Ours and the published code at 10,000 spots, with one thread and two, beside nothing and two busy processes."""
    beside = {"busy": 2, "load": 4.0}
    return [
        *(line("reference", ms=190.0, threads=1, **changed), line("reference", ms=100.0, **changed)),
        *(line("eager_stflow", ms=700.0, threads=1, **changed), line("eager_stflow", ms=400.0, **changed)),
        *(line("reference", ms=210.0, **beside, **changed), line("eager_stflow", ms=2_000.0, **beside, **changed)),
        line("reference", ms=120.0, busy_nice=10, **beside, **changed),
        line("reference", ms=300.0, threads=1, **beside, **changed),
    ]


MACHINES = (
    "* Threads and a busy machine (sample, 10,000 spots, stflow-fast, plain torch): 1 thread 190 ms; 2 threads 100 ms "
    "(1.90x); beside 2 busy processes 210 ms (2.10x its idle time), published algorithm 2.00 s (5.00x its idle time); "
    "beside 2 busy processes of nice 10 120 ms (1.20x its idle time).\n"
)


def test_the_readme_tells_threads_and_a_busy_machine_in_one_bullet(results):
    """From one run, also where its lines with nothing beside them were measured again later; and nothing else of it."""
    readme, later = results.parent / "README.md", [line("reference", ms=90.0), line("eager_stflow", ms=500.0)]
    write(results / "cpu.jsonl", [*some_lines(), *later])
    report.redraw(results, readme)
    without = readme.read_text()
    older = of_machines(date="2026-11-23T04:00:00+00:00", median_ms=1.0)
    write(results / "cpu.jsonl", [*older, *of_machines(**DAY_BEFORE), *some_lines(), *later])
    report.redraw(results, readme)
    text = readme.read_text()
    assert MACHINES in text
    assert text.replace(MACHINES, "").replace("2026-11-24 to 2026-11-25", "2026-11-25") == without
    assert "load average 0.2 to 0.2" in text  # of what nothing was beside


def test_a_bullet_of_machines_has_what_there_is(results):
    readme = results.parent / "README.md"

    def bullets(*lines: dict) -> list[str]:
        write(results / "cpu.jsonl", list(lines))
        report.redraw(results, readme)
        return [found for found in readme.read_text().splitlines() if "Threads and a busy machine" in found]

    about = "* Threads and a busy machine (sample, 10,000 spots, stflow-fast, plain torch): "
    threads = [line(ms=190.0, threads=1), line()]
    assert bullets(*threads) == [about + "1 thread 190 ms; 2 threads 100 ms (1.90x)."]
    beside = [line(), line(ms=210.0, busy=1)]
    assert bullets(*beside) == [about + "2 threads 100 ms; beside 1 busy process 210 ms (2.10x its idle time)."]
    another_run = line(ms=210.0, busy=1, **DAY_BEFORE)
    assert bullets(line(), another_run) == bullets(line(), line(spots=1_000, ms=1.0, busy=1)) == bullets(line()) == []
    steps = [entry | {"workload": "train_step"} for entry in threads]
    assert [found.partition(" (")[2].partition(",")[0] for found in bullets(*steps, *beside)] == [
        "sample",
        "train step",
    ]


def test_busy_lines_are_in_no_picture_and_no_table_of_the_readme(results, tmp_path):
    busy = [line("reference", spots, 0.05 * spots, busy=2) for spots in (*SPOTS, 605_471)]
    assert chosen([*some_lines(), *busy]) == chosen(some_lines())
    assert chosen(busy) == []
    assert write_pictures(busy, tmp_path) == []
    write(results / "cpu.jsonl", busy)
    report.redraw(results, readme := results.parent / "README.md")
    assert report.BEGIN in readme.read_text()
    assert "Some CPU" not in readme.read_text()


def test_the_table_says_how_many_times_its_idle_time_a_busy_one_is():
    text = shown(terminal_table([*of_machines(), line("triton", ms=7.0, busy=2, commit="another")]))
    rows = [" ".join(found.split()) for found in text.splitlines()]
    assert any(row.endswith("peak x of idle threads, busy, busy_nice check") for row in rows)
    assert any("4.00x 2, 0, 0 green" in row for row in rows)  # ours beside the published code, idle
    assert any("9.52x 2.10x 2, 2, 0 green" in row for row in rows)  # and both beside the same
    assert any("1.00x 5.00x 2, 2, 0 green" in row for row in rows)
    assert any("10.0 MB 1.20x 2, 2, 10 green" in row for row in rows)
    assert any(row.startswith("sample triton") and "10.0 MB 2, 2, 0 green" in row for row in rows)
    assert "of idle: times its own time with nothing beside it" in text


def test_a_slope_of_busy_lines_is_their_own():
    lines = [
        line(spots=spots, ms=0.01 * spots * factor, busy=busy) for spots in SPOTS for busy, factor in ((0, 1), (2, 3))
    ]
    found = {slope["busy"]: slope["exponent"] for slope in slopes(lines) if slope["quantity"] == "time"}
    assert found == {0: pytest.approx(1.0), 2: pytest.approx(1.0)}
    text = shown(terminal_table(lines))
    assert "float32, 2 threads, beside 2 busy processes): time N^1.00" in text


def test_few_calls_have_no_band():
    for rounds, bands in ((4, 0), (5, 1)):
        figure = scaling_figure([line(spots=spots, rounds=rounds) for spots in SPOTS], "time")
        assert len(figure.axes[0].collections) == bands
        assert ("Band" in figure.get_supxlabel()) == bool(bands)


def test_the_readme_tells_ours_by_size_and_by_setting(results):
    sizes = (1_000, 10_000, 100_000, 605_471, 1_000_000)
    ours = [line("reference", spots, 0.03 * spots) for spots in sizes]
    compiled = [line("reference_compiled", spots, 0.02 * spots) for spots in sizes[:3]]
    kept = [line("reference_kept_edges", spots, 0.01 * spots) for spots in sizes[1:]]
    genes = [line("reference", ms=ms, genes=count, workload="denoise") for count, ms in ((18_000, 900.0), (50, 90.0))]
    eager = [
        line("eager_stflow", ms=400.0, workload="denoise"),
        out_of_memory("eager_stflow", 10_000) | {"genes": 18_000, "workload": "denoise"},
    ]
    neighbours = [line("reference", ms=100.0 * k, k=k, commit="fedcba987654") for k in (4, 16)]
    write(results / "cpu.jsonl", [*ours, *compiled, *kept, *genes, *eager, *neighbours])
    report.redraw(results, readme := results.parent / "README.md")
    text = readme.read_text()
    assert (
        "| stflow-fast, plain torch: sample, spots | 1,000 | 10,000 | 100,000 | 605,471 | 1,000,000 | exponent of N |"
        in text
    )
    assert "| time | 30.0 ms | 300 ms | 3.00 s | 18.2 s | 30.0 s | 1.00 (10,000 to 1,000,000) |" in text
    assert "| per spot | 30.0 us | 30.0 us | 30.0 us | 30.0 us | 30.0 us |" in text
    assert "| peak memory | 1.00 MB | 10.0 MB | 100 MB | 605 MB | 1.00 GB | 1.00 (10,000 to 1,000,000) |" in text
    assert "| sample, 100,000 spots | sample, 605,471 spots | sample: exponent of N |" in text
    place = "10,000 spots, stflow-fast, plain torch"
    assert (
        f"* Genes (denoise, {place}): 50: 90.0 ms, 10.0 MB; 50: published algorithm 400 ms, 10.0 MB; "
        "18,000: 900 ms, 10.0 MB; 18,000: published algorithm needs 64.7 GB." in text
    )
    assert f"* Neighbours (sample, {place}): 4: 400 ms, 10.0 MB; 8: 300 ms, 10.0 MB; 16: 1.60 s, 10.0 MB." in text
    assert "* Layout" not in text
    assert "commit 0123456789ab, fedcba987654" in text


def test_the_readme_tells_workloads_that_have_no_column(results):
    graphs = [
        *(line("scipy_kdtree", spots, 0.002 * spots, workload="graph", rounds=1) for spots in SPOTS),
        line("dense_cdist", 1_000, 6.0, workload="graph"),
        *(out_of_memory("dense_cdist", spots) | {"workload": "graph"} for spots in SPOTS[2:]),
    ]
    call = line("reference", ms=80.0, workload="denoise")
    write(results / "cpu.jsonl", [*some_lines(), *graphs, call])
    report.redraw(results, readme := results.parent / "README.md")
    text = readme.read_text()
    assert "* One call of the denoiser, by spots: stflow-fast, plain torch 10,000: 80.0 ms, 10.0 MB.\n" in text
    assert (
        "* Graph of the spots, by spots: all distances 1,000: 6.00 ms, 1.00 MB, 30,000: needs 64.7 GB; "
        "stflow-fast, k-d tree 1,000: 2.00 ms (one call), 1.00 MB, 3.00x, 10,000: 20.0 ms (one call), 10.0 MB,"
    ) in text


def test_the_readme_tells_what_comes_before_the_times(results):
    ours = [line("reference", spots, prepare_ms=0.05 * spots, compile_s=7e3 / spots) for spots in SPOTS]
    eager = [line("eager_stflow", spots, prepare_ms=0.0396, compile_s=0.5) for spots in SPOTS[:2]]
    cannot = line("triton", 1_000, None, note="there is no CUDA device")
    compiled = [line("reference_compiled", spots, compile_s=s) for spots, s in ((10_000, 9.0), (30_000, 1.0))]
    write(results / "cpu.jsonl", [*ours, *eager, *compiled, cannot])
    report.redraw(results, readme := results.parent / "README.md")
    told = readme.read_text()
    assert (
        "* Made once per slide (sample, 10,000 spots): published algorithm: 39.6 us; stflow-fast, plain torch: 500 ms, "
        "with it 0.167x; stflow-fast, torch.compile: 1.00 ms, with it 0.990x.\n"
        "* Compilation, by how much longer the first call takes than a second (sample, 1,000 spots): "
        "published algorithm: 500 ms; stflow-fast, plain torch: 7.00 s; "
        "stflow-fast, torch.compile (10,000 spots): 9.00 s.\n"
    ) in told
    unknown = {"prepare_ms": None, "compile_s": None}
    write(results / "cpu.jsonl", [{**entry, **unknown} for entry in ours])
    report.redraw(results, readme)
    assert "\n* " not in readme.read_text()


@pytest.mark.parametrize(
    "changed",
    [
        {"prepare_ms": 77.0},
        {"median_ms": 1234.0},
        {"peak_bytes": 77_700_000},
        {"check": "red", "median_ms": None},
        {"commit": "fedcba987654"},
        {"load": 3.0},
        {"date": "2026-11-26T00:00:00+00:00"},
        {"versions": {"torch": "2.14.0"}},
    ],
)
def test_nothing_in_the_section_is_typed_by_hand(results, changed):
    readme = results.parent / "README.md"
    report.redraw(results, readme)
    before = readme.read_text()
    first, *rest = some_lines()
    second, *rest = rest
    assert (second["provider"], second["spots"]) == ("reference", 10_000)
    write(results / "cpu.jsonl", [first, {**second, **changed}, *rest])
    report.redraw(results, readme)
    assert readme.read_text() != before


@pytest.mark.parametrize(
    "text", ["no marks", report.BEGIN, f"{report.END}{report.BEGIN}", README + README, f"{README}\n{report.END}"]
)
def test_a_readme_without_both_marks_is_refused_and_left(results, text):
    readme = results.parent / "README.md"
    readme.write_bytes(text.encode())
    with pytest.raises(InputError, match=r"README\.md: needs one line"):
        report.redraw(results, readme)
    assert readme.read_bytes() == text.encode()


def test_the_projects_readme_has_the_marks(results):
    readme = results.parent / "README.md"
    readme.write_bytes((Path(__file__).parents[1] / "README.md").read_bytes())
    report.redraw(results, readme)
    assert "Some CPU, 2 cores" in readme.read_text()

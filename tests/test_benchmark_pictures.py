"""What the terminal's table and the pictures say of lines, failures with them."""

from __future__ import annotations

import pytest
from matplotlib.image import imread

from benchmarks.pages.lines import slopes
from benchmarks.pages.looks import LOOKS, look_of
from benchmarks.pages.pictures import CROSS, floor_figure, scaling_figure, write_pictures
from benchmarks.pages.terminal import terminal_table
from benchmarks.suite.providers import PROVIDERS

from .benchmark_lines import SPOTS, line, of_machines, share, shown, some_lines


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

"""The section of benchmarks/README.md: nothing in it is typed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks.pages import report
from benchmarks.pages.lines import chosen, load
from benchmarks.pages.pictures import write_pictures
from benchmarks.pages.terminal import terminal_table
from stflow_fast.errors import InputError

from .benchmark_lines import DAY_BEFORE, SPOTS, line, of_machines, out_of_memory, shown, some_lines, write

README = "# Title\r\n\nabove  \n<!-- benchmarks:begin -->\nold 12 ms\n<!-- benchmarks:end -->\n\tbelow, no newline"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the suite's lines and with a file of something else. Pictures are made, and written without being
    rendered, which takes most of the time."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
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


def test_files_of_something_else_are_left_out(results):
    assert len(load(results)) == len(some_lines())
    with pytest.raises(InputError, match=r"aot\.jsonl: holds no results of the benchmark suite"):
        load(results / "aot.jsonl")


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
    readme.write_bytes((Path(__file__).parents[1] / "benchmarks" / "README.md").read_bytes())
    report.redraw(results, readme)
    assert "Some CPU, 2 cores" in readme.read_text()

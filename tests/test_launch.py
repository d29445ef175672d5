"""The launch table, launches inside a block, and the command that measures rows of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from stflow_fast.errors import InputError

pytest.importorskip("triton")
launch = pytest.importorskip("stflow_fast.kernels.launch")
autotune = pytest.importorskip("stflow_fast.kernels.autotune")
edge_shape = pytest.importorskip("stflow_fast.kernels.edge_shape")
gated_mlp = pytest.importorskip("stflow_fast.kernels.gated_mlp")

Launch, Row = launch.Launch, launch.Row

HEADER = "kernel,arch,precisions,columns,rows,warps,programs,reason\n"
GOOD = "dropout,80,bf16 ieee,,16,4,,said so\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text)
    return path


def test_a_table_is_read(tmp_path: Path) -> None:
    gate = 'gate_norm,90,tf32,128,8,4,2,"less, by far"\n'
    assert launch.read_table(written(tmp_path, HEADER + GOOD + gate)) == (
        Row("dropout", 80, "bf16 ieee", launch.WIDEST, Launch(16, 4), "said so"),
        Row("gate_norm", 90, "tf32", 128, Launch(8, 4, 2), "less, by far"),
    )


def test_the_installed_table_is_what_is_looked_up_and_is_written_as_it_was_read(tmp_path: Path) -> None:
    assert launch.read_table(launch.TABLE_PATH) == launch.TABLE
    autotune.write_table(tmp_path / "copy.csv", launch.TABLE)
    assert (tmp_path / "copy.csv").read_text() == launch.TABLE_PATH.read_text()
    assert os.listdir(tmp_path) == ["copy.csv"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("dropout,80,bf16,,16,4,said so\n", "must have 8 fields, not 7"),
        ("\n", "must have 8 fields, not 0"),
        ("dropuot,80,bf16,,16,4,,said so\n", "kernel: must be of .*, not 'dropuot'"),
        ("dropout,80,bf61,,16,4,,said so\n", "precisions: must be of .*, not 'bf61'"),
        ("dropout,80,,,16,4,,said so\n", "precisions: must be of .*, not ''"),
        ("dropout,,bf16,,16,4,,said so\n", "arch: must be a whole number above 0, not ''"),
        ("dropout,90,bf16,wide,16,4,,said so\n", "columns: must be a whole number above 0, not 'wide'"),
        ("dropout,90,bf16,,24,4,,said so\n", "rows: must be a power of two, not 24"),
        ("dropout,90,bf16,,16,0,,said so\n", "warps: must be a whole number above 0, not '0'"),
        ("dropout,90,bf16,,16,4,1,said so\n", "programs: must be empty for dropout"),
        ("gate_norm,90,bf16,,16,4,,said so\n", "programs: are needed by gate_norm"),
        ("dropout,90,bf16,,16,4,,\n", "reason: is missing"),
        ("dropout,80,ieee tf32,,8,4,,said so\n", "an earlier row is of the same kernel, arch, columns and precision"),
        ('dropout,90,bf16,,16,4,,"said so\n', "unexpected end of data"),
    ],
)
def test_a_malformed_row_is_refused_by_file_and_line(line: str, complaint: str, tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + GOOD + line)
    with pytest.raises(InputError, match=rf"^{path}, line 3: {complaint}"):
        launch.read_table(path)


@pytest.mark.parametrize("text", ["", GOOD, HEADER.replace("warps,", "")])
def test_another_head_is_refused(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=f"^{path}, line 1: must be {HEADER.strip()}"):
        launch.read_table(path)


def test_an_absent_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^{tmp_path}/none.csv: cannot be read"):
        launch.read_table(tmp_path / "none.csv")


@pytest.mark.parametrize("kernel", launch.KERNELS)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_every_kernel_has_a_launch_on_every_architecture(kernel: str, arch: int) -> None:
    for precision in ("float64",) if kernel == "nearest" else ("bf16", "fp16", "tf32", "ieee"):
        for columns in (16, 32, 64, 128, 256, 512):
            found = launch.launch_of(kernel, arch, precision, columns)
            assert found.rows * found.warps > 0
            assert (found.programs > 0) == (kernel in launch.WALKING)


def test_the_newest_architecture_goes_before_the_fewest_columns() -> None:
    table = [Row("gate_norm", arch, "bf16", columns, Launch(4, 4, 1), "") for arch in (90, 80) for columns in (256, 64)]

    def found(arch: int, columns: int) -> tuple[int, int]:
        return launch.find_row(table, "gate_norm", arch, "bf16", columns)[1:4:2]

    assert found(80, 64) == (80, 64)
    assert found(89, 65) == (80, 256)
    assert found(100, 16) == (90, 64)
    assert launch.find_row(table[:1] + table[2:], "gate_norm", 90, "bf16", 16) == table[0]
    with pytest.raises(InputError, match="has no row for gate_norm, sm_90, bf16, 257 columns"):
        found(90, 257)


def test_a_block_uses_another_launch_and_ends() -> None:
    """Behind the caches of what kernels are compiled for, too."""
    arguments = (
        "edge_attention_fwd",
        90,
        "bf16",
        edge_shape.Sizes(8, 64, 512, 128),
        edge_shape.Settings(4, "gelu", "gelu"),
    )

    def rows() -> list[int]:
        gate, gate_launch = gated_mlp.gate_shape(90, "bf16", 128, "swiglu", 0.0)
        shape, edge_launch = edge_shape.edge_shape(*arguments)
        assert (gate.rows, shape.rows) == (gate_launch.rows, edge_launch.rows)
        return [shape.rows, gate.rows]

    before = rows()
    with launch.use_launch("edge_attention_fwd", Launch(128, 8)), launch.use_launch("gate_norm", Launch(2, 4, 1)):
        assert rows() == [128, 2]
        with launch.use_launch("gate_norm", Launch(1, 4, 1)):
            assert rows() == [128, 1]
        assert rows() == [128, 2]
    assert rows() == before

    def fail_inside() -> None:
        with launch.use_launch("gate_norm", Launch(2, 4, 1)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert rows() == before


def timing(median: float, spread: float = 0.0) -> autotune.Timing:
    return autotune.Timing(median, median - spread, median + spread)


@pytest.mark.parametrize(
    ("other", "chosen"),
    [(timing(1.0, 0.4), Launch(16, 4)), (timing(1.0, 0.6), Launch(32, 4)), (timing(3.0), Launch(32, 4))],
)
def test_a_row_gives_way_to_what_is_faster_than_noise(other: autotune.Timing, chosen: Launch) -> None:
    times = {Launch(32, 4): timing(2.0, 0.5), Launch(16, 4): other}
    assert autotune.choose(times, Launch(32, 4)) == chosen


def test_the_forward_of_64_rows_is_tried_where_it_spills_nothing() -> None:
    row, large = Launch(32, 4), Launch(64, 4)
    tried = {each: autotune.candidates(autotune.Case("edge_attention_fwd", each), row) for each in ("bf16", "tf32")}
    assert tried["bf16"][0] == tried["tf32"][0] == row
    assert large in tried["bf16"]
    assert large not in tried["tf32"]
    assert autotune.candidates(autotune.Case("edge_attention_fwd", "bf16"), row, rows=[16], warps=[8]) == [
        row,
        Launch(16, 8),
    ]


def test_what_fails_or_computes_something_else_is_left_out_with_the_reason() -> None:
    def run() -> tuple[torch.Tensor, ...]:
        rows = launch.launch_of("dropout", 80, "ieee").rows
        if rows == 64:
            raise RuntimeError("out of resource\nshared memory")
        return torch.ones(3), torch.full((2,), {8: 1.1, 32: float("nan")}.get(rows, 1.0))

    tried = [Launch(rows, 4) for rows in (16, 8, 32, 64, 128)]
    found, left_out = autotune.sound(autotune.Case("dropout", "ieee"), run, tried)
    assert found == [Launch(16, 4), Launch(128, 4)]
    assert left_out == {
        Launch(8, 4): "its outputs are 0.1 off",
        Launch(32, 4): "its outputs are nan off",
        Launch(64, 4): "RuntimeError: out of resource",
    }
    found, left_out = autotune.sound(autotune.Case("dropout", "ieee"), run, tried[3:])
    assert (found, list(left_out)) == ([], [Launch(64, 4)])


@pytest.mark.parametrize("columns", [64, 128, launch.WIDEST])
def test_a_measured_row_changes_its_own_launches_alone(columns: int) -> None:
    """Other precisions, architectures before it and fewer columns keep theirs; later architectures follow."""
    new = Row("edge_attention_fwd", 90, "bf16 fp16", columns, Launch(128, 16), "measured")
    table = autotune.with_row(launch.TABLE, new)
    others = [row.columns for row in launch.TABLE if row.kernel == new.kernel and "bf16" in row.precisions]
    of_narrower_rows = max((width for width in others if width < columns), default=0)
    for arch in (80, 89, 90, 100):
        for precision in ("bf16", "fp16", "tf32", "ieee"):
            for width in (16, 64, 128, 256):
                before, after = (
                    launch.find_row(rows, new.kernel, arch, precision, width) for rows in (launch.TABLE, table)
                )
                ours = arch >= 90 and precision in ("bf16", "fp16") and of_narrower_rows < width <= columns
                assert after.launch == (new.launch if ours else before.launch)


def test_rows_are_replaced_in_the_precisions_that_were_measured(tmp_path: Path) -> None:
    first = Row("dropout", 80, "bf16 fp16", launch.WIDEST, Launch(8, 4), "measured")
    table = autotune.with_row(launch.TABLE, first)
    second = first._replace(launch=Launch(32, 4))
    table = autotune.with_row(table, second)
    assert [row for row in table if row.kernel == "dropout"] == [
        launch.find_row(launch.TABLE, "dropout", 80, "ieee")._replace(precisions="tf32 ieee"),
        second,
    ]
    autotune.write_table(tmp_path / "table.csv", table)
    assert launch.read_table(tmp_path / "table.csv") == tuple(table)


def test_a_failed_write_keeps_the_old_table(tmp_path: Path) -> None:
    path = written(tmp_path, HEADER + GOOD)
    with pytest.raises(AttributeError):
        autotune.write_table(path, [*launch.TABLE, None])
    assert path.read_text() == HEADER + GOOD
    assert os.listdir(tmp_path) == [path.name]


def test_an_interrupted_run_keeps_the_old_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> Iterator[autotune.Result]:
        yield autotune.Result(autotune.Case("dropout", "bf16"), Launch(16, 4), {Launch(16, 4): timing(1.0)}, {})
        raise KeyboardInterrupt

    path = written(tmp_path, HEADER + GOOD)
    monkeypatch.setattr(sys, "argv", ["autotune", "--out", str(path)])
    monkeypatch.setattr(autotune, "machine_of", lambda _: None)
    monkeypatch.setattr(autotune, "tune_all", interrupted)
    assert autotune.main() == 130
    assert capsys.readouterr().err == "autotune: was interrupted; the table is as it was\n"
    assert path.read_text() == HEADER + GOOD


def test_a_row_that_cannot_run_stays_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = autotune.Result(autotune.Case("dropout", "bf16"), Launch(16, 4), {}, {Launch(16, 4): "no room"})
    path = tmp_path / "table.csv"
    monkeypatch.setattr(sys, "argv", ["autotune", "--out", str(path)])
    monkeypatch.setattr(autotune, "machine_of", lambda _: None)
    monkeypatch.setattr(autotune, "tune_all", lambda *_: [broken])
    assert autotune.main() == 1
    assert launch.read_table(path) == launch.TABLE
    assert "none" in capsys.readouterr().out


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stflow_fast.kernels.autotune", *arguments]
    hidden = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden |= {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)


def test_rehearsal(tmp_path: Path) -> None:
    out = tmp_path / "table.csv"
    kernels = ["dropout", "nearest", "edge_attention_fwd"]
    done = run("--rehearse", "--kernels", ",".join(kernels), "--precisions", "bf16", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "left out:" not in done.stderr
    new = [row for row in launch.read_table(out) if row not in launch.TABLE and "on Triton" in row.reason]
    assert sorted(row.kernel for row in new) == sorted(kernels)
    for row in new:
        assert row.arch == 80
        assert row.reason.startswith(("measured on Triton's interpreter: ", "confirmed on Triton's interpreter: "))
        assert " ms (" in row.reason
        assert f"10 spots, triton {autotune.importlib.metadata.version('triton')}, torch " in row.reason
        assert row.kernel in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "there is no CUDA device"),
        (("--rehearse",), "--out: is the installed table"),
        (("--rehearse", "--out", "/nowhere/table.csv"), "--out: /nowhere/table.csv cannot be written"),
    ],
)
def test_what_cannot_be_tuned_is_said_in_one_line(
    arguments: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = launch.TABLE_PATH.read_bytes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(autotune, "INTERPRETED", True)  # else a rehearsal begins anew, in place of this process
    monkeypatch.setattr(sys, "argv", ["autotune", *arguments])
    assert autotune.main() == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert complaint in said
    assert launch.TABLE_PATH.read_bytes() == before


def test_a_rehearsal_without_an_interpreter_that_works_is_refused_in_one_line(
    tmp_path: Path,
    pretend: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(triton="3.6.0", numpy="2.4.6")
    monkeypatch.setattr(autotune, "INTERPRETED", True)
    monkeypatch.setattr(sys, "argv", ["autotune", "--rehearse", "--out", str(tmp_path / "table.csv")])
    assert autotune.main() == 2
    reason = "Triton 3.6.0's interpreter fails with numpy 2.4.6: install numpy<2.4 or triton>=3.7"
    assert capsys.readouterr().err == f"autotune: --rehearse: {reason}\n"
    assert not (tmp_path / "table.csv").exists()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["autotune", "--kernels", "dropuot"])
    with pytest.raises(SystemExit) as ended:
        autotune.main()
    assert ended.value.code == 2
    assert "--kernels: must be of edge_attention_fwd" in capsys.readouterr().err

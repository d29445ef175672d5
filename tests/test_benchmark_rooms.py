"""The rooms of the benchmarks: who imports them, and what of them can be run by its name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as rooms

ROOT = Path(__file__).resolve().parents[1]


def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_list_names_all_that_can_be_run_and_imports_none_of_it() -> None:
    done = ran()
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[2:])
    files = [path for room in ("studies", "counts") for path in (ROOT / "benchmarks" / room).glob("*.py")]
    with_main = {path.stem for path in files if re.search(r"^def main\(", path.read_text(), re.MULTILINE)}
    assert {"published", "sources", "roofline"} < with_main
    assert set(listed) == with_main | {"gpu"}
    assert listed["published"] == "Is what we compute what the published code computes?"
    assert all(said.endswith((".", "?")) for said in listed.values())
    assert done.returncode == 0
    assert "torch" not in done.stderr


def test_a_name_that_is_not_there_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "publisehd", "--help"])
    assert rooms.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks: there is no 'publisehd'; choose from cohort, compare, ")


def test_what_is_run_gets_its_arguments_and_gives_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "published", "--code", str(tmp_path)])
    assert rooms.main() == 2
    assert capsys.readouterr().err.startswith(f"benchmarks published: {tmp_path}: holds no model/denoiser.py")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "published", "--help"])
    with pytest.raises(SystemExit) as stopped:
        rooms.main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks published [-h] --code FOLDER")


def test_only_the_command_line_imports_the_benchmarks() -> None:
    importing = re.compile(r"^\s*(from|import)\s+(\.+benchmarks|stflow_fast\.benchmarks|benchmarks)\b", re.MULTILINE)
    found = {path.name for path in (ROOT / "stflow_fast").rglob("*.py") if importing.search(path.read_text())}
    found |= {path.name for path in (ROOT / "kernels").rglob("*.py") if importing.search(path.read_text())}
    assert found == {"looking.py"}

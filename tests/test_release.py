"""What a release is made of: one version, what the packages hold, and a check that finds what is wrong with them."""

from __future__ import annotations

import importlib.util
import io
import re
import runpy
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from rich.console import Console

from stflow_fast import doctor
from stflow_fast._version import __version__

ROOT = Path(__file__).parents[1]
METADATA = """Metadata-Version: 2.4
Name: stflow-fast
Version: 0
Summary: words
Keywords: words
License: Apache-2.0
Project-URL: Paper, https://arxiv.org/abs/2506.05361
Classifier: Typing :: Typed
Requires-Python: >=3.10

# stflow-fast

[a page](https://example.org) and [a place](#below)
"""


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """Of ``setup``."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setuptools, "setup", lambda **given: found.update(given))
        patched.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_the_version_stands_in_one_place_and_the_others_agree(arguments: dict[str, Any]) -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", changes, re.MULTILINE)
    assert arguments["version"] == __version__ == released[0]
    assert changes.index("## [Unreleased]") < changes.index(f"## [{released[0]}]")
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_changes_are_of_the_known_kinds() -> None:
    kinds = set(re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_what_its_format_asks_for() -> None:
    told = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= told.keys()
    assert told["cff-version"] == "1.2.0"
    [paper] = told["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "arXiv:2506.05361" in {each["value"] for each in paper["identifiers"]}


def test_what_we_test_with_is_within_what_is_asked_for(arguments: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    wanted = [Requirement(each) for each in arguments["install_requires"] + arguments["extras_require"]["dev"]]
    for requirement in wanted:
        assert requirement.name in pinned, f"{requirement.name} is not in constraints.txt"
        assert pinned[requirement.name] in requirement.specifier


def test_the_description_has_no_link_that_only_the_repository_has(check: ModuleType, arguments: dict[str, Any]) -> None:
    text = arguments["long_description"]
    assert check.LINK.findall((ROOT / "README.md").read_text())
    assert check.LINK.findall(text) == []
    assert text.startswith("# stflow-fast\n")


def test_every_package_and_its_data_are_there(arguments: dict[str, Any]) -> None:
    places = {"": ".", "stflow_fast": "stflow_fast", **arguments["package_dir"]}
    for package in arguments["packages"]:
        home = next(name for name in sorted(places, reverse=True) if f"{package}.".startswith(f"{name}."))
        folder = ROOT / places[home] / package.removeprefix(home).replace(".", "/").lstrip("/")
        assert (folder / "__init__.py").is_file(), package
    for package, names in arguments["package_data"].items():
        assert all((ROOT / places[package] / name).is_file() for name in names)


def write_wheel(path: Path, check: ModuleType, leave_out: str = "", add: str = "", metadata: str = METADATA) -> Path:
    """One that holds what it should, but for what is said."""
    info = "stflow_fast-0.dist-info"
    licences = {f"{info}/licenses/{name}" for name in check.IN_METADATA}
    with zipfile.ZipFile(path, "w") as file:
        for name in {*check.IN_WHEEL, *licences, "stflow_fast/cli/program.py", add} - {"", leave_out}:
            file.writestr(name, "")
        file.writestr(f"{info}/METADATA", metadata)
    return path


def test_a_good_wheel_has_no_fault(tmp_path: Path, check: ModuleType) -> None:
    assert check.faults_of_wheel(write_wheel(tmp_path / "a.whl", check)) == []


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"leave_out": "stflow_fast/py.typed"}, "stflow_fast/py.typed: is missing"),
        ({"leave_out": "stflow_fast/kernels/launch_table.csv"}, "stflow_fast/kernels/launch_table.csv: is missing"),
        ({"leave_out": "stflow_fast-0.dist-info/licenses/LICENSE"}, "LICENSE: is missing"),
        ({"add": "stflow_fast/benchmarks/conftest.py"}, "stflow_fast/benchmarks/conftest.py: is a test"),
        ({"add": "stflow_fast/test_a.py"}, "stflow_fast/test_a.py: is a test"),
        ({"add": "tests/a.py"}, "tests/a.py: is outside of the package"),
        (
            {"add": "stflow_fast/benchmarks/results/a.jsonl"},
            "stflow_fast/benchmarks/results/a.jsonl: nothing needs it at run time",
        ),
        ({"metadata": METADATA.replace("Summary: words\n", "")}, "metadata: has no Summary"),
        ({"metadata": METADATA.replace("License: Apache-2.0\n", "")}, "metadata: names no licence"),
        (
            {"metadata": METADATA.replace("https://example.org", "docs/a.md")},
            "description: links to a file, ](docs/a.md)",
        ),
        ({"metadata": METADATA + '<img src="a.png">'}, 'description: links to a file, src="'),
        ({"metadata": METADATA.replace("# stflow-fast", "")}, "description: is not README.md"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_found(
    tmp_path: Path, check: ModuleType, told: dict[str, str], fault: str
) -> None:
    assert fault in check.faults_of_wheel(write_wheel(tmp_path / "a.whl", check, **told))


def test_what_is_wrong_with_a_source_distribution_is_found(tmp_path: Path, check: ModuleType) -> None:
    (tmp_path / "empty").touch()
    with tarfile.open(tmp_path / "a.tar.gz", "w") as file:
        for name in {*check.IN_SOURCE, "tests/test_a.py"} - {"NOTICE"}:
            file.add(tmp_path / "empty", f"stflow_fast-0/{name}")
    assert check.faults_of_sdist(tmp_path / "a.tar.gz") == ["NOTICE: is missing", "tests/test_a.py: is a test"]


def test_what_is_built_of_this_checkout_has_no_fault(
    tmp_path: Path, check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    monkeypatch.setattr(check, "OUT", tmp_path / "out")
    sdist, wheel = check.build(tmp_path / "source")
    assert check.faults_of_wheel(wheel) == []
    assert check.faults_of_sdist(sdist) == []
    with zipfile.ZipFile(wheel) as file:
        assert wheel.name == f"stflow_fast-{__version__}-py3-none-any.whl"
        assert "stflow_fast/kernels/edge_attention.py" in file.namelist()
        assert not [name for name in file.namelist() if name.startswith("kernels/")]


def test_doctor_names_the_extras_that_bring_what_is_missing(pretend: Callable[..., None]) -> None:
    pretend(spatialdata=None, transformers=None)
    console = Console(width=300, file=io.StringIO(), record=True)
    console.print(doctor.diagnose())
    said = console.export_text()
    assert "pip install 'stflow-fast[spatialdata]'" in said
    assert "pip install 'stflow-fast[embed]'" in said

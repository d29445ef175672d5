"""``make release-check``: what would be published, built, looked at, and used where nothing else is.

The source distribution is made of what git knows or would add, in a folder of its own, and the wheel of the source
distribution. The wheel is installed into an empty environment and used in an empty folder, as by somebody who has no
checkout. ``--borrow`` takes all libraries of the environment that runs this, for a quick look; the wheel is installed
all the same.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "release"

IN_WHEEL = {
    "stflow_fast/py.typed",
    "stflow_fast/model_card.md",
    "stflow_fast/kernels/launch_table.csv",
    "stflow_fast/kernels/__init__.py",
    "stflow_fast/benchmarks/command.py",
}
IN_METADATA = {"LICENSE", "NOTICE"}
IN_SOURCE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "NOTICE", "README.md", "constraints.txt", "pyproject.toml"}

FIELDS = ("Summary", "License", "License-Expression", "Requires-Python", "Project-URL", "Keywords", "Classifier")
LINK = re.compile(r"\]\((?!https?:|#)[^)]*\)|(?:src|href)=[\"'](?!https?:|#)")
"""Of a repository that a page elsewhere does not have."""

IMPORT_ALL = """
import importlib, pkgutil, stflow_fast
for module in pkgutil.walk_packages(stflow_fast.__path__, "stflow_fast."):
    if "__main__" in module.name or module.name.startswith("stflow_fast.benchmarks.studies"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name != "ray":  # of an extra
            raise
print(stflow_fast.__file__)
"""


def build(source: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel, in :data:`OUT`; ``source`` is an empty folder to build in."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(OUT), str(source)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        sys.exit(made.stdout + made.stderr)
    [sdist], [wheel] = OUT.glob("*.tar.gz"), OUT.glob("*.whl")
    return sdist, wheel


def faults_of_wheel(wheel: Path) -> list[str]:
    """What is wrong with it, a line each."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        told = email.message_from_bytes(file.read(metadata))
    info = metadata.removesuffix("METADATA")
    found = [f"{name}: is missing" for name in sorted(IN_WHEEL - names)]
    found += [f"{name}: is missing" for name in IN_METADATA if f"{info}licenses/{name}" not in names]
    for name in sorted(name for name in names if not name.startswith(info)):
        path = Path(name)
        if path.parts[0] != "stflow_fast":
            found.append(f"{name}: is outside of the package")
        if path.stem == "conftest" or path.stem.startswith("test_") or "tests" in path.parts:
            found.append(f"{name}: is a test")
        if path.suffix != ".py" and name not in IN_WHEEL:
            found.append(f"{name}: nothing needs it at run time")
    needed = [field for field in FIELDS if not field.startswith("License")]
    found += [f"metadata: has no {field}" for field in needed if not told.get(field)]
    if not (told.get("License") or told.get("License-Expression")):
        found.append("metadata: names no licence")
    text = told.get_payload() or told["Description"] or ""
    found += [f"description: links to a file, {link}" for link in LINK.findall(text)]
    if "# stflow-fast" not in text:
        found.append("description: is not README.md")
    return found


def faults_of_sdist(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    found = [f"{name}: is missing" for name in sorted(IN_SOURCE - names)]
    return found + [f"{name}: is a test" for name in sorted(names) if "tests" in Path(name).parts]


def install(wheel: Path, folder: Path, borrow: bool) -> Path:
    """The folder of programs of an environment that has the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = ROOT / "constraints.txt"
    if borrow:
        libraries = sysconfig.get_path("purelib")
        [site] = folder.glob("lib/python*/site-packages")
        # .pth files that lie there are not read: no editable install.
        (site / "borrowed.pth").write_text(f"{libraries}\n")
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    else:  # as `make setup` does: torch first, so that no other one is pulled in
        [torch] = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "-c", str(constraints), str(wheel)], check=True)
    return python.parent


def use(programs: Path, folder: Path) -> list[str]:
    """Run what a new user runs, in an empty folder; what is wrong, a line each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = []

    def run(*command: str, code: int = 0) -> str:
        print("$", Path(command[0]).name, *(word if "\n" not in word else "..." for word in command[1:]), flush=True)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        print((done.stdout + done.stderr)[-3000:], flush=True)
        if done.returncode != code or "Traceback" in done.stderr:
            said = " ".join(command[:3]).splitlines()[0]
            found.append(f"{said}: ended with {done.returncode}, not {code}")
        return done.stdout if code == 0 else done.stderr

    program, python = str(programs / "stflow-fast"), str(programs / "python")
    home = run(python, "-c", IMPORT_ALL).strip()
    if not Path(home).is_relative_to(programs.parent):
        found.append(f"stflow_fast: is imported from {home}, not from the wheel")
    version = re.search(r'__version__ = "(.+)"', (ROOT / "stflow_fast" / "_version.py").read_text())
    if version is None or run(program, "--version").strip() != version[1]:
        found.append("--version: is not that of _version.py")
    run(program, "doctor")
    run(program, "demo", "--out", "demo")
    if not (folder / "demo" / "index.html").is_file():
        found.append("demo: wrote no index.html")
    run(program, "benchmark", "--rehearse", "--out", "rehearsed")
    refused = run(program, "benchmark", "--report", code=2)
    if len(refused.strip().splitlines()) != 1:
        found.append("benchmark --report: is no error of one line where nothing was measured")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--borrow", action="store_true", help="take the libraries of this environment")
    parser.add_argument("--build-only", action="store_true", help="build and look, install nothing")
    options = parser.parse_args()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        sdist, wheel = build(Path(folder))
    print(
        f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size:,} bytes; {sdist.name}: {sdist.stat().st_size:,}", flush=True
    )
    found = [f"{wheel.name}: {fault}" for fault in faults_of_wheel(wheel)]
    found += [f"{sdist.name}: {fault}" for fault in faults_of_sdist(sdist)]
    if not options.build_only:
        programs = install(wheel, OUT / "environment", options.borrow)
        with tempfile.TemporaryDirectory() as folder:
            found += use(programs, Path(folder))
    print("\n".join(found) or "release-check: all is well")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

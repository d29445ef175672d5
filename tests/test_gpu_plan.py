"""The plan of what is run on a GPU that is at hand for some minutes, and the kernels compiled for it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stflow_fast.kernels import modules
from triton.runtime import cache as triton_cache

from benchmarks.gpu import cached, kernels, variants
from benchmarks.gpu.plan import ALL_FIGURES, TEST_FILES, TESTS, plan
from benchmarks.suite.jobs import providers_of

from .gpu_plan_cases import FIRST, ROOT, SAMPLE, python

KERNELS = {name for module in modules() for name in vars(module) if name.endswith("_kernel")}


def test_the_plan_names_what_there_is_and_all_gpu_tests(tmp_path: Path) -> None:
    places = []
    for _, figures in ALL_FIGURES.values():
        known = {name for workload in figures.workload.split(",") for name in providers_of(workload)}
        assert set(figures.providers.split(",")) <= known
        place = (figures.workload, figures.spots, figures.dtype, figures.providers)
        places += itertools.product(*(names.split(",") for names in place))
    assert len(set(places)) == len(places)  # the later would take the place of the earlier
    sections = plan(tmp_path, rehearse=False)
    names = [section.name for section in sections]
    assert len(set(names)) == len(names)
    assert names[:4] == [FIRST, "edge kernels in bf16", "other kernels in bf16", SAMPLE]
    marked = {
        path.name for path in (ROOT / "tests").glob("test_*.py") if re.search(r"mark\.gpu$", path.read_text(), re.M)
    }
    assert {Path(name).name for name in TEST_FILES} == marked


def test_what_runs_on_the_gpus_machine_imports_nothing_that_it_lacks() -> None:
    """Readers of files are not needed there, and tests of them may not stop those of the kernels."""
    modules = [name.removesuffix(".py").replace("/", ".") for name in TEST_FILES]
    without = "import sys; sys.modules.update(dict.fromkeys(['anndata', 'zarr']))"
    code = f"{without}; import {', '.join(modules)}, benchmarks.gpu.variants, stflow_fast.cli"
    done = subprocess.run(python(code), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def in_a_process(*arguments: str, cache: Path) -> dict[str, Any]:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.variants", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_one_process_compiles_without_a_gpu_another_finds(tmp_path: Path) -> None:
    """With the key of an unpacked wheel, which is this Triton's own."""
    site = Path(triton_cache.__file__).parents[2]
    made = in_a_process("--share", "3/120", "--wheel", str(site), cache=tmp_path)
    found = in_a_process("--share", "3/120", cache=tmp_path)
    assert made["share"] == made["compiled"] >= 2
    assert found == {**made, "compiled": 0}
    assert found["key"] == variants.digest(triton_cache.triton_key())
    assert found["variants"] >= 60  # precisions, dropout, kept messages, autotune's tiles
    assert set(found["kernels"]) == KERNELS


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A packed cache of one file, for this Triton and this code."""
    for name, path in {"CARRIED": "carried", "ARCHIVE": "carried/a.tar.gz", "MANIFEST": "carried/m.json"}.items():
        monkeypatch.setattr(cached, name, tmp_path / path)
    monkeypatch.setattr(cached, "CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "x").mkdir(parents=True)
    (tmp_path / "cache" / "x" / "a.cubin").write_text("code")
    key = variants.digest(triton_cache.triton_key())
    return {"key": key, "triton": "3.6.0"}


@pytest.mark.parametrize(("changed", "said"), [({}, "is that"), ({"key": "another"}, "is not that")])
def test_kernels_that_travelled_are_unpacked_and_what_is_missing_compiled(
    carried: dict[str, Any], changed: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.pack(carried | changed)
    (cached.CACHE / "x" / "a.cubin").unlink()
    asked = []

    def compile_variants(*arguments: int) -> dict[str, int]:
        asked.append(arguments)
        assert (cached.CACHE / "x" / "a.cubin").read_text() == "code"
        return {"compiled": 2, "variants": 64}

    monkeypatch.setattr(kernels, "compile_variants", compile_variants)
    found = kernels.ready(90)
    assert f"{said} of the cache: 62 of 64 kernels found, 2 compiled by {os.cpu_count()} processes" in found
    assert asked == [(90, os.cpu_count())]


def test_where_nothing_travelled_kernels_are_compiled(carried: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "compile_variants", lambda arch, processes: {"compiled": 64, "variants": 64})
    assert kernels.ready(90).startswith("no compiled kernels travelled: 0 of 64 kernels found, 64 compiled by")


def test_the_parts_of_the_tests_are_all_of_them_once() -> None:
    """The last part is of what no other word names; so no test may have two of them."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", *TEST_FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    words = ("published_code", "bf16", "fp16", "tf32", "ieee")
    found = [[word for word in words if word in name] for name in names]
    assert max(map(len, found)) == 1
    assert {word for each in found for word in each} == set(words)
    *parts, last = TESTS.values()
    assert [part.partition(" ")[0] for part in parts] == list(words)
    assert last == f"not ({' or '.join(words)})"


def test_where_gpu_tests_must_run_their_absence_is_a_failure() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "tests/test_kernel_gpu.py"]
    environment = {**os.environ, "STFLOW_TEST_GPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stdout + done.stderr

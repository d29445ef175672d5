"""The page of what each Triton makes of the kernels, from results that are made up: nothing is fetched or compiled."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stflow_fast.kernels import aot, edge_shape, versions
from stflow_fast.kernels.conventions import Settings, Sizes
from stflow_fast.kernels.launch import Launch

from benchmarks.counts import triton_versions

PTXAS = """ptxas: NVIDIA (R) Ptx optimizing assembler
Copyright (c) 2005-2026 NVIDIA Corporation
Cuda compilation tools, release 13.4, V13.4.59
Build cuda_13.4.r13.4/compiler.38657139_0
"""
ROW = {"tile": 64, "warps": 4, "rows": 64, "registers": 230, "spill_bytes": 8, "shared_bytes": 16384}
LINE = {"triton": "3.8.0", "ptxas": "12.9.86", "arch": 90, "variant": "forward", **ROW}
LINE |= {
    "instructions": 900,
    "per_row": 2000.0,
    "wgmma": 0,
    "wgmma_from_registers": 0,
    "mma": 4,
    "barriers": 3,
    "faults": [],
}
NEWER = {**LINE, "triton": "3.9.0", "ptxas": "13.4.59"}


def rows_of(page: str) -> list[list[str]]:
    """Cells of every line of a Markdown table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]


def row_of(page: str, first: str) -> list[str]:
    return next(row for row in rows_of(page) if row[0] == first)


def test_the_version_of_an_assembler_is_read_from_what_it_says() -> None:
    assert triton_versions.cuda_of(PTXAS) == "13.4.59"


@pytest.mark.parametrize(
    ("weighted", "figures"),
    [
        ({"HGMMA": 2, "HGMMA.R": 6, "HMMA": 40, "BAR": 16, "MOV": 36}, (200.0, 8, 6, 40, 16)),
        (None, (None, 2, 1, 9, 4)),  # loops that are not those of the source: each instruction once
    ],
)
def test_figures_of_a_row(weighted: dict[str, int] | None, figures: tuple[Any, ...]) -> None:
    once = {"HGMMA": 1, "HGMMA.R": 1, "HMMA": 9, "BAR": 4}
    line = triton_versions.figures_of({**ROW, "instructions": once, "weighted_instructions": weighted})
    assert (line["registers"], line["spill_bytes"], line["shared_bytes"], line["instructions"]) == (230, 8, 16384, 15)
    names = ("per_row", "wgmma", "wgmma_from_registers", "mma", "barriers")
    assert tuple(line[name] for name in names) == figures


def test_a_variant_has_a_cell_for_each_version() -> None:
    wgmma = {**NEWER, "per_row": 1500.0, "spill_bytes": 0, "wgmma_from_registers": 2}
    unrolled = {**LINE, "variant": "search", "per_row": None}
    page = triton_versions.tables([LINE, unrolled, wgmma, {**unrolled, "triton": "3.9.0"}])
    assert row_of(page, "`forward`")[1:] == ["64x4", "230 / 8 / 16,384 / 2,000", "230 / 0 / 16,384 / 1,500 (R)"]
    assert row_of(page, "`search`")[1:] == ["64x4", *2 * ["230 / 8 / 16,384 / (900)"]]
    assert row_of(page, "3.8.0") == ["3.8.0", "12.9.86", "2", "2", "16", "1.000", "1.000"]
    assert row_of(page, "3.9.0") == ["3.9.0", "13.4.59", "2", "1", "8", "0.750", "1.000"]
    assert "Nothing failed to compile." in page


@pytest.mark.parametrize("failing", ["3.8.0", "3.9.0"])
def test_a_variant_that_fails_is_in_the_table_and_has_a_reason(failing: str) -> None:
    lines = [LINE, {**LINE, "variant": "backward"}, NEWER, {**NEWER, "variant": "backward"}]
    failed = {"triton": failing, "variant": "backward", "error": "CompilationError: no layout"}
    lines = [failed if (line["triton"], line["variant"]) == (failing, "backward") else line for line in lines]
    page = triton_versions.tables(lines)
    assert row_of(page, "`backward`").count("failed") == 1
    assert row_of(page, "`backward`")[2:].index("failed") == ["3.8.0", "3.9.0"].index(failing)
    assert row_of(page, failing)[2] == "1"
    assert f"* {failing}, backward: CompilationError: no layout" in page


def test_what_fails_everywhere_is_listed_all_the_same() -> None:
    failed = [{"triton": version, "variant": "backward", "error": "E"} for version in ("3.8.0", "3.9.0")]
    page = triton_versions.tables([LINE, *failed])
    assert "* 3.8.0, backward: E\n* 3.9.0, backward: E" in page
    assert row_of(page, "3.9.0")[1:] == ["", "0", "0", "0", "", ""]


def test_batches_stand_beside_the_products_without_them() -> None:
    pair = [{**LINE, "batched": True}, {**LINE, "batched": False, "per_row": 1900.0, "mma": 0, "wgmma": 7}]
    alone = {**LINE, "batched": True, "variant": "backward"}
    failed = {"triton": "3.8.0", "variant": "backward", "batched": False, "error": "E"}
    page = triton_versions.tables([LINE, *pair, alone, failed])
    cells = ["230 / 8 / 16,384 / 2,000", "230 / 8 / 16,384 / 1,900", "4 / 0 / 3", "0 / 7 / 3"]
    assert ["`forward`", "64x4", *cells] in rows_of(page)
    assert "* 3.8.0, backward not in batches: E" in page
    assert "`backward`" not in page


@pytest.mark.parametrize("written", [[], [LINE]])
def test_a_process_that_ends_badly_leaves_what_it_wrote_and_a_line(written: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in written)
    *lines, last = triton_versions.read(text, "3.8.0", -6, "LLVM ERROR\nabort\n")
    assert lines == written
    after = " after forward" if written else ""
    assert last == {"triton": "3.8.0", "error": f"the process ended with -6{after}: abort"}
    assert triton_versions.read(text, "3.8.0", 0, "a warning") == written


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.CalledProcessError(1, ["pip", "download"]), "pip ended with 1"),
        (OSError("No space left on device"), "No space left on device"),
    ],
)
def test_a_version_without_a_wheel_is_a_line(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(version: str, python: str) -> Path:
        raise error

    monkeypatch.setattr(triton_versions, "fetch", fetch)
    lines = triton_versions.lines_of("0.0.1", 90, batches=False)
    assert lines == [{"triton": "0.0.1", "error": f"no wheel: {reason}"}]
    assert f"* 0.0.1, the version: no wheel: {reason}" in triton_versions.tables(lines)


def test_what_aot_calls_a_fault_is_listed() -> None:
    page = triton_versions.tables([{**LINE, "faults": ["spills 24 bytes"]}, NEWER])
    assert "* 3.8.0, forward: spills 24 bytes" in page
    assert "no fault" in triton_versions.tables([LINE, NEWER])


def test_pairs_are_compiled_with_batches_and_without() -> None:
    before = edge_shape._edge_shape
    seen = [
        (extra["batched"], variant.name, variant.launch, variant.constants["S"].batched)
        for extra, variant in triton_versions.batch_variants(90)
    ]
    assert edge_shape._edge_shape is before
    with_batches, without = ({each[1:3] for each in seen if each[0] is batched} for batched in (True, False))
    assert with_batches == without
    assert {launch.rows for _, launch in with_batches} == {64, 128}
    assert all(rows == (launch.rows if batched else 0) for batched, _, launch, rows in seen)


SAFE = {"3.6.0": False, "3.8.0": False, "3.9.0": True, "3.9.0+git1234": True, "3.10.1": True, "4.0": True}
SAFE |= {None: False, "unknown": False}


@pytest.mark.parametrize("version", SAFE)
def test_wgmma_may_read_from_registers_by_the_version(version: str | None, pretend: Callable[..., None]) -> None:
    pretend(triton=version)
    assert versions.wgmma_from_registers_is_safe() == SAFE[version]
    row = {"spill_bytes": 0, "shared_bytes": 0, "estimated_shared_bytes": 0, "arch": 90, "default": True}
    row |= {"measured": False, "instructions": {"HGMMA.R": 4}}
    assert bool(aot.faults(row)) != SAFE[version]


@pytest.fixture
def afresh() -> Iterator[None]:
    """No shape of another version is left behind."""
    yield
    edge_shape._edge_shape.cache_clear()


@pytest.mark.parametrize(
    ("launch", "old", "new"),
    [
        (Launch(32, 2), 0, 0),
        (Launch(64, 2), 64, 64),
        (Launch(64, 4), 64, 0),
        (Launch(64, 8), 64, 64),
        (Launch(128, 4), 128, 128),
        (Launch(128, 8), 128, 128),
    ],
)
def test_products_are_taken_in_batches_by_the_version(
    launch: Launch, old: int, new: int, pretend: Callable[..., None], afresh: None
) -> None:
    for version, batched in (("3.8.0", old), ("3.9.0", new)):
        pretend(triton=version)
        edge_shape._edge_shape.cache_clear()
        for kernel in edge_shape.WHOLE_SPOTS:
            for arch, precision in ((90, "bf16"), (90, "tf32"), (90, "ieee"), (80, "bf16"), (100, "bf16")):
                settings = Settings(4, "swiglu", "swiglu")
                shape, _ = edge_shape.edge_shape(kernel, arch, precision, Sizes(8, 64, 512, 128), settings, launch)
                assert shape.batched == (batched if arch == 90 and precision != "ieee" else 0)


def test_the_rows_that_more_neighbours_need_count(pretend: Callable[..., None], afresh: None) -> None:
    """In tf32 the table's 32 edges and 2 warps become 64 and 4."""
    for version, batched in (("3.8.0", 64), ("3.9.0", 0)):
        pretend(triton=version)
        edge_shape._edge_shape.cache_clear()
        sizes, settings = Sizes(40, 64, 512, 128), Settings(4, "swiglu", "swiglu")
        shape, launch = edge_shape.edge_shape("edge_attention_fwd", 90, "tf32", sizes, settings)
        assert (shape.batched, launch.rows, launch.warps) == (batched, 64, 4)

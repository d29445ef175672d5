"""Single operations in the benchmarks: checked against float64, and against the floor of their counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.suite import jobs
from benchmarks.suite.cases import Case, Plan
from benchmarks.suite.operations import OPERATIONS, OperationJob, operation_providers, random_rows
from stflow_fast import DenoiserConfig, SpotGraph, cli, ops
from stflow_fast.ops import use_backend

NETWORK = DenoiserConfig(n_genes=5, feature_dim=7, hidden_dim=32, pairwise_hidden_dim=16, n_layers=1, n_heads=2)


def plan_of(device: str = "cpu") -> Plan:
    return Plan(torch.device(device), 2**32, network=NETWORK, check_spots=40)


def case_of(workload: str, dtype: str = "float32") -> Case:
    return Case(workload, "visium", 40, 4, 5, dtype)


@pytest.fixture
def graphs_by_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any backend: interpreted, the kernel's search takes most of the time, and tests of its own."""
    build = ops.build_graph

    def by_tree(*arguments: Any) -> SpotGraph:
        with use_backend("reference"):
            return build(*arguments)

    monkeypatch.setattr(ops, "build_graph", by_tree)


@pytest.mark.usefixtures("graphs_by_tree")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("workload", OPERATIONS)
def test_every_provider_of_an_operation_computes_it(workload: str, dtype: str) -> None:
    for name in operation_providers(workload):
        verdict = jobs.check(plan_of(), case_of(workload, dtype), name)
        assert verdict.check == "green", (name, verdict)
        assert verdict.relative_error > 0


@pytest.mark.parametrize(
    ("workload", "wrong"),
    [
        ("edge_forward", lambda out: out * 1.05),
        ("edge_messages", lambda out: out + 0.1),
        ("gated_mlp", lambda out: torch.cat([out[:-1], out[-1:] + 9])),
        ("dropout", lambda out: torch.full_like(out, torch.nan)),
    ],
)
def test_a_wrong_one_is_red(workload: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"edge_forward": "edge_attention", "edge_messages": "make_messages", "dropout": "apply_dropout"}
    name = name.get(workload, workload)
    right, calls = getattr(ops, name), []

    def first_call_is_wrong(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        out = right(*arguments)
        return wrong(out) if len(calls) == 1 else out

    monkeypatch.setattr(ops, name, first_call_is_wrong)
    verdict = jobs.check(plan_of(), case_of(workload), "reference")
    assert verdict.check == "red"


def test_floors_of_the_notes() -> None:
    """Milliseconds of a million spots by counts and an H100's rates (benchmarks/results/roofline.md)."""
    plan = Plan(torch.device("cuda"), 2**40)

    def floor_of(name: str, dtype: str) -> float:
        case = Case("edge_forward", "visium", 1_000_000, 8, 50, dtype)
        least, _ = OperationJob(plan, case, name).floor(1_000_000, lambda: pytest.fail("rates are an H100's"))
        return least

    floors = [floor_of("triton", dtype) for dtype in ("bf16", "tf32", "float32")]
    assert floors == pytest.approx([1.86, 3.72, 7.83], rel=0.01)  # L2, L2, float32 arithmetic
    assert floor_of("triton_kept_edges", "bf16") == pytest.approx(1.86, rel=0.01)  # it gathers as much


def test_on_a_cpu_there_is_no_floor_of_a_kernel() -> None:
    job = OperationJob(plan_of(), case_of("edge_forward"), "reference")
    assert job.floor(40, lambda: pytest.fail("not asked")) is None


def test_random_rows_are_of_their_seed_and_repeat_beyond_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suite.operations.REPEATED", 8)
    rows = random_rows(20, 3, seed=1)
    assert rows.shape == (20, 3)
    assert torch.equal(rows[:8], rows[8:16])
    assert torch.equal(rows[16:], rows[:4])
    assert not torch.equal(rows, random_rows(20, 3, seed=2))
    assert (rows != 0).all()


@pytest.mark.usefixtures("graphs_by_tree")
def test_a_rehearsal_is_of_one_tiny_slide(tmp_path: Path) -> None:
    options = ["--workload", "edge_forward,sample", "--spots", "1e4,1e6", "--dtype", "bf16,tf32", "--device", "cpu"]
    providers = ["--providers", "triton_kept_edges,flex_attention,reference"]
    command = ["benchmark", "--rehearse", *options, *providers, "--no-pictures", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    found = {(line["workload"], line["provider"], line["dtype"], line["spots"]) for line in lines}
    assert len(lines) == len(found) == 2 * 2 * 2  # FlexAttention would compile for every size
    assert {spots for *_, spots in found} == {24}
    assert all(line["median_ms"] > 0 and line["check"] == "green" for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["rehearsal.jsonl"]

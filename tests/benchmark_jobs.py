"""What tests of the benchmark suite share: small plans, a job that tells its calls, a driver with made-up answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stflow_fast.benchmarks.suite.cases import Case, Job, Plan
from stflow_fast.benchmarks.suite.run import Suite

from stflow_fast import DenoiserConfig

NETWORK = DenoiserConfig(n_genes=5, feature_dim=7, hidden_dim=32, pairwise_hidden_dim=16, n_layers=1, n_heads=2)
CASE = Case("sample", "visium", 40, 4, 5, "float32")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")


def small_plan(**settings: Any) -> Plan:
    usual = {"memory_budget": 2**32, "rounds": 2, "network": NETWORK, "check_spots": 60}
    return Plan(torch.device("cpu"), **(usual | settings))


def lines_of(plan: Plan, cases: list[Case], names: tuple[str, ...]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    Suite(plan, lines.append, lambda what: None).run(cases, dict.fromkeys(("graph", "sample", "train_step"), names))
    return lines


class Recorded(Job):
    arithmetic, judged = "float32", False

    def __init__(self, name: str, said: list[Any], fails: Exception | None = None) -> None:
        self.name, self.said, self.fails = name, said, fails

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        return None

    def load(self, spots: int, layout: str, seed: int = 0) -> None:
        pass

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        pass

    def call(self, turn: int) -> None:
        self.said.append((self.name, turn))
        if self.fails and turn == 1:
            raise self.fails

    def result(self) -> torch.Tensor:
        raise NotImplementedError


class Driver:
    """Of a device whose memory in use is what a test says."""

    used = 5

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pynvml = pytest.importorskip("pynvml")
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self._answer)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-ab"))

    def _answer(self, handle: str) -> SimpleNamespace:
        assert handle == "GPU-12-ab"
        return SimpleNamespace(used=self.used)

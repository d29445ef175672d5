"""Every benchmark runs with the same number of threads, and says in the JSON how busy the machine was."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from .suite.workload import THREADS


@pytest.fixture(autouse=True)
def _threads_and_load(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    if "benchmark" in request.fixturenames:
        request.getfixturevalue("benchmark").extra_info.update(threads=THREADS, load_before=os.getloadavg()[0])
    yield
    torch.set_num_threads(before)

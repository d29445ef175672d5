"""The sanitizer finds faults that are planted. What it says of our kernels takes minutes: `make sanitize`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stflow_fast.kernels.versions import installed, older


def test_planted_faults_are_found() -> None:
    if importlib.util.find_spec("ttsem") is None:
        pytest.skip("ttsem is not installed (pip install --no-deps --ignore-requires-python ttsem)")
    if sys.version_info < (3, 11) or older(installed("triton"), "3.7"):
        pytest.skip("ttsem needs Python 3.11 and Triton 3.7 or later")
    session = {"PYTEST_PLUGINS": "tests.sanitizer.session", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sanitizer/test_planted.py"]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, cwd=root, env=os.environ | session, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr

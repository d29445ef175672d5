"""The project's folder, sections of the plan, and a process of Python for them."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST, SAMPLE = "kernels compiled", "sample of 10,000 spots in bf16"


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code

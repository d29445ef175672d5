"""Where results lie, and tables in Markdown."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])

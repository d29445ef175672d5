"""Lines read, and what a person sees of them: tables, pictures, pages."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""Where pages of results lie."""

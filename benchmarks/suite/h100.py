"""What an H100 does in a second at best, and how long counted work therefore takes it at least."""

from __future__ import annotations

MULTIPROCESSORS, CLOCK = 132, 1.755e9
RATES = {
    "special functions": 16 * MULTIPROCESSORS * CLOCK,
    "gathered from L2": 5.5e12,
    "streamed from memory": 3.35e12,
}
MATRIX_RATES = {"bf16": 989e12, "tf32": 495e12, "ieee": 67e12}
ISSUED = 128 * MULTIPROCESSORS * CLOCK
"""Instructions of threads a second: four warps a clock and multiprocessor."""

SPECIAL_FUNCTIONS = {"bf16": 1, "tf32": 1, "ieee": 2}
"""Per gate: tanh.approx, or ex2 and rcp."""


def unit_times(work: dict[str, float], precision: str, rows: int) -> dict[str, float]:
    """Milliseconds that each unit of an H100 needs for rows (edges, or edges and heads) of counted work."""
    return {
        "matrix products": 1e3 * rows * work["matrix_flops"] / MATRIX_RATES[precision],
        "special functions": 1e3 * rows * work["gates"] * SPECIAL_FUNCTIONS[precision] / RATES["special functions"],
        "gathered from L2": 1e3 * rows * work["bytes_gathered"] / RATES["gathered from L2"],
        "streamed from memory": 1e3 * rows * work["bytes_streamed"] / RATES["streamed from memory"],
    }

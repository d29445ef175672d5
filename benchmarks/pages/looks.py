"""How a reader meets what was measured: names and colours of providers, times and sizes with their units."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..suite.providers import class_of

OTHER_FUNCTION = "†"


class Look(NamedTuple):
    name: str
    color: str
    marker: str
    stroke: str = "-"
    """Other than a full line for a variant of what stands above it: where both are equal, both are seen."""


LOOKS = {
    "eager_stflow": Look("published algorithm", "#b87400", "o"),
    "message_passing": Look("published network, edge list", "#5f6b6d", "P", "--"),
    "dense_attention": Look("published network, all spots", "#d55e00", "s"),
    "dense_softmax": Look("dot products, dense softmax", "#cc79a7", "^"),
    "flash_attention": Look("dot products, flash attention", "#8b3fa0", "v"),
    "flex_attention": Look("dot products, FlexAttention", "#c9a400", "D"),
    "dense_cdist": Look("all distances", "#b87400", "h"),
    "scipy_kdtree": Look("stflow-fast, k-d tree", "#56b4e9", "p"),
    "reference": Look("stflow-fast, plain torch", "#0072b2", "o"),
    "reference_kept_edges": Look("stflow-fast, plain torch, edges kept", "#5a4fcf", "^", "--"),
    "reference_compiled": Look("stflow-fast, torch.compile", "#003b5c", "s", "--"),
    "triton": Look("stflow-fast, Triton", "#009e73", "D"),
    "triton_kept_edges": Look("stflow-fast, Triton, edges kept", "#c2185b", "^", "--"),
    "triton_graph": Look("stflow-fast, Triton, CUDA graph", "#004d3a", "v", ":"),
}
"""How a reader meets the providers: one name, colour and marker everywhere."""


def look_of(provider: str) -> Look:
    return LOOKS.get(provider, Look(provider, "black", "*"))


def computes_another_function(provider: str) -> bool:
    found = class_of(provider)
    return found is not None and not found.same_function


def named(provider: str) -> str:
    return look_of(provider).name + (f" {OTHER_FUNCTION}" if computes_another_function(provider) else "")


def counted(number: int, what: str) -> str:
    """As of threads: "1 thread", "2 threads"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def seconds(milliseconds: float) -> str:
    unit, factor = unit_of(milliseconds)
    return f"{digits(milliseconds / factor)} {unit}"


def unit_of(milliseconds: float) -> tuple[str, float]:
    """Of a time, and that many milliseconds."""
    return ("s", 1e3) if milliseconds >= 1e3 else ("ms", 1.0) if milliseconds >= 1 else ("us", 1e-3)


def size(n_bytes: float) -> str:
    units = (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6))
    unit, factor = next(((unit, factor) for unit, factor in units if n_bytes >= factor), units[-1])
    return f"{digits(n_bytes / factor)} {unit}"


def digits(value: float) -> str:
    """Three of them, without an exponent."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"

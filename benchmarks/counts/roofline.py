"""What each kernel can be at best on an H100, and how far the compiler's code is from it.

python -m stflow_fast.kernels.aot --arch 80,90 --json benchmarks/results/aot.jsonl
python -m benchmarks roofline

reads the rows of the first command and writes the tables of benchmarks/results/roofline.md, between its two marks; the
text around them is written by hand. Nothing here was timed: times are counts over rates.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from stflow_fast.markdown import table

from ..pages import RESULTS
from ..suite.h100 import ISSUED, unit_times
from ..suite.measure import commit

MARK = "<!-- tables by python -m benchmarks roofline -->"

SPOTS, EDGES = 1_000_000, 8_000_000
"""One layer and flow step of a slide with eight neighbours a spot."""

# Instructions of a thread that a SwiGLU gate cannot do without, once matrix products have made its two inputs.
MESSAGE_GATE = 8  # silu(a) b: 4; sum, centre, square, add to the frames' mean
LOGIT_GATE = 10  # two bf16 to float32; silu(a) b: 4; sum, centre, square, times the weight
LOGIT_AGAIN = 7  # without the sum, the square and the weight: what they come to is known
LOGIT_BACKWARD = 12  # gradient through the LayerNorm: 2; sigmoid again: 3; gradients of a and b: 7
MESSAGE_BACKWARD = 23  # the gate again without its mean: 7; through the LayerNorm: 6; sigmoid, a and b: 10
MINIMUM: dict[str, dict[str, float]] = {
    "edge_attention_fwd_kernel": {"message": MESSAGE_GATE, "logit": LOGIT_GATE},
    "edge_attention_bwd_query_kernel": {
        "message": MESSAGE_GATE + MESSAGE_BACKWARD,
        "logit": LOGIT_GATE + LOGIT_BACKWARD,
    },
    "edge_attention_bwd_key_kernel": {"message": 0, "logit": (LOGIT_AGAIN + LOGIT_BACKWARD) / 4},  # a row is one head's
    "edge_messages_kernel": {"message": MESSAGE_GATE, "logit": 0},
}
GATES = 256
"""Of the messages of an edge (4 frames x 64), and of its logits (4 heads x 64)."""


def n_rows(row: dict[str, Any]) -> int:
    """What a kernel treats of the slide: edges, of the key-owned backward for each head, or spots."""
    if row["kernel"] not in MINIMUM:
        return SPOTS
    return EDGES * (4 if "bwd_key" in row["kernel"] else 1)


def floors(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each unit, and of handing instructions out, where those that it takes at least are known."""
    times = unit_times(row["work_per_row"], row["variant"].split()[1], n_rows(row))
    at_least = 1e3 * n_rows(row) * minimal(row) / ISSUED if row["kernel"] in MINIMUM else math.nan
    return {**times, "issue, at least": at_least}


def minimal(row: dict[str, Any]) -> float:
    """Instructions per row that the gates cannot do without."""
    least = MINIMUM[row["kernel"]]
    return GATES * ((0 if row["variant"].endswith("kept") else least["message"]) + least["logit"])


def emitted(row: dict[str, Any]) -> float:
    """Instructions of threads per row; NaN where the compiler's loops are not those of the source."""
    weighted = row["weighted_instructions"]
    return 32 * row["warps"] * sum(weighted.values()) / row["rows"] if weighted else math.nan


def floor_table(rows: list[dict[str, Any]]) -> str:
    units = list(floors(rows[0]))
    body = []
    for row in rows:
        times = floors(row)
        bound = max((unit for unit in units if not math.isnan(times[unit])), key=times.__getitem__)
        issue = 1e3 * n_rows(row) * emitted(row) / ISSUED
        cells = ["" if math.isnan(times[unit]) else f"{times[unit]:.2f}" for unit in units]
        compiled = ["unrolled", ""] if math.isnan(issue) else [f"{issue:.2f}", f"{issue / times[bound]:.1f}"]
        body.append([f"`{row['variant']}`", *cells, bound, *compiled])
    return table(["variant, ms", *units, "bound by", "issue, as compiled", "of the floor"], body)


def code_table(rows: list[dict[str, Any]]) -> str:
    kinds = ("HGMMA", "HMMA", "FFMA", "MUFU", "SHFL", "BAR", "LDG.128", "LDG.64", "LDG.32", "LDS", "STS")
    body = []
    for row in rows:
        counts = row["instructions"]
        cells = [
            str(sum(n for name, n in counts.items() if name == kind or name.split(".")[0] == kind)) for kind in kinds
        ]
        per_row = f"{emitted(row):,.0f}" if row["weighted_instructions"] else "unrolled"
        resources = [
            f"{row['tile']} x {row['warps']}",
            *(str(row[k]) for k in ("registers", "spill_bytes", "shared_bytes")),
        ]
        body.append([f"`{row['variant']}`", *resources, per_row, f"{minimal(row):,.0f}", *cells])
    head = ["variant", "tile x warps", "registers", "spilled", "shared", "per edge", "at least", *kinds]
    return table(head, body)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [json.loads(line) for line in (RESULTS / "aot.jsonl").read_text().splitlines()]
    edge = [
        row
        for row in rows
        if row["arch"] == 90
        and row["kernel"] in MINIMUM
        and " swiglu K=8" in row["variant"]
        and not any(width in row["variant"] for width in ("hidden_dim", "pairwise"))
        and "fp16" not in row["variant"]
    ]
    page = RESULTS / "roofline.md"
    before, _, after = page.read_text().split(MARK)
    plain = [row for row in edge if "dropout" not in row["variant"]]
    of_spots = [
        row
        for row in rows
        if row["arch"] == 90 and row["default"] and row["kernel"] not in MINIMUM and row["work_per_row"]
    ]
    tables = [
        f"By commit {commit()}, triton {rows[0]['triton']}.",
        "## Floors of 8M edges (1M spots, K = 8), one layer and step",
        floor_table([*plain, *of_spots]),
        "## What the compiler made of it (sm_90)",
        code_table(edge),
    ]
    page.write_text(MARK.join([before, "\n\n" + "\n\n".join(tables) + "\n\n", after]))

"""What is run on the GPU, in the order of its worth. A section is one process, or several at once, with its own limit.

Figures are those of ``stflow-fast benchmark``, by that command: a section can be typed by hand as its line says.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

QUADRATIC = "eager_stflow,dense_softmax,dense_attention"
"""In their memory: of large slides they say how much they would need."""
OPPONENTS = f"flash_attention,{QUADRATIC}"
EDGE_OPERATIONS = "edge_forward,edge_backward,edge_messages"
OTHER_OPERATIONS = "gated_mlp,gated_mlp_backward,dropout"
BF16, FLOAT32 = "bf16", "tf32,float32"
LARGE, SIZES = "1e4,1e5,1e6", "1e3,3e3,3e4,1e5,3e5"

MINUTES = "<minutes>"
"""In a command: what its section has when it begins, less :data:`STARTING`."""

STARTING = 20
"""Seconds that a process may take before and after what it measures."""


class Figures(NamedTuple):
    """Options of ``stflow-fast benchmark``."""

    workload: str
    spots: str
    dtype: str
    providers: str
    rounds: str = "20"

    @property
    def is_profiled(self) -> bool:
        """Of a single case, or of single operations."""
        several = "," in self.spots + self.dtype or "," in self.workload
        return not several or ("sample" not in self.workload and "train_step" not in self.workload)

    @property
    def options(self) -> tuple[str, ...]:
        """As typed."""
        return tuple(text for name, value in self._asdict().items() for text in (f"--{name}", value))


class Section(NamedTuple):
    name: str
    seconds: int  # its limit
    commands: dict[str, tuple[str, ...]]  # by name, all at once
    environment: Mapping[str, str] = MappingProxyType({})


# No figure stands in two sections: the later would take the place of the earlier, and of its turns with the published
# code. Of several cases none is asked for a profile, which slows what is launched after it; but single operations are,
# whose device's time is what counts.
FIRST_FIGURES: dict[str, tuple[int, Figures]] = {
    # Checked against float64 on 1,100 spots before they are timed on 1,000.
    "edge kernels in bf16": (90, Figures(EDGE_OPERATIONS, "1e3", BF16, "triton_kept_edges,triton,reference")),
    "other kernels in bf16": (90, Figures(f"{OTHER_OPERATIONS},graph", "1e3", BF16, "triton,reference")),
    "sample of 10,000 spots in bf16": (120, Figures("sample", "1e4", BF16, f"triton_graph,{OPPONENTS}")),
    "the same by single launches": (60, Figures("sample", "1e4", BF16, "triton")),
    "sample of 1,000,000 spots in bf16": (150, Figures("sample", "1e6", BF16, f"triton_graph,{QUADRATIC}", "5")),
    "training step of 10,000 spots in bf16": (120, Figures("train_step", "1e4", BF16, f"triton,{OPPONENTS}")),
    "edge kernels against their floor in bf16": (
        120,
        Figures(EDGE_OPERATIONS, LARGE, BF16, "triton_kept_edges,triton", "10"),
    ),
}
"""Which come before the tests."""

FLOAT32_FIGURES: dict[str, tuple[int, Figures]] = {
    "all kernels in float32": (
        150,
        Figures(f"{EDGE_OPERATIONS},{OTHER_OPERATIONS}", "1e3", FLOAT32, "triton_kept_edges,triton,reference"),
    ),
    "sample of 10,000 spots in float32": (120, Figures("sample", "1e4", FLOAT32, f"triton_graph,{OPPONENTS}")),
    "training step of 10,000 spots in float32": (120, Figures("train_step", "1e4", FLOAT32, f"triton,{OPPONENTS}")),
    "edge kernels against their floor in float32": (
        120,
        Figures("edge_forward,edge_backward", LARGE, FLOAT32, "triton_kept_edges,triton", "5"),
    ),
    "neighbours": (120, Figures("graph", LARGE, "float32", "triton,scipy_kdtree,dense_cdist", "3")),
}

LAST_FIGURES: dict[str, tuple[int, Figures]] = {
    "samples of all sizes in bf16": (
        180,
        Figures("sample", SIZES, BF16, f"triton_graph,triton_kept_edges,message_passing,{OPPONENTS}", "5"),
    ),
    "training steps of all sizes in bf16": (
        150,
        Figures("train_step", SIZES, BF16, "triton,message_passing,eager_stflow,flash_attention", "5"),
    ),
    # Every size of it is compiled anew.
    "FlexAttention in bf16": (150, Figures("sample,train_step", "1e4,1e5", BF16, "flex_attention", "5")),
}

ALL_FIGURES = {**FIRST_FIGURES, **FLOAT32_FIGURES, **LAST_FIGURES}
TEST_FILES = tuple(f"tests/test_{name}.py" for name in ("kernel_gpu", "kernel_neighbors", "sampling_gpu"))
TESTS = {
    "golden files": "published_code",
    "bf16": "bf16",
    "fp16": "fp16 and not bf16",
    "tf32": "tf32",
    "ieee": "ieee",
    "the others": "not (published_code or bf16 or fp16 or tf32 or ieee)",
}
"""Words of ``pytest -m gpu -k`` over all :data:`TEST_FILES`: parts, which compile side by side."""

SANITIZED = (
    f"{TEST_FILES[0]}::test_attention_is_as_exact_as_plain_torch[K + 1 spots-bf16]",
    f"{TEST_FILES[0]}::test_gated_mlp_is_as_exact_as_plain_torch[relu, odd widths-bf16]",
)
NO_SKIPS = {"CI": "1", "STFLOW_TEST_GPU": "1"}
"""For want of golden files or of CUDA: then nothing would be known (tests/conftest.py)."""

EVERY_ALLOCATION = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""By the driver, so that what lies beyond a tensor is nobody's."""

TUNED = {
    "bf16": (
        "edge_attention_fwd,edge_attention_bwd_query,edge_attention_bwd_key,edge_messages,gate_norm,joined_norm,"
        "residual,gene_head"
    ),
    "tf32": "edge_attention_fwd,edge_messages",
    "ieee": "edge_attention_fwd",
}
"""Kernels of the default model whose tiles are timed, by precision."""

TUNED_COLUMNS = 64


def plan(out: Path, rehearse: bool) -> list[Section]:
    """All of it; rehearsed, on one tiny slide on the CPU with the kernels interpreted."""
    python = (sys.executable, "-m")
    pytest = (*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    # Torch asks for more than a driver has, and copes: errors of calls are no faults of a kernel.
    sanitizer = ("compute-sanitizer", "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")
    checked = (*sanitizer, *pytest, *SANITIZED)

    def figures(name: str, seconds: int, what: Figures) -> Section:
        profile = ("--profile",) if what.is_profiled else ()
        rest = ("--device", "cpu", "--rehearse") if rehearse else ("--device", "cuda")
        # As long as a section may a figure take: by the trend of a small slide, whose time is the host's, a large one
        # would be left out.
        limits = ("--minutes", MINUTES, "--seconds", str(seconds), "--complete")
        command = (*python, "stflow_fast", "benchmark", *what.options, *limits, *profile, *rest)
        return alone(name, seconds, (*command, "--resume", "--no-pictures", "--out", str(out)))

    def autotuned(precision: str) -> Section:
        which = (
            "--kernels",
            TUNED[precision],
            "--precisions",
            precision,
            "--out",
            str(out / f"launch_{precision}.csv"),
        )
        rest = ("--rehearse",) if rehearse else ("--columns", str(TUNED_COLUMNS))
        return alone(f"autotune in {precision}", 120, (*python, "stflow_fast.kernels.autotune", *which, *rest))

    tests = {name: (*pytest, *TEST_FILES, "-k", which) for name, which in TESTS.items()}
    return [
        alone("kernels compiled", 150, (*python, "benchmarks.gpu.kernels", *(("--rehearse",) if rehearse else ()))),
        *(figures(name, *what) for name, what in FIRST_FIGURES.items()),
        Section("tests", 240, tests, {} if rehearse else NO_SKIPS),
        *(figures(name, *what) for name, what in FLOAT32_FIGURES.items()),
        *(autotuned(precision) for precision in TUNED),
        alone("memory checked", 150, checked)._replace(environment=EVERY_ALLOCATION),
        *(figures(name, *what) for name, what in LAST_FIGURES.items()),
    ]


def alone(name: str, seconds: int, command: tuple[str, ...]) -> Section:
    return Section(name, seconds, {"": command})

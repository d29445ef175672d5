"""Sizes of the benchmarks, and their hexagonal lattice."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

N_GENES = 50
FEATURE_DIM = 1024
PITCH = 100.0
SAMPLE_STEPS = 5
"""Times of the published grid: 4 denoiser calls."""


def parse_sizes(text: str) -> list[int]:
    """Whole numbers from text such as ``"1e3,1e4,605471"``; raises ValueError for one that is not whole or below 1."""
    numbers = [float(size) for size in text.split(",")]
    if not all(number.is_integer() and number >= 1 for number in numbers):
        raise ValueError(f"sizes: must be whole numbers of at least 1, not {text!r}")
    return [int(number) for number in numbers]


def sizes(variable: str, default: str) -> list[int]:
    """:func:`parse_sizes` of the environment, for a quick rehearsal with small slides."""
    return parse_sizes(os.environ.get(variable, default))


SPOTS = sizes("STFLOW_BENCH_SPOTS", "1000,3000")
ROUNDS = sizes("STFLOW_BENCH_ROUNDS", "3")[0]
THREADS = sizes("STFLOW_BENCH_THREADS", str(torch.get_num_threads()))[0]


def hexagonal_lattice(n_spots: int) -> Tensor:
    """[N, 2] float64, a square cut of a Visium lattice."""
    row, column = np.divmod(np.arange(n_spots), int(np.ceil(np.sqrt(n_spots))))
    return torch.from_numpy(PITCH * np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2]))

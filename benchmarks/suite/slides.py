"""Synthetic slides of any number of spots for benchmarks: time and memory linear in it. Tissue is in the layout alone.

Nothing is zero and nothing is constant: features and expression are drawn from a seed, another one for each set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .workload import FEATURE_DIM, N_GENES, PITCH, hexagonal_lattice

JITTER = 0.8
"""Side of the square in which a spot of a jittered lattice lands, in pitches."""

BLOBS = 12
SPARSEST = 1 / 30
"""Density of the sparsest blob of a clustered slide; the densest is 1, a spot per square pitch."""


class BenchmarkSlide(NamedTuple):
    features: Tensor  # [N, F] float32
    coords: Tensor  # [N, 2] float64, representable in float32
    x_0: Tensor  # [N, G] source sample
    x_1: Tensor  # [N, G] target

    def to(self, device: torch.device | str) -> BenchmarkSlide:
        return BenchmarkSlide(*(part.to(device) for part in self))


def uniform(n_spots: int, generator: torch.Generator) -> Tensor:
    """Independent spots in a square, one per square pitch."""
    return PITCH * math.sqrt(n_spots) * torch.rand(n_spots, 2, generator=generator, dtype=torch.float64)


def visium(n_spots: int, generator: torch.Generator) -> Tensor:
    """The regular hexagonal lattice, ties and all."""
    return hexagonal_lattice(n_spots)


def visium_jittered(n_spots: int, generator: torch.Generator) -> Tensor:
    """The lattice without ties: every spot is moved."""
    jitter = torch.rand(n_spots, 2, generator=generator, dtype=torch.float64) - 0.5
    return hexagonal_lattice(n_spots) + JITTER * PITCH * jitter


def clustered(n_spots: int, generator: torch.Generator) -> Tensor:
    """Discs of as many spots each, of densities from 1 to :data:`SPARSEST`, far from each other."""
    counts = torch.full((BLOBS,), n_spots // BLOBS)
    counts[: n_spots % BLOBS] += 1
    density = torch.logspace(0, math.log10(SPARSEST), BLOBS, dtype=torch.float64)
    radius = (counts / (math.pi * density)).sqrt()
    columns = math.ceil(math.sqrt(BLOBS))
    place = torch.stack([torch.arange(BLOBS) % columns, torch.arange(BLOBS) // columns], dim=1)
    center = 2.5 * radius.max() * place
    blob = torch.repeat_interleave(torch.arange(BLOBS), counts)
    out, around = torch.rand(2, n_spots, generator=generator, dtype=torch.float64)
    out, around = radius[blob] * out.sqrt(), 2 * math.pi * around
    return PITCH * (center[blob] + torch.stack([out * around.cos(), out * around.sin()], dim=1))


LAYOUTS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    layout.__name__: layout for layout in (uniform, visium, visium_jittered, clustered)
}


def coordinates(layout: str, n_spots: int, seed: int) -> Tensor:
    """[N, 2] as :func:`benchmark_slide` makes them, without the rest of a slide."""
    return LAYOUTS[layout](n_spots, torch.Generator().manual_seed(seed)).float().double()


def features(n_spots: int, feature_dim: int = FEATURE_DIM, seed: int = 0) -> Tensor:
    """[N, F] normal numbers: a set per seed, to rotate among."""
    return torch.randn(n_spots, feature_dim, generator=torch.Generator().manual_seed(seed))


def benchmark_slide(
    layout: str, n_spots: int, seed: int = 0, n_genes: int = N_GENES, feature_dim: int = FEATURE_DIM
) -> BenchmarkSlide:
    """A slide of one of the :data:`LAYOUTS`; the same arguments give the same slide."""
    generator = torch.Generator().manual_seed(seed)
    coords = LAYOUTS[layout](n_spots, generator).float().double()
    x_0, x_1 = (torch.rand(n_spots, n_genes, generator=generator) for _ in range(2))
    return BenchmarkSlide(features(n_spots, feature_dim, seed), coords, x_0, x_1)

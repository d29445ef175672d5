"""Sampling the expression of whole slides: what is made once per model, once per slide, and once per draw."""

from .sampler import PreparedSlide, Sampler, sample
from .samples import BlockSample, Sample
from .settings import (
    DEFAULT_MEMORY_BUDGET,
    PRECISIONS,
    check_draws,
    check_precision,
    check_smooth,
    observation_of,
    resolve,
)

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "PRECISIONS",
    "BlockSample",
    "PreparedSlide",
    "Sample",
    "Sampler",
    "check_draws",
    "check_precision",
    "check_smooth",
    "observation_of",
    "resolve",
    "sample",
]

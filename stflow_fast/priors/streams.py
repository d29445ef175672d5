"""Seeds, the streams of random numbers that a slide's noise is made of, and what tells fitted numbers apart."""

from __future__ import annotations

import hashlib
import numbers
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError

PIECE = 2**18
"""Numbers that are drawn together: what they are made of, wider than they are, stays in a cache, and is nothing beside
a slide's."""


def check_seed(seed: Any) -> None:
    """Raise InputError unless ``seed`` is a whole number that every generator takes."""
    if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**63:
        raise InputError(f"seed: must be a whole number from 0 to 2^63 - 1, not {seed}")


def slide_seed(seed: int, slide_id: str) -> np.random.SeedSequence:
    """The seed of everything random about one slide."""
    return np.random.SeedSequence([seed, zlib.crc32(slide_id.encode())])


def streams(seed: np.random.SeedSequence, n: int) -> list[np.random.Generator]:
    """n streams of one seed, the same ones at every call. Each kind of draw has its own, which it fills spot after
    spot, so that no spot depends on how many follow."""
    return [
        np.random.Generator(np.random.Philox(np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, child))))
        for child in range(n)
    ]


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays, in the order of their names."""
    digest = hashlib.sha256()
    for _, values in sorted(arrays.items()):
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()

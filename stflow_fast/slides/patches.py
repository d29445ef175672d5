"""How large the patches of a file are: under every name that their size has, in the file or beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .stores import is_array, opened

SOUGHT = "patch_size_level0, patch_size_src, patch_size with downsample or patch_level 0"
"""Attributes of ``coords`` that tell the size, for messages."""

LEVELS_UP = 4
"""Folders above a file of features beside which ``patches/`` may lie: task/embeddings/encoder/fp32/slide.h5."""


class PatchSize(NamedTuple):
    """Of the patches of a slide; what is unknown is None."""

    pixels: float | None = None  # side at level 0
    micron_per_pixel: float | None = None  # of level 0


def patch_size_of(attributes: Mapping[str, Any]) -> PatchSize:
    """From the attributes of ``coords``: TRIDENT's, HEST's of today and before, CLAM's."""
    size = _number(attributes, "patch_size_level0") or _number(attributes, "patch_size_src")
    at_its_level, downsample = _number(attributes, "patch_size"), _number(attributes, "downsample")
    if size is None and at_its_level:
        if downsample:
            size = at_its_level * downsample
        elif any(key in attributes and int(attributes[key]) == 0 for key in ("patch_level", "level")):
            size = at_its_level
        if size:
            size *= _number(attributes, "custom_downsample") or 1.0
    return PatchSize(size, _number(attributes, "pixel_size"))


def _number(attributes: Mapping[str, Any], key: str) -> float | None:
    """A number above 0, or the first of a pair of them."""
    try:
        value = float(np.asarray(attributes[key], dtype=np.float64).reshape(-1)[0])
    except (KeyError, IndexError, ValueError, TypeError):
        return None
    return value if np.isfinite(value) and value > 0 else None


def read_patch_size(patches: Path) -> PatchSize:
    """What a file of patches says of them: HEST's ``patches/{id}.h5``, TRIDENT's ``patches/{id}_patches.h5``, CLAM's.

    Raises:
        InputError: it cannot be read.
    """
    with opened(patches) as store:
        found = patch_size_of(dict(store["coords"].attrs)) if "coords" in store else PatchSize()
        images = store.get("img", None)
        if found.pixels is None and is_array(images) and len(images.shape) == 4:
            downsample = _number(dict(images.attrs), "downsample")
            found = found._replace(pixels=downsample and downsample * images.shape[1])
        return found


def patches_beside(path: Path) -> Path | None:
    """The file of patches that belongs to a file of features: in ``patches/`` beside it or above it, first of the path
    as it was given, then of what it is a link to."""
    for place in dict.fromkeys((path.absolute(), path.resolve())):
        found = next((candidate for candidate in _candidates(place) if candidate.is_file()), None)
        if found:
            return found
    return None


def _candidates(path: Path) -> Iterator[Path]:
    for folder in path.parents[:LEVELS_UP]:
        for name in (path.name, f"{path.stem}_patches.h5"):
            candidate = folder / "patches" / name
            if candidate != path:
                yield candidate

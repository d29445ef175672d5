"""How large the patches of a file are: under every name that their size has, in the file or beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from ..errors import InputError
from .stores import attributes_of, is_array, opened, part_of, read_all

SOUGHT = (
    "patch_size_level0, patch_size_src, patch_size with downsample or patch_level 0, or with level0_magnification and "
    "target_magnification"
)
"""Attributes of ``coords`` that tell the size, for messages."""

COORDS_KEY = "coords"

LEVELS_UP = 4
"""Folders above a file of features beside which ``patches/`` may lie: task/embeddings/encoder/fp32/slide.h5."""


SAME_CORNER = 1.5
"""Pixels between a corner and the same one elsewhere, at the most: either may be cut to whole numbers, in x and y."""


class PatchSize(NamedTuple):
    """Of the patches of a slide; what is unknown is None."""

    pixels: float | None = None  # side at level 0
    micron_per_pixel: float | None = None  # of level 0


def patch_size_of(attributes: Mapping[str, Any]) -> PatchSize:
    """From the attributes of ``coords``: TRIDENT's of today and before, HEST's of today and before, CLAM's."""
    size = above_zero(attributes, "patch_size_level0") or above_zero(attributes, "patch_size_src")
    at_its_level = above_zero(attributes, "patch_size")
    if size is None and at_its_level:
        size = _at_level_0(at_its_level, attributes)
    return PatchSize(size, above_zero(attributes, "pixel_size"))


def _at_level_0(size: float, attributes: Mapping[str, Any]) -> float | None:
    """The size at level 0 of patches of a ``size`` at theirs; None where nothing tells."""
    custom = above_zero(attributes, "custom_downsample") or 1.0
    downsample = above_zero(attributes, "downsample")
    if downsample:
        return size * downsample * custom
    if 0 in (_number(attributes, "patch_level"), _number(attributes, "level")):
        return size * custom
    magnified, target = (above_zero(attributes, f"{name}_magnification") for name in ("level0", "target"))
    return size * magnified // target if magnified and target else None


def above_zero(attributes: Mapping[str, Any], key: str) -> float | None:
    """A number above 0, or the first of a pair of them; None where there is no such number."""
    value = _number(attributes, key)
    return value if value and value > 0 else None


def _number(attributes: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or the first of a pair of them; None whatever else people have put there."""
    try:
        value = float(np.asarray(attributes[key], dtype=np.float64).reshape(-1)[0])
    except (KeyError, IndexError, ValueError, TypeError, OverflowError):
        return None
    return value if np.isfinite(value) else None


def read_patch_size(patches: Path) -> PatchSize:
    """What a file of patches says of them: HEST's ``patches/{id}.h5``, TRIDENT's ``patches/{id}_patches.h5``, CLAM's.

    Raises:
        InputError: it cannot be read.
    """
    with opened(patches) as store:
        found = patch_size_of(attributes_of(store[COORDS_KEY])) if COORDS_KEY in store else PatchSize()
        images = part_of(store, "img")
        if found.pixels is None and is_array(images) and len(images.shape) == 4:
            downsample = above_zero(attributes_of(images), "downsample")
            found = found._replace(pixels=downsample and downsample * images.shape[1])
        return found


def read_corners(path: Path, table: Any) -> np.ndarray:
    """[N, 2] float64: ``coords`` of a file that is open; a leading axis of one is passed by.

    Raises:
        InputError: another shape, or no numbers.
    """
    if np.dtype(table.dtype).kind not in "biuf":
        raise InputError(f"{path}: {COORDS_KEY} are not numbers (their type is {table.dtype}); write x and y")
    corners = read_all(path, COORDS_KEY, table).astype(np.float64)
    if corners.ndim == 3 and len(corners) == 1:
        corners = corners[0]
    if corners.ndim != 2 or corners.shape[1] != 2:
        raise InputError(f"{path}: {COORDS_KEY} must have shape [N, 2], not {list(corners.shape)}{_mend(corners)}")
    return corners


def _mend(corners: np.ndarray) -> str:
    transposed = corners.ndim == 2 and len(corners) == 2
    return "; they are transposed, write their .T" if transposed else "; write x and y of each patch"


def are_of(patches: Path, corners: np.ndarray) -> bool:
    """Whether ``corners`` [N, 2] are all among those of a file of patches; True where either has no places but one, or
    none: nothing tells then.

    Raises:
        InputError: the file cannot be read.
    """
    with opened(patches) as store:
        there = read_corners(patches, store[COORDS_KEY]) if COORDS_KEY in store else np.empty((0, 2))
    if not (np.ptp(corners, axis=0).any() and len(there) and np.ptp(there, axis=0).any()):
        return True
    if not (np.isfinite(corners).all() and np.isfinite(there).all()):
        return False
    distance, _ = cKDTree(there).query(corners, distance_upper_bound=SAME_CORNER)
    return bool(np.isfinite(distance).all())


def patches_beside(path: Path) -> list[Path]:
    """Files of the name that patches of a file of features have, in ``patches/`` beside it or above it, first of the
    path as it was given, then of what it is a link to."""
    places = dict.fromkeys((path.absolute(), path.resolve()))
    return [candidate for place in places for candidate in _candidates(place) if candidate.is_file()]


def _candidates(path: Path) -> Iterator[Path]:
    for folder in path.parents[:LEVELS_UP]:
        for name in (path.name, f"{path.stem}_patches.h5"):
            candidate = folder / "patches" / name
            if candidate != path:
                yield candidate

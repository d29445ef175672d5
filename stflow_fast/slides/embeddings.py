"""Patch features in HDF5: STFlow's and HEST-bench's embeddings, TRIDENT's and CLAM's features."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, first_line
from .options import ReadOptions
from .patches import (
    COORDS_KEY,
    SOUGHT,
    PatchSize,
    above_zero,
    are_of,
    patch_size_of,
    patches_beside,
    read_corners,
    read_patch_size,
)
from .rows import StoredRows, stored_rows
from .slide import FARTHEST, Origin, Slide
from .stores import attributes_of, check_safe, is_array, names_in, opened, part_of, read_all

FEATURE_KEYS = ("embeddings", "features")
BARCODE_KEYS = ("barcodes", "barcode")


@dataclass(frozen=True)
class PatchFeatures:
    """What a file of patch features holds.

    Attributes:
        path: the file.
        features: [N, F].
        corners: [N, 2] float64, top-left of the patches in level-0 pixels.
        barcodes: [N]; ``{x}_{y}`` of the corner where the file has none, ``{x}_{y}_1`` of the next one there.
        size: of the patches, from the file itself.
        encoder: as the file's attributes or its folder call it; empty where they do not.
        image_size: (width, height) at level 0, None where unknown.
    """

    path: Path
    features: StoredRows
    corners: np.ndarray
    barcodes: np.ndarray
    size: PatchSize
    encoder: str
    image_size: tuple[int, int] | None


def read_embeddings(
    path: str | Path, patches: str | Path | None = None, options: ReadOptions | None = None, format: str = "embeddings"
) -> Slide:
    """Read a slide without expression from a file of patch features; they stay on the disk until they are used.

    Coordinates in the file are the top-left corners of the patches; the centre is taken where the file says how large a
    patch is, or the file of the same patches does. Elsewhere they stay corners, and a note says so.

    Args:
        path: STFlow's ``embeddings``, ``coords``, ``barcodes``, or TRIDENT's and CLAM's ``features``, ``coords``.
        patches: HEST's, TRIDENT's or CLAM's file of the patches; looked for in ``patches/`` beside and above when None.
            One that cannot be read, or has not these corners, is passed by.
        options: ``features_key`` is looked at.
        format: what the slide's origin says.

    Raises:
        InputError: a missing, unreadable, locked or truncated file, missing keys, or what Slide refuses.
    """
    found = open_features(Path(path), options or ReadOptions())
    sought = [Path(patches)] if patches else ([] if found.size.pixels else patches_beside(found.path))
    beside, failures = _size_beside(found.corners, [each for each in sought if each.is_file()])
    pixels = found.size.pixels or beside.pixels
    return Slide(
        found.path.stem,
        found.features,
        found.corners + (pixels or 0.0) / 2,
        found.barcodes,
        micron_per_pixel=found.size.micron_per_pixel or beside.micron_per_pixel,
        notes=() if pixels else (_corners_note(failures),),
        origin=Origin(
            found.path,
            format,
            found.encoder,
            found.image_size,
            {"spot_diameter_fullres": pixels} if pixels else {},
        ),
    )


def _size_beside(corners: np.ndarray, patches: list[Path]) -> tuple[PatchSize, list[str]]:
    """The size that the first of the files tells that are of these patches, and why others do not."""
    known, failures = PatchSize(), []
    for path in patches:
        try:
            size, fits = read_patch_size(path), are_of(path, corners)
        except InputError as error:
            failures.append(f"and {error}")
            continue
        if fits and size.pixels:
            return size, []
        known = size if fits else known
        failures.append(f"nor have those of {path}" if fits else f"and {path} is of other patches: its corners differ")
    return known, failures


def _corners_note(failures: list[str]) -> str:
    where = ", ".join(failures) or "and no patches/ beside or above has a file of this name"
    return (
        f"coordinates stay top-left corners of patches, whose size is unknown: attributes of {COORDS_KEY} have none of "
        f"{SOUGHT}, {where}"
    )


def open_features(path: Path, options: ReadOptions) -> PatchFeatures:
    """All of a file but the features' rows."""
    with opened(path) as store:
        key = _features_key(path, store, options.features_key)
        barcode_key = next((name for name in BARCODE_KEYS if part_of(store, name) is not None), None)
        present = [name for name in (key, COORDS_KEY, barcode_key) if name is not None]
        if not all(is_array(store[name]) for name in present):
            raise InputError(f"{path}: {', '.join(present)} must be tables, not groups; write them again")
        attributes = attributes_of(store[COORDS_KEY])
        features = _rows(path, key, store)
        corners = read_corners(path, store[COORDS_KEY])
        names = _names(corners) if barcode_key is None else _as_text(path, barcode_key, store[barcode_key])
        encoder = _encoder_of(path, store, key)
    if not len(features) == len(corners) == len(names):
        shapes = f"{list(features.shape)}, {list(corners.shape)} and {len(names)}"
        turned = features.columns == len(corners)
        mend = f"{key} are transposed, write their .T" if turned else "write a row of each for every spot"
        raise InputError(f"{path}: {', '.join(present)} disagree in size ({shapes}); {mend}")
    return PatchFeatures(path, features, corners, names, patch_size_of(attributes), encoder, _image_size(attributes))


def _features_key(path: Path, store: Any, asked: str | None) -> str:
    keys = (asked,) if asked else FEATURE_KEYS
    key = next((name for name in keys if part_of(store, name) is not None), None)
    if key is None:
        wanted = " or ".join(f"'{each}'" for each in keys)
        raise InputError(f"{path}: has no {wanted}; it has {names_in(store)}")
    if part_of(store, COORDS_KEY) is None:
        raise InputError(f"{path}: has no '{COORDS_KEY}'; it has {names_in(store)}")
    return key


def _rows(path: Path, key: str, store: Any) -> StoredRows:
    table, corners = store[key], store[COORDS_KEY]
    for name, part in ((key, table), (COORDS_KEY, corners)):
        check_safe(path, name, part)
    none = table.shape == (0,) or 0 in table.shape[:-1]  # TRIDENT leaves [0] of a slide without tissue
    if none or 0 in corners.shape:
        raise InputError(f"{path}: has no spots; leave it out")
    return stored_rows(path, key, table)


def _names(corners: np.ndarray) -> np.ndarray:
    """``{x}_{y}`` [N] of patches that have no barcode, whole numbers without a dot; the second of a name ends in _1."""
    whole = np.rint(corners)
    if (whole == corners).all() and (np.abs(whole) <= FARTHEST).all():
        corners = whole.astype(np.int64)
    x, y = corners.T
    names = [f"{a}_{b}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    times: Counter[str] = Counter()
    if len(set(names)) < len(names):
        for i, name in enumerate(names):
            names[i] = f"{name}_{times[name]}" if times[name] else name
            times[name] += 1
    return np.array(names, dtype=np.str_)


def _as_text(path: Path, key: str, table: Any) -> np.ndarray:
    """Barcodes as text [N], from bytes or text, fixed or variable length, [N] or [N, 1]."""
    flat = np.asarray(read_all(path, key, table)).reshape(-1)
    try:
        return np.array([value.decode() if isinstance(value, bytes) else str(value) for value in flat], dtype=np.str_)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {key} are not UTF-8 text ({first_line(error)})") from error


def _encoder_of(path: Path, store: Any, key: str) -> str:
    """As the file says, or its folder: TRIDENT's ``features_{encoder}``, STFlow's ``{encoder}/fp32``."""
    for attributes in map(attributes_of, (store[key], store)):
        told = attributes.get("encoder", "")
        told = told.decode(errors="replace") if isinstance(told, bytes) else str(told)
        if told and told.lower() != "none":
            return told
    folder = path.absolute().parent
    if folder.name in PRECISION_FOLDERS:
        return folder.parent.name
    match = re.match(r"features_(.+)$", folder.name)
    return match[1] if match else ""


PRECISION_FOLDERS = ("fp32", "fp16")


def _image_size(attributes: dict[str, Any]) -> tuple[int, int] | None:
    width, height = above_zero(attributes, "level0_width"), above_zero(attributes, "level0_height")
    return (int(width), int(height)) if width and height else None

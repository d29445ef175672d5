"""Where the spots of a slide lie: what is wrong with it, or strange, and how far apart they are."""

from __future__ import annotations

import re

import numpy as np
from scipy.spatial import cKDTree

from ..errors import InputError

LOOKED_AT = 2000
"""Spots whose neighbours are looked at; all of them where they are fewer. Its share is known to 0.02 then."""

NEAR = 6
"""Neighbours of each that are looked at."""

CLOSER, OVERLAID = 0.9, 0.1
"""From this share of spots on that are closer to one of another section than 0.9 times to the nearest of their own,
sections lie over one another. The share is that of the overlap: a spot that falls among those of a lattice lies within
0.71 pitches of one, wherever it falls, and sections side by side come no closer than a pitch."""

SHARED = 0.1
"""From this share of spots on, places that several spots share are no slips."""

_LABELLED = re.compile(r"^([ACGTN]{8,}|s_\d+um_\d+_\d+)(?:-\d+)?[-_](.+)$|^([ACGTN]{8,})-(\d+)$")
"""A barcode of a sequencer with something behind it that tells one section from another."""


class SeveralSections(InputError):
    """The spots are of several sections, which are slides of their own."""


def check_places(
    where: str, coords: np.ndarray, barcodes: np.ndarray, library_id: np.ndarray | None = None, library_key: str = ""
) -> tuple[str, ...]:
    """Look at where spots lie.

    Args:
        where: begins messages.
        coords: [N, 2] or, of a file that has a third coordinate, [N, 3], finite.
        barcodes: [N].
        library_id: [N] the section of each spot, None where nobody says.
        library_key: column of ``obs`` that says it.

    Returns:
        Notes for people.

    Raises:
        SeveralSections: the spots of several sections lie over one another.
        InputError: all spots lie at one place.
    """
    n = len(coords)
    if n > 1 and not np.ptp(coords[:, :2], axis=0).any():
        raise InputError(f"{where}coords: all {n} spots lie at one place; give the centre of each in pixels")
    mend = (
        f"split them with --library-key {library_key or 'COLUMN'}, a column of obs that names the section of each spot"
    )
    _check_depth(where, coords, mend)
    of_column = f"{mend}, or say --library-key '' if it does not"
    if library_id is None:
        notes = _check_sections(where, coords, barcodes, False, mend)
    else:
        notes = _check_sections(where, coords, library_id, True, of_column)
    return (*notes, *_check_shared(where, coords, mend))


def _check_depth(where: str, coords: np.ndarray, mend: str) -> None:
    if coords.shape[1] == 3 and len(coords) and np.ptp(coords[:, 2]) > 0:
        n = len(np.unique(coords[:, 2]))
        raise SeveralSections(
            f"{where}coords: have a third coordinate of {n} values, and a slide is flat; where they are sections "
            f"{mend}; else leave it out"
        )


def _check_sections(where: str, coords: np.ndarray, names: np.ndarray, told: bool, mend: str) -> tuple[str, ...]:
    """``names`` [N] are the sections of the spots if these are ``told``, else their barcodes."""
    labels = names if told else _labels_of(names)
    if labels is None:
        return ()
    sections, section = np.unique(labels, return_inverse=True)
    if len(sections) < 2:
        return ()
    some = ", ".join(sections[:3].tolist()) + (", ..." if len(sections) > 3 else "")
    found = (
        f"spots of {len(sections)} sections ({some})"
        if told
        else f"spots whose barcodes differ in what ends them ({some})"
    )
    share = overlap(coords[:, :2], section.reshape(-1))
    if share >= OVERLAID:
        raise SeveralSections(
            f"{where}{found} lie over one another: {share:.0%} of them are among those of another one; {mend}"
        )
    return (f"{found} lie side by side and are taken for one slide; {mend}, if each is a slide of its own",)


def overlap(coords: np.ndarray, section: np.ndarray) -> float:
    """The share of spots that lie among those of another section, of spots chosen evenly."""
    chosen = np.linspace(0, len(coords) - 1, min(LOOKED_AT, len(coords))).astype(np.intp)
    distance, near = cKDTree(coords).query(coords[chosen], min(NEAR + 1, len(coords)))
    of_other = section[near] != section[chosen, None]
    of_own = ~of_other & (near != chosen[:, None])
    nearest_other, nearest_own = (np.where(kind, distance, np.inf).min(axis=1) for kind in (of_other, of_own))
    return float((nearest_other < CLOSER * nearest_own).mean())


def _labels_of(barcodes: np.ndarray) -> np.ndarray | None:
    """[N] what stands behind sequenced barcodes of which many are there several times; None where there are no such."""
    if _LABELLED.match(str(barcodes[0])) is None:
        return None
    parts = [_LABELLED.match(barcode) for barcode in barcodes.tolist()]
    if not all(parts):
        return None
    pairs = [(part[1] or part[3], part[2] or part[4]) for part in parts]
    if len({stem for stem, _ in pairs}) > (1 - SHARED) * len(pairs):
        return None
    return np.array([label for _, label in pairs])


def _check_shared(where: str, coords: np.ndarray, mend: str) -> tuple[str, ...]:
    n = len(coords)
    doubled = n - len(np.unique(np.ascontiguousarray(coords[:, :2]).view(np.complex128)))
    if doubled >= max(2, SHARED * n):
        raise SeveralSections(
            f"{where}coords: {doubled} of {n} spots lie where another one does; if they are several sections {mend}; "
            "else leave out rows that stand twice"
        )
    return (f"{doubled} of {n} spots lie where another one does",) if doubled else ()


def spacing(coords: np.ndarray) -> float | None:
    """Median distance from a spot [N, 2] to the nearest one elsewhere, in the unit of the coordinates; None where there
    is no other place."""
    places = np.unique(coords[:, :2], axis=0) if len(coords) <= LOOKED_AT else coords[:, :2]
    if len(places) < 2:
        return None
    chosen = np.linspace(0, len(places) - 1, min(LOOKED_AT, len(places))).astype(np.intp)
    distance, _ = cKDTree(places).query(places[chosen], 2)
    apart = distance[:, 1][distance[:, 1] > 0]
    return float(np.median(apart)) if len(apart) else None

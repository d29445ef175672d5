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

IN_THE_MIDDLE = 20_000
"""Of a slide that nobody says has several sections, so many spots are looked at."""

CLOSER, OVERLAID = 0.9, 0.1
"""From this share of a section's spots on that are closer to one of another section than 0.9 pitches, they lie over one
another: a spot that falls among those of a lattice lies within 0.71 pitches of one, wherever it falls, and sections
side by side come no closer than a pitch. Where spots lie on no lattice, the nearest of their own is the measure."""

FEWEST = 5
"""Spots of a section of which a share means something."""

RINGS, SAME, RICH, LATTICE = 12, 0.04, 0.6, 0.8
"""A pitch is the smallest distance to the nearest 12 that is, within 4 %, as frequent as 0.6 of the most frequent one,
if 0.8 of the spots have three neighbours at it."""

SHARED = 0.1
"""From this share of spots on, places that several spots share are no slips."""

_BARCODE = r"[ACGTN]{8,}(?:-\d+)?|s_\d+um_\d+_\d+(?:-\d+)?|\d+x\d+"
_LABELLED = (
    re.compile(rf"(?P<stem>{_BARCODE})[-_](?P<label>.+)"),
    re.compile(rf"(?P<label>.+)[-_](?P<stem>{_BARCODE})"),
)
"""A barcode of a sequencer or an array with something behind or before it that tells one section from another."""


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
    column = library_key or "COLUMN"
    mend = f"split them with --library-key {column}, a column of obs that names the section of each spot"
    _check_depth(where, coords, mend)
    places = coords[:, :2]
    if library_id is None or (library_id == library_id[0]).all():
        notes = _check_sections(where, places, _labels_of(barcodes), "barcodes tell of", mend)
    else:
        passed_by = f"{mend}, or say --library-key '' if it does not"
        told = f"obs[{library_key!r}] names" if library_key else "library_id names"
        notes = _check_sections(where, places, library_id, told, passed_by)
    shared = _check_shared(where, places, mend)
    return (*notes, *shared, *(() if notes or shared else _look_at_pitch(places, mend)))


def _check_depth(where: str, coords: np.ndarray, mend: str) -> None:
    if coords.shape[1] == 3 and len(coords) and np.ptp(coords[:, 2]) > 0:
        n = len(np.unique(coords[:, 2]))
        raise SeveralSections(
            f"{where}coords: have a third coordinate of {n} values, and a slide is flat; where they are sections "
            f"{mend}; else leave it out"
        )


def _check_sections(where: str, coords: np.ndarray, labels: np.ndarray | None, told: str, mend: str) -> tuple[str, ...]:
    if labels is None:
        return ()
    sections, section = np.unique(labels, return_inverse=True)
    if len(sections) < 2:
        return ()
    some = ", ".join(sections[:3].tolist()) + (", ..." if len(sections) > 3 else "")
    found = f"{told} {len(sections)} sections ({some})"
    share = overlap(coords, section.reshape(-1))
    if share >= OVERLAID:
        lie = f"which lie over one another: {share:.0%} of the spots of one are among those of others"
        raise SeveralSections(f"{where}{found}, {lie}; {mend}")
    return (f"{found}, which are predicted as one slide, since they do not lie over one another",)


def overlap(coords: np.ndarray, section: np.ndarray) -> float:
    """The largest share, over sections, of a section's spots that lie among those of others.

    Args:
        coords: [N, 2].
        section: [N] whole numbers from 0.
    """
    tree, pitch = cKDTree(coords), pitch_of(coords)
    sizes = np.bincount(section)
    largest = 0.0
    for number in np.flatnonzero(sizes >= min(FEWEST, sizes.max())):
        members = np.flatnonzero(section == number)
        spots = _evenly(members, max(FEWEST, LOOKED_AT // len(sizes)))
        distance, near = tree.query(coords[spots], min(NEAR + 1, len(coords)))
        other = section[near] != number
        own = ~other & (near != spots[:, None])
        nearest_other, nearest_own = (np.where(kind, distance, np.inf).min(axis=1) for kind in (other, own))
        # Labels that are strewn over one lattice are on none themselves: its pitch is theirs.
        measure = pitch_of(coords[members]) or pitch or nearest_own
        largest = max(largest, float((nearest_other < CLOSER * measure).mean()))
    return largest


def pitch_of(coords: np.ndarray) -> float | None:
    """The pitch of the lattice that spots [N, 2] lie on, of one or of several over one another; None of other spots."""
    return _pitch(_nearest(coords, RINGS))


def _nearest(coords: np.ndarray, n: int) -> np.ndarray:
    """[M, n] distances from spots chosen evenly to their nearest; no row where there are too few spots."""
    if len(coords) <= n:
        return np.empty((0, n))
    distances: np.ndarray = cKDTree(coords).query(_evenly(coords, LOOKED_AT), n + 1)[0]
    return distances[:, 1:]


def _pitch(distance: np.ndarray) -> float | None:
    """See :data:`RINGS`; of distances [M, RINGS] to the nearest."""
    logs = np.log(distance[distance > 0])
    if not len(logs):
        return None
    edges = np.arange(logs.min(), logs.max() + 2 * SAME, SAME)
    counts = np.histogram(logs, edges)[0]
    counts = counts + np.append(counts[1:], 0)  # a distance may fall on an edge
    first = int(np.argmax(counts >= RICH * counts.max()))
    near = logs[(logs >= edges[first]) & (logs < edges[first] + 2 * SAME)]
    pitch = float(np.exp(np.median(near)))
    at_pitch = (np.abs(distance - pitch) <= SAME * pitch).sum(axis=1) >= 3
    return pitch if at_pitch.mean() >= LATTICE else None


def _look_at_pitch(coords: np.ndarray, mend: str) -> tuple[str, ...]:
    """A note where spots lie on a lattice, and many closer than its pitch."""
    distance = _nearest(_middle(coords), RINGS)
    pitch = _pitch(distance)
    share = 0.0 if pitch is None else float((distance[:, 0] < CLOSER * pitch).mean())
    if share < OVERLAID:
        return ()
    found = f"{share:.0%} of the spots lie closer to another one than the pitch of their lattice, {pitch:.4g}"
    return (f"{found}: if these are several sections over one another, {mend}",)


def _middle(coords: np.ndarray) -> np.ndarray:
    """The :data:`IN_THE_MIDDLE` spots around the middle one: a tree of all takes longer than to read them."""
    if len(coords) <= IN_THE_MIDDLE:
        return coords
    far = np.abs(coords - np.median(coords, axis=0)).max(axis=1)
    return coords[np.argpartition(far, IN_THE_MIDDLE)[:IN_THE_MIDDLE]]


def _evenly(values: np.ndarray, most: int) -> np.ndarray:
    """So many of them at the most, spread evenly."""
    return values[np.linspace(0, len(values) - 1, min(most, len(values))).astype(np.intp)]


def _labels_of(barcodes: np.ndarray) -> np.ndarray | None:
    """[N] what stands behind or before barcodes of which many are there several times; None where there are no such."""
    looked_at = list(map(_parts, _evenly(barcodes, LOOKED_AT).tolist()))
    if sum(label != "" for _, label in looked_at) < (1 - SHARED) * len(looked_at):
        return None
    pairs = list(map(_parts, barcodes.tolist()))
    if len({stem for stem, _ in pairs}) > (1 - SHARED) * len(pairs):
        return None
    return np.array([label for _, label in pairs])


def _parts(barcode: str) -> tuple[str, str]:
    """(what a sequencer wrote, what tells the section); nothing of the latter where that is not told."""
    match = next(filter(None, (pattern.fullmatch(barcode) for pattern in _LABELLED)), None)
    return (barcode, "") if match is None else (match["stem"], match["label"])


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
    distance, _ = cKDTree(places).query(_evenly(places, LOOKED_AT), 2)
    apart = distance[:, 1][distance[:, 1] > 0]
    return float(np.median(apart)) if len(apart) else None

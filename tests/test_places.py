"""Where spots lie: what Slide says or refuses of it, whatever file they are from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast.errors import InputError
from stflow_fast.slides import Origin, SeveralSections, Slide
from stflow_fast.slides.places import spacing


def lattice(side: int = 10, pitch: float = 250.0) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * pitch + 1000.0


def barcode(number: int) -> str:
    return "".join("ACGT"[(number >> shift) & 3] for shift in range(0, 32, 2)) + "-1"


def slide(coords: np.ndarray, **others: Any) -> Slide:
    n = len(coords)
    return Slide(**{"id": "s", "features": np.zeros((n, 2)), "coords": coords, "barcodes": np.arange(n), **others})


@pytest.mark.parametrize("shift", [0.0, 7.0, 125.0, 1000.0])
def test_sections_over_one_another_are_refused(shift: float) -> None:
    """Exactly, slightly or half a pitch aside, or in part."""
    coords = np.concatenate([lattice(), lattice() + shift])
    labels = np.repeat(["A", "B"], 100)
    told = {"library_id": labels, "origin": Origin(library_key="batch")}
    with pytest.raises(
        SeveralSections, match=r"s: obs\['batch'\] names 2 sections \(A, B\), which lie over .* --library-key batch,"
    ):
        slide(coords, **told)


@given(st.floats(0, 1), st.floats(-1.4, 1.4), st.floats(-1.4, 1.4), st.sampled_from(["square", "hexagonal", "random"]))
def test_sections_over_one_another_are_refused_wherever_they_fall(
    turn: float, right: float, down: float, kind: str
) -> None:
    """By half of themselves at least; the second is turned too."""
    side, angle = 30, turn * np.pi
    points = (lattice(side, 1.0) - 1000.0) / side - 0.5
    if kind == "hexagonal":
        points = points * [1.0, 0.87] + [0.5 / side, 0.0] * (np.arange(side * side) // side % 2)[:, None]
    elif kind == "random":
        points = np.random.default_rng(0).uniform(-0.5, 0.5, points.shape)
    turned = points @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    coords = np.concatenate([points, turned + np.array([right, down]) * 0.2])
    with pytest.raises(SeveralSections):
        slide(coords, library_id=np.repeat(["A", "B"], side * side))


@pytest.mark.parametrize("side", [2, 3, 8, 10, 40])
def test_sections_side_by_side_are_one_slide_with_a_note(side: int) -> None:
    coords = np.concatenate([lattice(side), lattice(side) + np.array([250.0 * side, 0.0])])
    made = slide(coords, library_id=np.repeat(["A", "B"], side * side))
    assert made.notes == (
        "library_id names 2 sections (A, B), which are predicted as one slide, since they do not lie over one another",
    )


@pytest.mark.parametrize("n", [5, 30, 100, 170])
@pytest.mark.parametrize("kind", ["lattice", "cells"])
def test_a_small_section_within_a_large_one_is_refused(n: int, kind: str) -> None:
    """However few of all spots it has."""
    large = lattice(40) if kind == "lattice" else np.random.default_rng(0).uniform(0, 10_000, (1600, 2))
    small = (lattice(14) - lattice(14).mean(axis=0))[:n] + large.mean(axis=0) + np.array([110.0, 70.0])
    with pytest.raises(SeveralSections, match="lie over one another"):
        slide(np.concatenate([large, small]), library_id=np.repeat(["A", "B"], [len(large), n]))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5])
def test_labels_that_are_strewn_over_one_lattice_are_no_sections(share: float) -> None:
    labels = np.where(np.random.default_rng(0).uniform(size=1600) < share, "a", "b")
    assert "do not lie over one another" in slide(lattice(40), library_id=labels).notes[0]


def disturbed(kind: str, side: int) -> np.ndarray:
    """Spots of one section, of every kind that people have."""
    rng, row = np.random.default_rng(0), np.arange(side * side) // side
    points = (lattice(side, 1.0) - 1000.0) * 100.0
    hexagonal = points * np.array([1.0, 0.866]) + np.column_stack([50.0 * (row % 2), np.zeros(side * side)])
    kinds = {
        "square": points,
        "hexagonal": hexagonal,
        "whole pixels": np.rint(hexagonal),
        "bins of 7 pixels": np.rint(points * 0.073),
        "jitter": points + rng.normal(0, 10, points.shape),
        "cells": rng.uniform(0, 100 * side, points.shape),
        "holes": hexagonal[rng.uniform(size=side * side) < 0.7],
        "contours": np.concatenate([points, points + np.array([100.0 * side + 130.0, 40.0])]),
        "a line": np.column_stack([points[:, 0] + points[:, 1] * side, np.zeros(side * side)]),
    }
    return kinds[kind]


KINDS = ("square", "hexagonal", "whole pixels", "bins of 7 pixels", "jitter", "cells", "holes", "contours", "a line")


@pytest.mark.parametrize("side", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_of_a_section_by_itself(kind: str, side: int) -> None:
    assert slide(disturbed(kind, side)).notes == ()


@pytest.mark.parametrize("shift", [(33.0, 21.0), (50.0, 10.0), (0.0, 30.0)])
@pytest.mark.parametrize("kind", ["square", "hexagonal", "whole pixels", "holes"])
def test_sections_over_one_another_are_noted_where_nobody_names_them(kind: str, shift: tuple[float, float]) -> None:
    points = disturbed(kind, 20)
    [note] = slide(np.concatenate([points, points + np.array(shift)])).notes
    assert "% of the spots lie closer to another one than the pitch of their lattice, " in note
    assert "if these are several sections over one another, split them with --library-key COLUMN" in note


def test_one_section_with_a_label_is_nothing_to_speak_of() -> None:
    assert slide(lattice(), library_id=np.repeat("A", 100)).notes == ()


@pytest.mark.parametrize("form", ["{0}-{1}", "{0}_{1}", "{0}-section{1}", "A{1}_{0}", "{2}-{1}", "s{1}-{2}"])
@pytest.mark.parametrize("strange", [0, 3])
def test_sequenced_barcodes_that_repeat_tell_sections(form: str, strange: int) -> None:
    """anndata.concat leaves them where nobody keeps a column: over one another, and side by side."""
    names = [form.format(barcode(number), part, f"{number}x3") for part in "01" for number in range(100)]
    names[:strange] = [f"control{i}" for i in range(strange)]
    coords = np.concatenate([lattice(), lattice() + 60.0])
    with pytest.raises(SeveralSections, match="barcodes tell of [23] sections .*, which lie over one another"):
        slide(coords, barcodes=names)
    apart = slide(np.concatenate([lattice(), lattice() + 9000.0]), barcodes=names)
    assert "do not lie over one another" in apart.notes[0]


@pytest.mark.parametrize(
    "names",
    [
        [barcode(number) for number in range(100)],
        [f"{barcode(number)}-s1" for number in range(100)],
        [f"{x}_{y}" for x in range(10) for y in range(10)],
        [f"{x}x{y}" for x in range(10) for y in range(10)],
        [f"s_008um_{x:05d}_{y:05d}-1" for x in range(10) for y in range(10)],
    ],
    ids=["visium", "suffix", "patches", "array", "hd"],
)
def test_names_of_one_section_are_no_sections(names: list[str]) -> None:
    assert slide(lattice(), barcodes=names).notes == ()


def test_equal_barcodes_at_other_places_may_be_of_two_sections() -> None:
    coords = np.concatenate([lattice(), lattice() + 9000.0])
    names = [barcode(number) for _ in "01" for number in range(100)]
    with pytest.raises(InputError, match=r"100 duplicated barcodes, such as A+-1 \(2 places: .*--library-key COLUMN"):
        slide(coords, barcodes=names)
    with pytest.raises(InputError, match=r"1 duplicated barcodes, such as a; make them unique"):
        slide(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]), barcodes=["a", "a", "b"])


@pytest.mark.parametrize("n", [2, 3, 100])
def test_spots_at_one_place_are_refused(n: int) -> None:
    with pytest.raises(InputError, match=f"slide s: coords: all {n} spots lie at one place; give the centre of each"):
        slide(np.full((n, 2), 7.0))
    assert slide(np.full((1, 2), 7.0)).notes == ()


def test_places_that_are_shared_are_noted_or_refused() -> None:
    coords = lattice()
    coords[7] = coords[3]
    assert slide(coords).notes == ("1 of 100 spots lie where another one does",)
    with pytest.raises(
        SeveralSections, match=r"100 of 200 spots lie where another one does; if they are several sections"
    ):
        slide(np.concatenate([lattice(), lattice()]))


def test_a_third_coordinate_is_dropped_only_if_it_says_nothing() -> None:
    flat = np.column_stack([lattice(), np.full(100, 5.0)])
    made = slide(flat)
    assert np.array_equal(made.coords, lattice())
    assert made.notes == ()
    flat[50:, 2] = 15.0
    with pytest.raises(
        SeveralSections, match=r"third coordinate of 2 values, .* --library-key COLUMN.*; else leave it out"
    ):
        slide(flat)


def test_parts_of_a_slide_are_not_looked_at_again() -> None:
    coords = lattice()
    coords[7] = coords[3]
    part = slide(coords, library_id=np.repeat("A", 100)).subset(np.array([3, 7]))
    assert part.n_spots == 2
    assert list(part.library_id) == ["A", "A"]
    assert dataclasses.replace(part, coords=lattice()[:2]).n_spots == 2


@given(st.floats(-3.0, 3.0), st.floats(1e-3, 1e5), st.integers(2, 60))
def test_spacing_is_the_pitch_wherever_a_lattice_lies(angle: float, pitch: float, side: int) -> None:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = (lattice(side, 1.0) @ turn) * pitch
    assert spacing(np.concatenate([points, points[:1]])) == pytest.approx(pitch, rel=1e-6)


def test_one_place_has_no_spacing() -> None:
    assert spacing(np.zeros((1, 2))) is None
    assert spacing(np.zeros((5, 2))) is None

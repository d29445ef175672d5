"""Which spots lie on a lattice, and which of their distances are equal there."""

from __future__ import annotations

import torch
from torch import Tensor

from ..threads import blocks_of
from .order import slide_of_rows
from .table import EDGES_AT_ONCE, MISSING

TIE_TOLERANCE = 1e-6
"""On a lattice, distances that differ by no more than this, relative to the pitch, are tied: the smaller spot index
comes first."""

RESOLUTION_STEPS = 4
"""On a lattice, distances that differ by no more than this many rounding steps of the coordinates as they came in are
tied as well: float32 pixels of a slide of 20,000 pixels are rounded to 0.002. Rounding moves two distances from a spot
apart by up to 2.83 steps (half a step in each of the coordinates of three spots)."""

WITNESSES = 8
"""A spot and this many nearest ones say whether it lies on a lattice, whatever K is: inside any lattice they stand in
pairs on opposite sides, which are four ties."""

NEAR_MISSES = 8
"""Two distances next to each other in their order, which are not tied but within so many tolerances, are a near miss.

Where distances are independent, those are seven times as many as ties; on a lattice, where distances are equal or
clearly apart, there are next to none. A spot lies on a lattice if it and its witnesses see, together, at least as many
ties as they are, and more than twice as many as near misses. Counted, in float64 and in float32 at 20,000 and 100,000
pixels, 10,000 spots at a time: no uniform or clustered ones, whatever their density, and none of a hexagonal lattice
jittered by 0.1 % of its pitch or more (in float32, by 0.05 %: 1 in 10,000; by 0.02 %, ten roundings: most); all of
hexagonal, square and rectangular lattices, at edges too and with half of the spots missing; all of oblique ones, and
with 30 % or 50 % missing all but 0.4 % or 2.4 %."""

PITCHES = 64
"""A tolerance of more than the pitch over this tells nothing from anything: no lattice."""


def rounding_steps(points: Tensor, resolution: Tensor, slide_ptr: Tensor) -> Tensor:
    """``resolution`` [N], but 0 in slides of whole and half numbers alone (pixels, and centres of patches): those are
    exact whatever they came in as. A row of a lattice may be whole, and the next one not, so slides are asked."""
    slide = slide_of_rows(slide_ptr, points.device)
    fractional = (2 * points != (2 * points).round()).any(dim=1)
    rounded = torch.zeros(len(slide_ptr) - 1, dtype=torch.bool, device=points.device)
    rounded[slide[fractional]] = True
    return resolution.masked_fill(~rounded[slide], 0)


def lattice_tolerance(points: Tensor, nearest: Tensor, resolution: Tensor) -> Tensor:
    """Distances from a spot that differ by no more than this are equal: 0 where the spot does not lie on a lattice.

    On one it is :data:`TIE_TOLERANCE` of the pitch (the distance to the nearest other place), or, if that is more,
    :data:`RESOLUTION_STEPS` of the coarsest rounding among the spot and its witnesses; :data:`NEAR_MISSES` says what a
    lattice is. Where nothing is rounded, what is equal is exactly equal, and needs no tolerance.

    Args:
        points: [N, 2] float64.
        nearest: [N, :data:`WITNESSES`] int64 rows, in the order of distance and then spot index.
        resolution: [N] float64 rounding step of each spot's coordinates, 0 where they are exact.

    Returns:
        [N] float64.
    """
    n, size = len(points), max(1, EDGES_AT_ONCE // WITNESSES)
    blocks = blocks_of(n, size)
    # What is missing (-1) is the last.
    places = torch.nn.functional.pad(points.T, (0, 1), value=torch.inf)
    steps = torch.nn.functional.pad(resolution, (0, 1))
    tolerance, counts = torch.zeros_like(resolution), nearest.new_zeros(2, n + 1)
    for rows in blocks:
        tolerance[rows], counts[:, rows] = _count_ties(places, steps, rows, nearest[rows])
    for rows in blocks:
        witnesses = nearest[rows]
        ties, misses = counts[:, rows] + counts[:, witnesses].sum(dim=-1)
        asked = 1 + (witnesses != MISSING).sum(dim=1)
        tolerance[rows] *= (ties >= asked) & (ties > 2 * misses)
    return tolerance


def _count_ties(places: Tensor, steps: Tensor, rows: slice, witnesses: Tensor) -> tuple[Tensor, Tensor]:
    """The tolerance [n] of each row if it lies on a lattice, 0 if it cannot, and [2, n] its ties and near misses."""
    offsets = places[:, witnesses] - places[:, rows, None]
    distance = _length(offsets)
    pitch = distance.masked_fill(distance == 0, torch.inf).amin(dim=1)
    step = torch.maximum(steps[rows], steps[witnesses].amax(dim=1))
    tolerance = torch.maximum(TIE_TOLERANCE * pitch, RESOLUTION_STEPS * step)
    tolerance.masked_fill_((step == 0) | (PITCHES * tolerance >= pitch), 0)
    gap, near = distance.diff(dim=1), NEAR_MISSES * tolerance[:, None]
    # Two spots in one place, or next to it, are at one distance from all others, and make no lattice.
    apart = _length(offsets.diff(dim=2)) > near
    tied, missed = (apart & (gap <= reach) for reach in (tolerance[:, None], near))
    ties, misses = tied.sum(dim=1), (missed & ~tied).sum(dim=1)
    return tolerance, torch.stack([ties * (tolerance > 0), misses])


def _length(offsets: Tensor) -> Tensor:
    """[n, K] of offsets [2, n, K], rounded alike on every device."""
    x, y = offsets.square().unbind()
    return (x + y).sqrt()

"""Exact K nearest neighbours of 2-D points, equal entry by entry to ``knn_graph`` of ``stflow_fast/graph``.

What it computes, for every row i of the packed slides, among the rows of its slide but itself:

    points [N, 2] float64, code [N], slide_ptr [S + 1], tied [N], spot [N]  ->  neighbors [N, K] rows, -1 where missing

Sorted distances d_1 <= d_2 <= ... form tie groups: d_m joins the group of d_(m-1) if d_m - d_(m-1) is at most tied_i,
which is 0 except on lattices. The order is (group, spot). Distances are those of the k-d tree to the last bit.

Where it looks (torch): codes sorted by (slide, Morton code) are a grid of every level at once, since a cell of the
2^b x 2^b grid is a range of them. Each query chooses its own level, the finest at which its cell holds about K / 4
other spots, so density may differ by any factor within a slide. Its window is the 3 x 3 cells around it.

What a query does (kernel): it passes over the spots of its window, again and again. A pass finds the nearest distance
beyond the current group, how far the group reaches, and the group's lowest spot not yet reported. By these the group
grows, or the spot is reported, or the next group begins. Nothing is kept but five numbers, so there is no list of
candidates that could overflow. Distances beyond the border, the nearest side of the window behind which the slide
goes on, are not known. A query that would need them stops, and begins again with a window of the next coarser level;
at the coarsest the window is the slide.

Work per query, counted, not measured: K + 1 passes where nothing is tied, and one or two more for each group of ties.
At K = 8, 60,000 spots: 9 passes over 56 spots of a hexagonal lattice, over 63 of uniform ones, over 107 where density
differs by 10^5; at K = 64, 65 passes over 240, 450 and 700. A pass costs four float64 operations and six comparisons
a spot. Those that stop and begin again: less than 1% on the lattice, 6% (K = 8) and 15% (K = 64) of uniform spots.

Spots beyond the first K + 1 of one place are nobody's neighbours and are left out, so a pile costs no more than K + 1
spots. The worst case is quadratic: a slide whose spots lie in few of the 2^16 x 2^16 cells without lying in one place,
as an outlier at 10^5 times the tissue's extent makes it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stflow_fast.errors import InputError
from stflow_fast.graph import (
    GRID_BITS,
    MISSING,
    SpotGrid,
    morton_code,
    slide_keys,
    slide_of_rows,
    spot_grid,
)

from .launch import architecture, device_scope, launch_of
from .tiles import settle_keys

COLS = 8
"""Spots of a cell looked at together: at K = 8 a cell holds 7 on average."""

QUERIES_AT_ONCE = 2**17
"""Queries whose windows are in memory together: 120 MB of them, and enough programs for every multiprocessor."""

BORDER_SHRINKAGE = 1e-9
"""Relative; the position in the grid is rounded by 2^16 steps of float64, 1e-11 of a cell."""

NOBODY = tl.constexpr(2**31 - 1)
"""Above every spot."""

FUSED = False
"""Whether the compiler may fuse products and sums. A fused x * x + y * y is not what the k-d tree computes, nor the
same as y * y + x * x, so that ties would be broken. It costs 21 registers, and 8 instructions in float64."""


@triton.jit
def _pass(
    query_x, query_y, own, low, high, reach, last, i_query, m_active, n,
    first_ptr, stop_ptr, point_ptr, spot_ptr,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One look at all spots of the windows. Distances are squared. Of each query, [BLOCK]:

    the nearest beyond ``high``, the farthest beyond ``high`` and within ``reach``, the lowest spot after ``last`` among
    the members, ``low`` to ``high``, and the number of members after ``last``.
    """
    nearest = tl.full([BLOCK, COLS], float("inf"), tl.float64)
    farthest = tl.full([BLOCK, COLS], -1.0, tl.float64)
    lowest = tl.full([BLOCK, COLS], NOBODY, tl.int32)
    members = tl.zeros([BLOCK, COLS], tl.int32)
    i_column = tl.arange(0, COLS)
    for cell in range(CELLS):
        first = tl.load(first_ptr + cell * n + i_query, mask=m_active, other=0)  # [BLOCK]
        stop = tl.load(stop_ptr + cell * n + i_query, mask=m_active, other=0)  # [BLOCK]
        longest = tl.max(stop - first, axis=0)
        step = 0
        while step < longest:
            i_spot = first[:, None] + step + i_column[None, :]  # [BLOCK, COLS]
            m_spot = i_spot < stop[:, None]  # [BLOCK, COLS]
            point = point_ptr + i_spot.to(tl.int64) * 2
            x = tl.load(point, mask=m_spot, other=0.0) - query_x[:, None]
            y = tl.load(point + 1, mask=m_spot, other=0.0) - query_y[:, None]
            spot = tl.load(spot_ptr + i_spot, mask=m_spot, other=NOBODY)
            square = x * x + y * y  # [BLOCK, COLS]
            m_other = m_spot & (spot != own[:, None])
            m_beyond = m_other & (square > high[:, None])
            nearest = tl.minimum(nearest, tl.where(m_beyond, square, float("inf")))
            farthest = tl.maximum(farthest, tl.where(m_beyond & (square <= reach[:, None]), square, -1.0))
            m_member = m_other & (square >= low[:, None]) & (square <= high[:, None]) & (spot > last[:, None])
            lowest = tl.minimum(lowest, tl.where(m_member, spot, NOBODY))
            members += m_member.to(tl.int32)
            step += COLS
    return tl.min(nearest, axis=1), tl.max(farthest, axis=1), tl.min(lowest, axis=1), tl.sum(members, axis=1)


@triton.jit(do_not_specialize=["n", "k"])
def nearest_kernel(
    query_ptr,  # [n, 2] float64
    own_ptr,  # [n] int32 spot of the query
    tied_ptr,  # [n] float64
    border_ptr,  # [n] float64
    first_ptr,  # [CELLS, n] int32 first candidate of each cell of the window
    stop_ptr,  # [CELLS, n] int32
    point_ptr,  # [M, 2] float64 candidates
    spot_ptr,  # [M] int32
    found_ptr,  # [n, k] int32 spots; what is not found is left as it is
    settled_ptr,  # [n] int32 whether the window was large enough
    n,
    k,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):
    i_query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    m_query = i_query < n
    query_x = tl.load(query_ptr + 2 * i_query, mask=m_query, other=0.0)
    query_y = tl.load(query_ptr + 2 * i_query + 1, mask=m_query, other=0.0)
    own = tl.load(own_ptr + i_query, mask=m_query, other=-1)
    tied = tl.load(tied_ptr + i_query, mask=m_query, other=0.0)
    border = tl.load(border_ptr + i_query, mask=m_query, other=0.0)
    found = found_ptr + i_query.to(tl.int64) * k
    # The group: squared distances from low to high. Before the first it is empty, and as closed as one can be.
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], -1.0, tl.float64)
    last = tl.full([BLOCK], -1, tl.int32)
    count = tl.zeros([BLOCK], tl.int32)
    settled = tl.zeros([BLOCK], tl.int32)
    active = m_query.to(tl.int32)
    while tl.max(active, axis=0) > 0:
        m_active = active > 0
        outer = tl.where(high < 0, float("-inf"), tl.sqrt(tl.maximum(high, 0.0)))
        # A little less than the tolerance, so that rounding lets nobody in who is not tied to the farthest member.
        attached = outer + tied * (1 - 1e-8)
        reach = tl.where(high < 0, -1.0, attached * attached)
        nearest, farthest, lowest, members = _pass(
            query_x, query_y, own, low, high, reach, last, i_query, m_active, n,
            first_ptr, stop_ptr, point_ptr, spot_ptr, CELLS, BLOCK, COLS,
        )  # fmt: skip
        ahead = tl.sqrt(nearest)
        m_known = ahead < border
        ahead = tl.minimum(ahead, border)
        m_nothing = ahead == float("inf")
        m_closed = m_nothing | (ahead - outer > tied)
        m_report = m_active & m_closed & (members > 0)
        tl.store(found + count, lowest, mask=m_report)
        count += m_report.to(tl.int32)
        last = tl.where(m_report, lowest, last)
        m_exhausted = m_closed & (members <= 1)
        m_full = (count == k) | (m_exhausted & m_nothing)
        settled = tl.where(m_active & m_full, 1, settled)
        m_stuck = (m_exhausted | ~m_closed) & ~m_known
        active = tl.where(m_full | m_stuck, 0, active)
        m_grows = m_active & m_known & ~m_closed
        m_opens = m_active & m_known & m_exhausted
        low = tl.where(m_opens, nearest, low)
        high = tl.where(m_grows, tl.maximum(nearest, farthest), tl.where(m_opens, nearest, high))
        last = tl.where(m_opens, -1, last)
    tl.store(settled_ptr + i_query, settled, mask=m_query)


def nearest(points: Tensor, code: Tensor, slide_ptr: Tensor, tied: Tensor, spot: Tensor, k: int) -> Tensor:
    """The ``k`` nearest other spots of each, never across slides, in the order of ``stflow_fast.graph.knn_graph``.

    A ``NeighborSearch`` for ``SpotGraph.build``. It waits for the device several times, so it is no part of a forward.

    Args:
        points: [N, 2] float64 in space order, finite.
        code: [N] int64 Morton codes (``stflow_fast.graph.morton_code``), sorted within each slide.
        slide_ptr: [S + 1] int64 first row of each slide, N at the end; any device.
        tied: [N] float64; distances from a spot that differ by at most this are tied.
        spot: [N] int64, a permutation: the lower of tied spots comes first.
        k: neighbours wanted, at least 1.

    Returns:
        [N, k] int64 rows, on the device of ``points``; ``MISSING`` where a slide has k spots or fewer.

    Raises:
        InputError: an argument of another shape, type or device, or out of order; the message names it.
    """
    slide_ptr = slide_ptr.cpu()
    _check(points, code, slide_ptr, tied, spot, k)
    table = torch.full((len(points), k), MISSING, dtype=torch.int64, device=points.device)
    if not len(points):
        return table
    points = points.contiguous()
    slide = slide_of_rows(slide_ptr, points.device)
    key = slide_keys(code, slide)
    grid = spot_grid(points, slide_ptr)
    if (key.diff() < 0).any() or (code != morton_code(grid.position.long())).any():
        raise InputError("code: must be the Morton codes of the points, sorted within each slide")
    row_of = _inverse(spot)
    candidates = _candidates(points, key, spot, k + 1)
    fine, coarse = _level(key, k // 4 + 1), _level(key, k)
    for rows in torch.arange(len(points), device=points.device).split(QUERIES_AT_ONCE):
        level = fine[rows]
        for attempt in itertools.count():
            if attempt == 2:
                # Among copies of itself a query fills the finest cell, and finds nobody else until far coarser ones.
                level = torch.minimum(level, coarse[rows])
            window = _window(SpotGrid(*(part[rows] for part in grid)), level, slide[rows], candidates.key)
            found, settled = _launch(points[rows], spot[rows].int(), tied[rows], window, candidates, k)
            found = found[settled].long()
            table[rows[settled]] = torch.where(found == MISSING, MISSING, row_of[found])
            rows, level = rows[~settled], level[~settled] - 1
            if not len(rows):
                break
    return table


class _Candidates(NamedTuple):
    points: Tensor  # [M, 2] float64
    key: Tensor  # [M] int64, sorted
    spot: Tensor  # [M] int32


class _Window(NamedTuple):
    first: Tensor  # [9, n] int32 candidates
    stop: Tensor  # [9, n] int32
    border: Tensor  # [n] float64 distance below which all spots of the slide are in the window


def _check(points: Tensor, code: Tensor, slide_ptr: Tensor, tied: Tensor, spot: Tensor, k: int) -> None:
    n = len(points)
    expected = {
        "points": (points, (n, 2), torch.float64),
        "code": (code, (n,), torch.int64),
        "tied": (tied, (n,), torch.float64),
        "spot": (spot, (n,), torch.int64),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            found = f"{list(tensor.shape)} {tensor.dtype}"
            raise InputError(f"{name}: must have shape {list(shape)} and type {dtype}, not {found}")
        if tensor.device != points.device:
            raise InputError(f"{name}: must be on {points.device} like the points, not on {tensor.device}")
    if not points.is_cuda and isinstance(nearest_kernel, triton.JITFunction):
        raise InputError(f"points: must be on a CUDA device (or set TRITON_INTERPRET=1), not on {points.device}")
    if n > NOBODY.value - COLS:
        raise InputError(f"points: {n} are too many for 32-bit indices; pack fewer slides")
    steps = slide_ptr.diff()
    if slide_ptr.ndim != 1 or len(slide_ptr) < 2 or slide_ptr[0] != 0 or slide_ptr[-1] != n or (steps < 0).any():
        raise InputError(f"slide_ptr: must rise from 0 to the number of spots ({n})")
    if k < 1:
        raise InputError(f"k: must be at least 1, not {k}")


def _inverse(spot: Tensor) -> Tensor:
    """[N] row of each spot."""
    low, high = spot.aminmax()
    row_of = torch.full_like(spot, MISSING)
    if low >= 0 and high < len(spot):
        row_of[spot] = torch.arange(len(spot), device=spot.device)
    if (row_of == MISSING).any():
        raise InputError("spot: must hold every index once")
    return row_of


def _candidates(points: Tensor, key: Tensor, spot: Tensor, most: int) -> _Candidates:
    """All spots but those beyond the first ``most`` of every place, which are nobody's neighbours."""
    if (key[most:] != key[:-most]).all():
        return _Candidates(points, key, spot.int())
    order = spot.argsort()
    for column in (points[:, 1], points[:, 0], key):
        order = order[column[order].argsort(stable=True)]
    index = torch.arange(len(order), device=order.device)
    moved = (points[order].diff(dim=0) != 0).any(dim=1) | (key[order].diff() != 0)
    first = torch.where(torch.nn.functional.pad(moved, (1, 0)), index, 0).cummax(dim=0).values
    kept = order[index - first < most].sort().values
    return _Candidates(points[kept], key[kept], spot[kept].int())


def _level(key: Tensor, others: int) -> Tensor:
    """[N] finest level at which the cell of each row holds ``others`` more rows of its slide, all of them neighbours in
    the order; 0 where there is none."""
    others = min(others, len(key) - 1)
    apart = key[others:] ^ key[: len(key) - others]
    bits = torch.frexp(apart.double()).exponent
    shared = ((2 * GRID_BITS - bits) // 2).clamp(min=0)
    return torch.nn.functional.pad(shared, (others, others)).unfold(0, others + 1, 1).amax(dim=1).long()


def _window(grid: SpotGrid, level: Tensor, slide: Tensor, key: Tensor) -> _Window:
    """The 3 x 3 cells around each query at its ``level`` [n], as ranges of the candidates' ``key`` [M]."""
    shift = (GRID_BITS - level).unsqueeze(1)
    cell = grid.position.long() >> shift  # [n, 2]
    below, above = (cell - 1) << shift, (cell + 2) << shift
    sides = torch.cat([grid.position - below, above - grid.position], dim=1)
    goes_on = torch.cat([below > 0, above <= grid.last], dim=1)
    reach = sides * grid.width.unsqueeze(1) * (1 - BORDER_SHRINKAGE)
    border = torch.where(goes_on, reach, torch.inf).amin(dim=1)
    step = torch.arange(-1, 2, device=key.device)
    around = cell + torch.cartesian_prod(step, step).unsqueeze(1)  # [9, n, 2]
    inside = ((around >= 0) & (around << shift <= grid.last)).all(dim=-1)
    code = morton_code(around.clamp(min=0))
    first, stop = (
        torch.searchsorted(key, slide_keys((code + end) << 2 * shift.squeeze(1), slide), out_int32=True)
        for end in (0, 1)
    )
    return _Window(first, torch.where(inside, stop, first), border)


def _launch(
    queries: Tensor, own: Tensor, tied: Tensor, window: _Window, candidates: _Candidates, k: int
) -> tuple[Tensor, Tensor]:
    """Spots [n, k] int32, and [n] bool whether they are settled."""
    n = len(queries)
    found = torch.full((n, k), MISSING, dtype=torch.int32, device=queries.device)
    settled = torch.empty(n, dtype=torch.int32, device=queries.device)
    launch = launch_of("nearest", architecture(queries.device), "float64")
    with device_scope(queries):
        nearest_kernel[(triton.cdiv(n, launch.rows),)](
            queries, own, tied, *(window.border, window.first, window.stop), candidates.points, candidates.spot,
            found, settled, n, k, len(window.first), launch.rows, COLS, enable_fp_fusion=FUSED, **launch.options,
        )  # fmt: skip
    return found, settled.bool()


settle_keys(globals())

"""The geometry of edges: offsets on the frames of their neighbourhood, and lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import EDGES_AT_ONCE, MISSING

ISOTROPY_TOLERANCE = 1e-6
"""A neighbourhood whose two eigenvalues differ by less than this, relative to their sum, has no principal axis; on a
lattice the tolerance grows to what the tolerance of its distances makes of them."""


def edge_geometry(
    coords: Tensor, neighbors: Tensor, tied: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Frame-projected offsets and distances of all edges.

    For spot i with neighbours j: the offsets c_j - c_i, centred on their mean, are projected on the eigenvectors of
    their 2 x 2 covariance (ascending eigenvalues, as ``torch.linalg.eigh`` orders them; closed form here). The four
    sign choices of the two axes are the frames of frame averaging (Puny et al. 2022; STFlow section 4.2).

    An isotropic neighbourhood (every regular lattice has them) has no principal axes; its second axis then points to
    its first neighbour at a distance above zero, which moves with the tissue as a frame must.

    Args:
        coords: [N, 2] float64.
        neighbors: [N, K] int64, :data:`MISSING` where there is none.
        tied: [N] float64 of :func:`.lattices.lattice_tolerance`; all 0 when None.
        dtype: of the result, which is computed in float64.

    Returns:
        [N, K, 3]: projections on the minor and the major axis, and |c_j - c_i|. Zero for missing neighbours.
    """
    tied = coords.new_zeros(len(coords)) if tied is None else tied
    geometry = torch.empty(*neighbors.shape, 3, dtype=dtype, device=coords.device)
    rows = max(1, EDGES_AT_ONCE // neighbors.shape[1])
    for start in range(0, len(neighbors), rows):
        part = slice(start, start + rows)
        geometry[part] = _project_edges(coords, coords[part], neighbors[part], tied[part])
    return geometry


def _project_edges(coords: Tensor, centers: Tensor, neighbors: Tensor, tied: Tensor) -> Tensor:
    """[n, K, 3] float64 of the spots at ``centers`` [n, 2]."""
    present = (neighbors != MISSING).unsqueeze(-1)
    offsets = (coords[neighbors.clamp(min=0)] - centers.unsqueeze(1)) * present
    distance = offsets.norm(dim=-1, keepdim=True)
    mean = offsets.sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (offsets - mean) * present
    xx, yy = centred.square().sum(dim=1).unbind(-1)
    xy = centred.prod(dim=-1).sum(dim=1)
    angle = 0.5 * torch.atan2(2 * xy, xx - yy)
    gap = torch.hypot(2 * xy, xx - yy)
    spread = xx + yy
    isotropic = gap <= torch.maximum(ISOTROPY_TOLERANCE * spread, tied * (neighbors.shape[1] * spread).sqrt())
    first = offsets[torch.arange(len(offsets), device=offsets.device), (distance.squeeze(-1) > 0).int().argmax(dim=1)]
    angle = torch.where(isotropic, torch.atan2(first[:, 1], first[:, 0]), angle)
    cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
    x, y = centred.unbind(-1)
    return torch.stack([cos * y - sin * x, cos * x + sin * y, distance.squeeze(-1)], dim=-1)

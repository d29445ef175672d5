"""SpotGraph: spots of one or many slides in space order, their neighbours and the geometry of their edges.

Everything here depends on coordinates alone, so it is made once per slide and reused by every layer and flow step.
It is computed in float64. Neighbours are the exact ones, by distance and then spot index; on a lattice, where many
spots are at one distance, distances within the rounding of the coordinates are equal
(:func:`.lattices.lattice_tolerance`), so that a rotated, mirrored or shifted lattice yields the same table and, to
rounding, the same geometry. They are found on the CPU by scipy's k-d tree, which defines them, or on a device by a
:class:`NeighborSearch` that is handed in (``stflow_fast.kernels.neighbors.nearest``).
"""

from .geometry import edge_geometry
from .lattices import WITNESSES
from .neighbors import knn_graph
from .order import GRID_BITS, SpotGrid, morton_code, slide_keys, slide_of_rows, space_order, spot_grid
from .spot_graph import SpotGraph
from .table import MISSING, NeighborSearch, transpose_neighbors

__all__ = [
    "GRID_BITS",
    "MISSING",
    "NeighborSearch",
    "SpotGraph",
    "SpotGrid",
    "WITNESSES",
    "edge_geometry",
    "knn_graph",
    "morton_code",
    "slide_keys",
    "slide_of_rows",
    "space_order",
    "spot_grid",
    "transpose_neighbors",
]

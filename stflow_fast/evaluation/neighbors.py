"""The mean over a spot's nearest neighbours: of features, of predictions, and in Moran's I."""

from __future__ import annotations

import numpy as np
import scipy.sparse

from ..graph import MISSING, knn_graph

NEAREST = 8
"""Neighbours of a spot."""


def neighbor_weights(coords: np.ndarray) -> scipy.sparse.csr_matrix:
    """[N, N] float64 whose product with values is their mean over each spot's :data:`NEAREST` nearest other spots of
    one slide, or over all others where it has fewer. A spot alone on its slide is its own neighbour.

    Args:
        coords: [N, 2] positions, any unit.

    Raises:
        InputError: as :func:`stflow_fast.graph.knn_graph`.
    """
    neighbors = knn_graph(coords, NEAREST).numpy()
    if len(neighbors) == 1:
        return scipy.sparse.identity(1, format="csr")
    present = neighbors != MISSING
    count = present.sum(axis=1)
    starts = np.concatenate([[0], np.cumsum(count)])
    return scipy.sparse.csr_matrix((np.repeat(1.0 / count, count), neighbors[present], starts), (len(count),) * 2)


def neighborhood_mean(coords: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[..., N, .] mean of ``values`` [..., N, .] over each spot and its neighbours, see :func:`neighbor_weights`."""
    weights = neighbor_weights(coords)
    share = (1.0 / (1 + np.diff(weights.indptr)))[:, None]
    flat = values.reshape(-1, *values.shape[-2:])
    return np.stack([share * each + (1 - share) * (weights @ each) for each in flat]).reshape(values.shape)


def neighbor_mean(coords: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[N, .] float64 mean of ``values`` [N, .] over each spot's neighbours, see :func:`neighbor_weights`."""
    mean: np.ndarray = neighbor_weights(coords) @ np.asarray(values, dtype=np.float64)
    return mean

"""Ridge regression for many alphas at the cost of one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RidgePath:
    """Ridge with intercept, |Y - X C|^2 + alpha |C|^2 of centred X and Y, solved for every alpha at once.

    With the eigenvectors V and eigenvalues of X^T X, C = V diag(1 / (eigenvalue + alpha)) V^T X^T Y; with those, U, of
    X X^T, C = X^T U diag(1 / (eigenvalue + alpha)) U^T Y. The smaller of the two is decomposed (Hastie, Tibshirani &
    Friedman, The Elements of Statistical Learning, 3.4 and 18.3.5).

    Attributes:
        centre: [D] mean of X.
        mean: [G] mean of Y.
        directions: [D, r] V, or X^T U.
        eigenvalues: [r].
        targets: [r, G] V^T X^T Y, or U^T Y.
    """

    centre: np.ndarray
    mean: np.ndarray
    directions: np.ndarray
    eigenvalues: np.ndarray
    targets: np.ndarray

    @classmethod
    def fit(cls, design: np.ndarray, target: np.ndarray) -> RidgePath:
        """From a design [N, D] and a target [N, G]; in float64."""
        centre, mean = design.mean(axis=0, dtype=np.float64), target.mean(axis=0, dtype=np.float64)
        x, y = design - centre, target - mean
        if len(x) >= x.shape[1]:
            eigenvalues, directions = np.linalg.eigh(x.T @ x)
            targets = directions.T @ (x.T @ y)
        else:
            eigenvalues, vectors = np.linalg.eigh(x @ x.T)
            directions, targets = x.T @ vectors, vectors.T @ y
        return cls(centre, mean, directions, eigenvalues.clip(min=0.0), targets)

    def project(self, design: np.ndarray) -> np.ndarray:
        """[n, r] of a design [n, D]: what a prediction needs of it, whatever alpha is."""
        projected: np.ndarray = (design - self.centre) @ self.directions
        return projected

    def predict(self, projected: np.ndarray, alpha: float) -> np.ndarray:
        """[n, G] of :meth:`project`'s [n, r]; alpha above 0."""
        predicted: np.ndarray = (projected / (self.eigenvalues + alpha)) @ self.targets + self.mean
        return predicted

"""Slide: the spots of one tissue section, checked once when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from ..arrays import as_array, as_counts, as_names
from ..errors import InputError

NORMALIZATIONS = ("log1p", "cp10k_log1p", "counts")
"""What a model predicts: log1p of raw counts (the field's default), log1p of counts per 10,000, or raw counts."""


@dataclass(frozen=True)
class Slide:
    """Spots with patch embeddings, and expression where it is known.

    Arrays may be given in every make that :mod:`stflow_fast.arrays` takes, names in every sequence; they become what
    stands here, in the memory of what was given if it is that already.

    Attributes:
        id: name of the slide; with a seed it decides the noise of a sample.
        features: [N, F] float32 patch embeddings.
        coords: [N, 2] float64 spot centres (x, y) in level-0 (full-resolution) pixels.
        barcodes: [N] unicode, unique.
        counts: [N, G_all] raw counts, float32 CSR; None where there is no expression.
        gene_names: G_all names of the columns of ``counts``.
        micron_per_pixel: size of a level-0 pixel, None where unknown.
        notes: what a reader left out, for people.

    Raises:
        InputError: no spots, what is no array of numbers or no name, NaN or infinite features or coordinates (with
            their number), duplicated barcodes, counts that are negative or not finite, or shapes that disagree.
    """

    id: str
    features: np.ndarray
    coords: np.ndarray
    barcodes: np.ndarray
    counts: scipy.sparse.csr_matrix | None = None
    gene_names: tuple[str, ...] = ()
    micron_per_pixel: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._convert()
        n = self.n_spots
        for name in ("features", "coords"):
            broken = int((~np.isfinite(getattr(self, name))).any(axis=1).sum())
            if broken:
                raise InputError(
                    f"slide {self.id}: {name} of {broken} of {n} spots are NaN or infinite; remove those spots"
                )
        names, times = np.unique(self.barcodes, return_counts=True)
        if len(names) < n:
            first = names[times.argmax()]
            raise InputError(
                f"slide {self.id}: {n - len(names)} duplicated barcodes, such as {first}; make them unique"
            )
        self._check_counts()

    def _convert(self) -> None:
        """Make every field what its attribute says; its shape is right then."""
        where = f"slide {self.id}: "
        barcodes = as_names(f"{where}barcodes", self.barcodes)
        n = len(barcodes)
        if n == 0:
            raise InputError(f"slide {self.id}: has no spots")
        genes = tuple(as_names(f"{where}gene_names", self.gene_names).tolist())
        converted = {
            "features": as_array(f"{where}features", self.features, (n, "F"), np.float32, "one row per barcode"),
            "coords": as_array(f"{where}coords", self.coords, (n, 2), np.float64, "one row per barcode"),
            "barcodes": barcodes,
            "gene_names": genes,
        }
        if self.counts is not None:
            mend = "one row per barcode, one column per gene name"
            converted["counts"] = as_counts(f"{where}counts", self.counts, (n, len(genes)), mend)
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    def _check_counts(self) -> None:
        if self.counts is None:
            return
        bad = int((~np.isfinite(self.counts.data) | (self.counts.data < 0)).sum())
        if bad:
            raise InputError(f"slide {self.id}: {bad} counts are negative, NaN or infinite; give raw counts")

    @property
    def n_spots(self) -> int:
        return len(self.barcodes)

    @property
    def feature_dim(self) -> int:
        return self.features.shape[1]

    @property
    def total_counts(self) -> np.ndarray:
        """[N] float64: counts of each spot over all genes, its sequencing depth. InputError without counts."""
        return np.asarray(self._known_counts().sum(axis=1, dtype=np.float64)).ravel()

    def expression(self, genes: Sequence[str], normalize: str = "log1p") -> np.ndarray:
        """Expression [N, G] float32 of ``genes``, in their order.

        Raises:
            InputError: no counts, genes that the slide lacks or has twice, or an unknown normalisation.
        """
        counts = self._known_counts()
        column = {name: index for index, name in enumerate(self.gene_names)}
        missing = [name for name in genes if name not in column]
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise InputError(f"slide {self.id}: {len(missing)} of {len(genes)} genes are not in its expression: {some}")
        if len(column) < len(self.gene_names):
            twice = [name for name in genes if self.gene_names.count(name) > 1]
            if twice:
                raise InputError(f"slide {self.id}: gene {twice[0]} stands in several columns; make gene names unique")
        panel = counts[:, [column[name] for name in genes]].toarray()
        return normalize_counts(panel, self.total_counts, normalize)

    def subset(self, index: np.ndarray) -> Slide:
        """The spots of ``index`` (whole numbers or booleans), as a slide of the same id."""
        counts = None if self.counts is None else self.counts[index]
        return dataclasses.replace(
            self,
            features=self.features[index],
            coords=self.coords[index],
            barcodes=self.barcodes[index],
            counts=counts,
        )

    def _known_counts(self) -> scipy.sparse.csr_matrix:
        if self.counts is None:
            raise InputError(f"slide {self.id}: has no expression; give its counts")
        return self.counts


def normalize_counts(counts: np.ndarray, total: np.ndarray, normalize: str) -> np.ndarray:
    """Bring raw counts [N, G] into the unit that is predicted.

    Args:
        counts: raw counts of the panel.
        total: [N] counts over all genes, panel or not.
        normalize: one of :data:`NORMALIZATIONS`.

    Returns:
        [N, G] float32. A spot without any count stays zero.

    Raises:
        InputError: an unknown normalisation.
    """
    if normalize == "counts":
        return counts.astype(np.float32)
    if normalize == "log1p":
        return np.log1p(counts).astype(np.float32)
    if normalize == "cp10k_log1p":
        return np.log1p(counts * (1e4 / np.maximum(total, 1.0))[:, None]).astype(np.float32)
    raise InputError(f"normalize: must be one of {', '.join(NORMALIZATIONS)}, not {normalize!r}")

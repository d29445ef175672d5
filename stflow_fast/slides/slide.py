"""Slide: the spots of one tissue section, checked once when it is made."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse

from ..arrays import as_array, as_counts, as_names
from ..errors import InputError
from .genes import other_spelling, some_of
from .places import check_places
from .rows import StoredRows, rows_of

if TYPE_CHECKING:
    import pandas as pd

NORMALIZATIONS = ("log1p", "cp10k_log1p", "counts")
"""What a model predicts: log1p of raw counts (the field's default), log1p of counts per 10,000, or raw counts."""

FARTHEST = 1e9
"""Pixels that a spot lies from the origin, at the most: 100 m of tissue. What is farther is no place, but what programs
write for a missing one, or no number; distances of 1e11 overflow a model's float32, and it predicts NaN."""


@dataclass(frozen=True)
class Origin:
    """What a file says of its slide beside the spots.

    Attributes:
        path: where it was read from; None of one that was made in memory.
        format: name of the reader, see :data:`stflow_fast.slides.FORMATS`; empty in memory.
        encoder: the patch encoder, as the file or its folder calls it; empty where they do not.
        image_size: (width, height) of the image in level-0 pixels; None where unknown.
        scalefactors: as ``uns["spatial"][library]["scalefactors"]`` has them: ``spot_diameter_fullres`` in level-0
            pixels, ``tissue_hires_scalef``, ...; what is unknown is absent.
        library_scalefactors: the same of each library that the file has, by its name.
        library_key: column of ``obs`` that the slide's ``library_id`` is from; empty where it is from none.
    """

    path: Path | None = None
    format: str = ""
    encoder: str = ""
    image_size: tuple[int, int] | None = None
    scalefactors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    library_scalefactors: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    library_key: str = ""


@dataclass(frozen=True)
class Slide:
    """Spots with patch embeddings, and expression where it is known.

    Arrays may be given in every make that :mod:`stflow_fast.arrays` takes, names in every sequence; they become what
    stands here, in the memory of what was given if it is that already.

    Attributes:
        id: name of the slide; with a seed it decides the noise of a sample.
        features: [N, F] float32 patch embeddings, or :class:`StoredRows`, which are read, and looked through for what
            is NaN, by whoever computes with them; None where there are none.
        coords: [N, 2] float64 spot centres (x, y) in level-0 (full-resolution) pixels. A third coordinate is dropped if
            it is the same for all.
        barcodes: [N] unicode, unique.
        counts: [N, G_all] raw counts, float32 CSR; None where there is no expression.
        gene_names: G_all names of the columns of ``counts``.
        micron_per_pixel: size of a level-0 pixel, None where unknown.
        notes: what a reader left out, and what is strange about where the spots lie, for people.
        obs: [N] what the input says of the spots (its index does not matter); carried into predictions.
        var: [G_all] what the input says of the genes, such as other names of them.
        library_id: [N] the section, or library, of each spot, where the input names them.
        origin: what the file says beside.

    Raises:
        SeveralSections: spots of several sections lie over one another, see :func:`.places.check_places`.
        InputError: no spots, or all at one place, what is no array of numbers or no name, NaN or infinite features or
            coordinates (with their number), coordinates beyond 1e9, duplicated barcodes, counts that are negative or
            not finite, or shapes that disagree.
    """

    id: str
    features: np.ndarray | StoredRows | None
    coords: np.ndarray
    barcodes: np.ndarray
    counts: scipy.sparse.csr_matrix | None = None
    gene_names: tuple[str, ...] = ()
    micron_per_pixel: float | None = None
    notes: tuple[str, ...] = ()
    obs: pd.DataFrame | None = None
    var: pd.DataFrame | None = None
    library_id: np.ndarray | None = None
    origin: Origin = Origin()

    def __post_init__(self) -> None:
        self._convert()
        self._check_finite()
        self._check_barcodes()
        sections = self.library_id, self.origin.library_key
        found = check_places(f"slide {self.id}: ", self.coords, self.barcodes, *sections)
        new = tuple(note for note in found if note not in self.notes)
        object.__setattr__(self, "notes", (*self.notes, *new))
        if self.coords.shape[1] == 3:
            object.__setattr__(self, "coords", np.ascontiguousarray(self.coords[:, :2]))
        self._check_counts()

    def _check_finite(self) -> None:
        for name in ("features", "coords"):
            values = getattr(self, name)
            broken = int((~np.isfinite(values)).any(axis=1).sum()) if isinstance(values, np.ndarray) else 0
            if broken:
                found = f"{name} of {broken} of {self.n_spots} spots are NaN or infinite"
                raise InputError(f"slide {self.id}: {found}; remove those spots")
        far = int((np.abs(self.coords) > FARTHEST).any(axis=1).sum())
        if far:
            found = f"coords of {far} of {self.n_spots} spots are beyond {FARTHEST:.0e} pixels"
            raise InputError(f"slide {self.id}: {found}; remove those spots, or give centres in level-0 pixels")

    def _check_barcodes(self) -> None:
        repeated = self.n_spots - len(set(self.barcodes.tolist()))
        if not repeated:
            return
        names, times = np.unique(self.barcodes, return_counts=True)
        first = names[times.argmax()]
        apart = np.ptp(self.coords[self.barcodes == first], axis=0).any()
        sections = f" ({times.max()} places: if they are of several sections, --library-key COLUMN of obs splits them)"
        found = f"{repeated} duplicated barcodes, such as {first}{sections if apart else ''}"
        raise InputError(f"slide {self.id}: {found}; make them unique")

    def _convert(self) -> None:
        """Make every field what its attribute says; its shape is right then."""
        where = f"slide {self.id}: "
        barcodes = as_names(f"{where}barcodes", self.barcodes)
        n = len(barcodes)
        if n == 0:
            raise InputError(f"slide {self.id}: has no spots")
        genes = tuple(as_names(f"{where}gene_names", self.gene_names).tolist())
        converted = {
            "features": self._converted_features(where, n),
            "coords": self._converted_coords(where, n),
            "barcodes": barcodes,
            "gene_names": genes,
        }
        if self.library_id is not None:
            converted["library_id"] = as_names(f"{where}library_id", self.library_id)
        for name, size in (("library_id", n), ("obs", n), ("var", len(genes))):
            value = converted.get(name, getattr(self, name))
            if value is not None and len(value) != size:
                raise InputError(f"{where}{name}: has {len(value)} rows, not {size}")
        if self.counts is not None:
            mend = "one row per barcode, one column per gene name"
            converted["counts"] = as_counts(f"{where}counts", self.counts, (n, len(genes)), mend)
        for name, value in converted.items():
            object.__setattr__(self, name, value)

    def _converted_features(self, where: str, n: int) -> np.ndarray | StoredRows | None:
        mend = "one row per barcode"
        if self.features is None:
            return None
        if not isinstance(self.features, StoredRows):
            return as_array(f"{where}features", self.features, (n, "F"), np.float32, mend)
        if len(self.features) != n:
            raise InputError(f"{where}features: must have shape [{n}, F], not {list(self.features.shape)}; {mend}")
        return self.features

    def _converted_coords(self, where: str, n: int) -> np.ndarray:
        shape = getattr(self.coords, "shape", ())
        columns = 3 if tuple(shape[-2:]) == (n, 3) else 2
        return as_array(f"{where}coords", self.coords, (n, columns), np.float64, "one row per barcode")

    def _check_counts(self) -> None:
        if self.counts is None:
            return
        bad = int((~np.isfinite(self.counts.data) | (self.counts.data < 0)).sum())
        if bad:
            raise InputError(f"slide {self.id}: {bad} counts are negative, NaN or infinite; give raw counts")

    @property
    def n_spots(self) -> int:
        """N."""
        return len(self.barcodes)

    @property
    def feature_dim(self) -> int:
        """F; 0 without features."""
        return 0 if self.features is None else self.features.shape[1]

    @property
    def total_counts(self) -> np.ndarray:
        """[N] float64: counts of each spot over all genes, its sequencing depth. InputError without counts."""
        return np.asarray(self._known_counts().sum(axis=1, dtype=np.float64)).ravel()

    def expression(self, genes: Sequence[str], normalize: str = "log1p") -> np.ndarray:
        """Expression [N, G] float32 of ``genes``, in their order. Raises InputError as :meth:`panel`."""
        return self.panel(genes, normalize)[:]

    def panel(self, genes: Sequence[str], normalize: str = "log1p") -> Panel:
        """The expression of ``genes`` [N, G], whose rows are made as they are asked for.

        Raises:
            InputError: no counts, genes that the slide lacks or has twice, or an unknown normalisation.
        """
        counts = self._known_counts()
        column = {name: index for index, name in enumerate(self.gene_names)}
        missing = [name for name in genes if name not in column]
        if missing:
            spelling = other_spelling(missing, self.gene_names, self.var)
            found = f"{len(missing)} of {len(genes)} genes are not in its expression: {some_of(missing)}{spelling}"
            raise InputError(f"slide {self.id}: {found}")
        if len(column) < len(self.gene_names):
            twice = [name for name in genes if self.gene_names.count(name) > 1]
            if twice:
                raise InputError(f"slide {self.id}: gene {twice[0]} stands in several columns; make gene names unique")
        check_normalize(normalize)
        return Panel(counts[:, [column[name] for name in genes]], self.total_counts, normalize)

    def subset(self, index: np.ndarray) -> Slide:
        """The spots of ``index``, [n] whole numbers or [N] booleans, as a slide of the same id."""
        part = copy.copy(self)  # not checked again: what was fit to be a slide may look strange in part
        for name in ("features", "coords", "barcodes", "counts", "obs", "library_id"):
            object.__setattr__(part, name, rows_of(getattr(self, name), index))
        return part

    def _known_counts(self) -> scipy.sparse.csr_matrix:
        if self.counts is None:
            raise InputError(f"slide {self.id}: has no expression; give its counts")
        return self.counts


@dataclass(frozen=True)
class Panel:
    """The expression of some genes [N, G] of a slide: counts stay sparse until rows are asked for.

    Attributes:
        counts: [N, G] raw, CSR.
        total: [N] counts over all genes of the slide.
        normalize: the unit, one of :data:`NORMALIZATIONS`.
    """

    counts: scipy.sparse.csr_matrix
    total: np.ndarray
    normalize: str

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """[n, G] float32 of these spots."""
        return normalize_counts(self.counts[rows].toarray(), self.total[rows], self.normalize)


def check_normalize(normalize: str) -> None:
    """Raise InputError unless it is one of :data:`NORMALIZATIONS`."""
    if normalize not in NORMALIZATIONS:
        raise InputError(f"normalize: must be one of {', '.join(NORMALIZATIONS)}, not {normalize!r}")


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
    check_normalize(normalize)
    if normalize == "counts":
        return counts.astype(np.float32)
    if normalize == "log1p":
        logged: np.ndarray = np.log1p(counts)
    else:
        logged = np.log1p(counts * (1e4 / np.maximum(total, 1.0))[:, None])
    return logged.astype(np.float32)

"""Raw counts of an AnnData, and its genes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse

from ..errors import InputError
from .anndata_table import NO_NUMBERS, Table, key_text
from .options import ReadOptions
from .stores import check_safe, check_size, is_array, part_of

if TYPE_CHECKING:
    import pandas as pd

COUNT_KEYS = ("layers/counts", "X", "raw/X")
"""Where counts may be, the first before the others."""

LOOKED_AT = 100_000
"""Numbers of a matrix that tell whether it is one of counts, where only names of genes are asked for."""

Genes = tuple[tuple[str, ...], "pd.DataFrame | None"]
"""Names of the genes, and what else is said of them; None where nothing is."""

Counts = tuple[scipy.sparse.csr_matrix | None, tuple[str, ...], "pd.DataFrame | None", tuple[str, ...]]


def read_counts(table: Table, options: ReadOptions) -> Counts:
    """Raw counts [N, G] float32, names of their genes, what else is said of the genes, and notes.

    Of the first of ``layers["counts"]``, X and ``raw`` that is in whole numbers; where none is, of the first.
    """
    read: dict[str, scipy.sparse.csr_matrix | None] = {}

    def is_whole(key: str) -> bool:
        matrix = read[key] = _matrix(table, key)
        return matrix is not None and _whole(matrix.data)

    source = _count_source(table, options, is_whole)
    counts = None if source is None else read[source]
    if source is None or counts is None:
        return None, (), None, ()
    notes: tuple[str, ...] = ()
    if not _whole(counts.data):
        notes = (f"{key_text(source)} is not in whole numbers: are these raw counts? They are taken for raw counts",)
    elif others := [key_text(key) for key in read if key != source]:
        notes = (f"counts are those of {key_text(source)}: {' and '.join(others)} is not in whole numbers",)
    elif source == "raw/X":
        notes = (f"counts are those of {key_text(source)}: there are no others",)
    return counts, *_genes(table, _axis_of(source), options), notes


def read_gene_names(table: Table, options: ReadOptions) -> Genes:
    """What :func:`read_counts` says of the genes, without reading counts; no names and None where there are none.

    Only the first numbers of a matrix tell whether it is one of counts.
    """
    source = _count_source(table, options, lambda key: _looks_whole(table, key))
    return ((), None) if source is None else _genes(table, _axis_of(source), options)


def _count_source(table: Table, options: ReadOptions, is_whole: Callable[[str], bool]) -> str | None:
    """The key of :data:`COUNT_KEYS` that counts are read from."""
    keys = [key for key in COUNT_KEYS if table.part(key) is not None and not (key == options.features_key == "X")]
    return next((key for key in keys if is_whole(key)), keys[0] if keys else None)


def _axis_of(source: str) -> str:
    return "raw/var" if source == "raw/X" else "var"


def _genes(table: Table, axis: str, options: ReadOptions) -> Genes:
    names = table.names(axis) if options.gene_key is None else table.column(axis, options.gene_key)
    var, _ = table.frame(axis, text_only=True)
    return tuple(names.tolist()), var if len(var.columns) else None


def _matrix(table: Table, key: str) -> scipy.sparse.csr_matrix | None:
    matrix = table.element(key)
    if matrix is None or matrix.shape[1:] == (0,):
        return None
    if len(matrix.shape) != 2 or getattr(matrix, "dtype", np.dtype("f4")).kind in NO_NUMBERS:
        found = f"{getattr(matrix, 'dtype', 'a frame')} of shape {list(matrix.shape)}"
        raise InputError(f"{table.path}: {key_text(key)} must be counts [N, G], not {found}; write it so")
    try:
        return scipy.sparse.csr_matrix(matrix, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise InputError(f"{table.path}: {key} is not a table of numbers; give raw counts") from error


def _whole(numbers: np.ndarray) -> bool:
    return bool((numbers == np.rint(numbers)).all())


def _looks_whole(table: Table, key: str) -> bool:
    """Whether the first numbers of a matrix, dense or sparse, are whole."""
    part = table.part(key)
    numbers = part if is_array(part) else part_of(part, "data")
    if numbers is None:
        return False
    check_safe(table.path, key, numbers)
    check_size(table.path, key, numbers)
    return _whole(np.asarray(numbers[: max(1, LOOKED_AT // max(1, math.prod(numbers.shape[1:])))]))

"""Columns of ``obs`` as every anndata writes and reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from .names import categories_of, free_names, key_of, text_index, text_of


def carried(
    obs: pd.DataFrame | None, index: pd.Index, own: dict[str, pd.Categorical]
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Columns ``own``, then those of ``obs`` as every anndata writes and reads them; and notes about those."""
    columns, as_text = dict(own), []
    given = () if obs is None else (obs.iloc[:, place] for place in range(obs.shape[1]))
    kept = [column for column in given if not _repeats(column, own.get(column.name))]
    names = [key_of(text_of(column.name)) if column.name != "_index" else "index" for column in kept]
    for name, column in zip(free_names(names, taken=own), kept, strict=True):
        columns[name], is_of_its_kind = _writable(column.infer_objects())
        if not is_of_its_kind:
            as_text.append(name)
    notes = (f"obs: what is in {', '.join(as_text)} was written as text",) if as_text else ()
    return pd.DataFrame(columns, index=index), notes


def _repeats(column: pd.Series, own: pd.Categorical | None) -> bool:
    """Whether a column of the input says what the one of ours with its name says."""
    return own is not None and list(map(text_of, column)) == list(own)


def _writable(column: pd.Series) -> tuple[Any, bool]:
    """The values of a column as every anndata writes and reads them, and whether they are still of their kind."""
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        return _writable_categories(column)
    if isinstance(column.array, (pd.arrays.IntegerArray, pd.arrays.BooleanArray)):
        return column.array, True
    if pd.api.types.is_float_dtype(kind):
        single = getattr(kind, "itemsize", 8) <= 4
        return column.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan), True
    if isinstance(kind, np.dtype) and kind.kind in "biu":
        return column.to_numpy(), True
    return _writable_text(column)


def _writable_categories(column: pd.Series) -> tuple[Any, bool]:
    names = column.cat.categories
    if pd.api.types.infer_dtype(names) == "string" and text_index(names).is_unique:
        return column.cat.rename_categories(text_index(names)).array, True
    if isinstance(names.dtype, np.dtype) and names.dtype.kind in "iuf":
        return column.array, True
    return _writable_text(column)


def _writable_text(column: pd.Series) -> tuple[Any, bool]:
    """As ``AnnData.write_h5ad`` writes text: as categories where some repeats or is missing."""
    values = [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]
    texts = [value if value is None else text_of(value) for value in values]
    if not any(text is not None for text in texts):
        return np.full(len(texts), np.nan), True
    categories = categories_of(texts)
    is_text = all(value is None or isinstance(value, str) for value in values)
    return (categories if len(categories.categories) < len(texts) else text_index(texts)), is_text

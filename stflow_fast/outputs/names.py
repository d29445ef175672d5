"""Text and names that every version of anndata, pandas, HDF5 and zarr takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd


def text_of(value: Any) -> str:
    """Text that can be written: UTF-8 without NUL."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.encode(errors="replace").decode().replace("\0", " ")


def text_index(values: Iterable[Any]) -> pd.Index:
    """Text that every version of anndata and pandas writes and reads: objects, and no type of pandas' own."""
    return pd.Index([text_of(value) for value in values], dtype=object)


def categories_of(values: Sequence[str | None]) -> pd.Categorical:
    """Text as categories, in the order of the alphabet; None is missing."""
    codes, names = pd.factorize(np.array(values, dtype=object), sort=True)
    return pd.Categorical.from_codes(codes, text_index(names))


def key_of(name: str) -> str:
    """A name that HDF5 and zarr take for one name, not for a path."""
    return re.sub(r"/|^\.+$", "_", name) or "_"


def free_names(
    names: Sequence[str], taken: Iterable[str] = (), same: Callable[[str], str] = lambda name: name
) -> list[str]:
    """The names, with a number behind those that others have before them; ``same`` makes what counts as one equal."""
    used, found = set(map(same, taken)), []
    for name in names:
        free, number = name, 1
        while same(free) in used:
            free, number = f"{name}_{number}", number + 1
        used.add(same(free))
        found.append(free)
    return found

"""Arrays and names as notebooks have them: taken with the same bits through every entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast import knn_graph
from stflow_fast.arrays import as_names
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.sampling import Sampler, sample

from .array_cases import (
    DISGUISES,
    ENTRIES,
    FEATURES,
    GENES,
    NEIGHBORS,
    WHOLE,
    Disguise,
    assert_same,
    by_sample,
    model,
    no_warnings,
    spots,
)

__all__ = ["no_warnings"]  # a fixture


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("disguise", DISGUISES)
def test_every_kind_is_taken_with_the_same_bits(entry: str, disguise: str) -> None:
    made = spots(12)
    assert_same(ENTRIES[entry](made, DISGUISES[disguise]), ENTRIES[entry](made, np.asarray))


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("disguise", WHOLE)
def test_whole_numbers_of_every_kind_are_taken_with_the_same_bits(entry: str, disguise: str) -> None:
    rng = np.random.default_rng(0)
    sizes = {"features": FEATURES, "coords": 2, "x": GENES, "counts": GENES}
    made = {name: rng.integers(0, 200, size=(12, size)).astype(np.float32) for name, size in sizes.items()}
    assert_same(ENTRIES[entry](made, WHOLE[disguise]), ENTRIES[entry](made, np.asarray))


disguises = st.sampled_from(sorted(DISGUISES)).map(DISGUISES.get)


@given(n=st.sampled_from([1, 2, NEIGHBORS, NEIGHBORS + 1, 17]), each=st.tuples(disguises, disguises, disguises))
def test_disguises_mix(n: int, each: tuple[Disguise, Disguise, Disguise]) -> None:
    made = spots(n)
    parts = [disguise(made[name]) for disguise, name in zip(each, ("features", "coords", "x"), strict=True)]
    found = sample(model(), tuple(parts[:2]), parts[2])
    assert_same({"expression": found.expression}, by_sample(made, np.asarray))


@pytest.mark.parametrize("kind", ["Fortran order", "data frame", "transposed tensor", "every other"])
def test_the_order_in_memory_does_not_matter(kind: str) -> None:
    """A few rows, as wide as a panel: there matrix products sum a transposed operand in another order."""
    torch.manual_seed(0)
    wide = Sampler(Denoiser(DenoiserConfig(n_genes=200, feature_dim=90, n_layers=1)))
    features, coords, x = torch.randn(7, 90).numpy(), torch.rand(7, 2).numpy(), torch.randn(7, 200).numpy()
    disguise = DISGUISES[kind]
    plain, other = (wide.prepare((as_(features), as_(coords))) for as_ in (np.asarray, disguise))
    assert torch.equal(other.draw(disguise(x)).expression, plain.draw(x).expression)
    assert torch.equal(other.denoise(disguise(x), 0.5), plain.denoise(x, 0.5))


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(
    "disguise",
    [
        list,
        tuple,
        np.flip,
        pd.Series,
        lambda p: p.astype(np.int32),
        lambda p: p.astype(np.uint64),
        lambda p: p.astype(">i8"),
        lambda p: p.astype(np.float32),
        lambda p: p.astype(object),
        lambda p: p.astype(str),
        lambda p: p[None],
        torch.from_numpy,
        lambda p: torch.from_numpy(p).to(torch.uint16),
        lambda p: torch.from_numpy(p).double().requires_grad_(),
    ],
)
def test_slide_boundaries_of_every_kind(disguise: Disguise) -> None:
    coords = spots(12)["coords"]
    pointers = np.array([0, 5, 5, 12])
    given = np.flip(pointers)[::-1] if disguise is np.flip else disguise(pointers)
    assert torch.equal(knn_graph(coords, NEIGHBORS, given), knn_graph(coords, NEIGHBORS, pointers))


@pytest.mark.parametrize(
    "pointers", [[0, 2.5, 12], [0, float("nan"), 12], [0, 12.0, 11.0], [], [12], [0, 11], [1, 12], [0, 13, 12]]
)
def test_other_slide_boundaries_are_refused(pointers: list[float]) -> None:
    with pytest.raises(InputError, match=r"^slide_ptr: must rise from 0 to the number of spots \(12\)"):
        knn_graph(spots(12)["coords"], NEIGHBORS, pointers)


# Names.


@pytest.mark.parametrize(
    "names",
    [
        ["a", "é", "7"],
        ("a", "é", "7"),
        [b"a", "é".encode(), b"7"],
        ["a", "é", 7],
        np.array(["a", "é", "7"]),
        np.array(["a", "é", "7"], dtype=object),
        np.char.encode(np.array(["a", "é", "7"]), "utf-8"),
        np.array([["a"], ["é"], ["7"]]),
        np.array([["a", "é", "7"]]),
        pd.Index(["a", "é", "7"]),
        pd.Series(["a", "é", "7"], dtype="string"),
        pd.Series(["a", "é", "7"], dtype="category"),
        {"a": 1, "é": 2, "7": 3}.keys(),
        (name for name in ("a", "é", "7")),
    ],
)
def test_names_of_every_kind(names: Any) -> None:
    made = as_names("barcodes", names)
    assert made.dtype.kind == "U"
    assert made.tolist() == ["a", "é", "7"]


def test_names_that_are_numbers_or_none_at_all() -> None:
    for numbers in (np.arange(3), torch.arange(3), range(3), pd.RangeIndex(3)):
        assert as_names("barcodes", numbers).tolist() == ["0", "1", "2"]
    assert as_names("gene_names", ()).tolist() == []


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ("abc", "must be a list of names, not 'abc'"),
        (b"abc", "must be a list of names, not b'abc'"),
        (None, "must be a list of names, not None"),
        (7, "must be a list of names, not 7"),
        (["a", None], "None is not a name"),
        (["a", float("nan")], "nan is not a name"),
        (pd.Series(["a", pd.NA], dtype="string"), "<NA> is not a name"),
        ([True, False], "True is not a name"),
        (np.array([0.5, 1.5]), "0.5 is not a name"),
        ([b"\xe9"], r"b'\\xe9' is not UTF-8 text"),
        ([["a", "b"], ["c", "d"]], r"must have shape \[N\], not \[2, 2\]"),
    ],
)
def test_what_is_no_name_is_refused(names: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=f"^barcodes: {complaint}"):
        as_names("barcodes", names)

"""What is no array of numbers, or of another shape: refused in one line that names the argument."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from stflow_fast import knn_graph
from stflow_fast.errors import InputError
from stflow_fast.sampling import Sampler, sample
from stflow_fast.slides import Slide

from .array_cases import NEIGHBORS, model, no_warnings, spots

__all__ = ["no_warnings"]  # a fixture


def spoiled(x: np.ndarray, value: object) -> np.ndarray:
    x = x.astype(object)
    x[1, 1] = value
    return x


def frame_with(x: np.ndarray, column: object) -> pd.DataFrame:
    return pd.DataFrame(x).rename(columns=str).assign(**{"1": column})


REFUSED: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "None": (lambda x: None, "must be an array of numbers, not None"),
    "a dict": (lambda x: {"x": x}, "must be an array of numbers, not {'x'"),
    "a generator": (lambda x: (row for row in x), "must be an array of numbers, not <generator"),
    "a path": (lambda x: "slide.h5", "must be an array of numbers, not 'slide.h5'"),
    "a number": (lambda x: 3.0, r"must have shape \[.*\], not \[\]"),
    "nothing": (lambda x: [], r"must have shape \[.*\], not \[0\]"),
    "one row": (lambda x: x[0], r"must have shape \[.*\], not \[\d\]"),
    "ragged lists": (lambda x: [row[: 1 + i % 2].tolist() for i, row in enumerate(x)], "rows of one length"),
    "ragged tensors": (lambda x: [torch.ones(1 + i % 2) for i in range(len(x))], "rows of one length"),
    "two slides": (lambda x: np.stack([x, x]), r"not \[2, 12, \d\]; give one slide at a time, or .* packed"),
    "two axes of one": (lambda x: x[None, None], r"not \[1, 1, 12, \d\]"),
    "one transposed": (lambda x: x.T, r"not \[\d, 12\]; it is transposed, give its \.T"),
    "[1, F, N]": (lambda x: x.T[None], r"not \[1, \d, 12\]; it is transposed, give its \.T"),
    "words": (lambda x: spoiled(x, "abc"), "'abc' is not a number"),
    "bytes": (lambda x: spoiled(x, b"abc").astype(bytes), "b'abc' is not a number"),
    "an empty cell": (lambda x: spoiled(x, ""), "'' is not a number"),
    "None inside": (lambda x: spoiled(x, None).tolist(), "None is not a number"),
    "a date inside": (lambda x: spoiled(x, datetime.date(2026, 1, 1)), "is not a number"),
    "a table inside": (lambda x: spoiled(x, np.zeros((20, 20))), "is not a number"),
    "too large a number": (lambda x: spoiled(x, 10**400), "is not a number"),
    "dates": (lambda x: x.astype("M8[s]"), r"must be real numbers, not datetime64\[s\]"),
    "durations": (lambda x: x.astype("m8[s]"), r"must be real numbers, not timedelta64\[s\]"),
    "complex numbers": (lambda x: x + 0j, "must be real numbers, not complex"),
    "a complex tensor": (lambda x: torch.from_numpy(x + 0j), r"must be real numbers, not torch\.complex"),
    "named fields": (lambda x: np.zeros(12, [("x", "f4"), ("y", "f4")]), "must be real numbers, not"),
    "masked values": (lambda x: np.ma.masked_array(x, np.arange(x.size).reshape(x.shape) < 3), "3 values are masked"),
    "a column of words": (lambda x: frame_with(x, "abc"), "column 1: 'abc' is not a number"),
    "a column of dates": (
        lambda x: frame_with(x, pd.Timestamp("2026")),
        "column 1: must be real numbers, not datetime",
    ),
    "a sparse tensor": (lambda x: torch.from_numpy(x).to_sparse(), r"must be a dense tensor .*to_dense"),
    "a quantized tensor": (
        lambda x: torch.quantize_per_tensor(torch.from_numpy(x).float(), 0.1, 0, torch.qint8),
        "must be a dense tensor",
    ),
    "a tensor without numbers": (lambda x: torch.from_numpy(x).to("meta"), "must be a dense tensor"),
    "whole numbers beyond float64": (lambda x: np.full(x.shape, -(2**53) - 1), r"from 2\^53 on are not exact"),
    "a tensor of them": (lambda x: torch.full(x.shape, 2**62), r"from 2\^53 on are not exact"),
    "unsigned ones": (lambda x: np.full(x.shape, 2**64 - 1, np.uint64), r"from 2\^53 on are not exact"),
}


def call(entry: str, argument: str, value: Any) -> None:
    """Give ``value`` to an entry in place of one of its arrays."""
    parts = {**spots(12), argument: value}
    if entry == "sample":
        sample(model(), (parts["features"], parts["coords"]), parts["x_0"] if argument == "x_0" else None)
    elif entry == "prepare":
        slide = Sampler(model()).prepare((parts["features"], parts["coords"]))
        if argument == "x_t":
            slide.denoise(value, 0.5)
        elif argument == "x_0":
            slide.draw(value)
    elif entry == "knn_graph":
        knn_graph(parts["coords"], NEIGHBORS)
    else:
        counts = value if argument == "counts" else None
        Slide("s", parts["features"], parts["coords"], np.arange(12), counts, [*"abcd"] if argument == "counts" else ())


ARGUMENTS = [
    ("sample", "features"),
    ("sample", "coords"),
    ("sample", "x_0"),
    ("prepare", "features"),
    ("prepare", "coords"),
    ("prepare", "x_0"),
    ("prepare", "x_t"),
    ("knn_graph", "coords"),
    ("Slide", "features"),
    ("Slide", "coords"),
    ("Slide", "counts"),
]
PLAIN = {"x_0": "x", "x_t": "x"}
# A draw from the prior, and a slide without counts or features.
MAY_BE_NONE = (("sample", "x_0"), ("prepare", "x_0"), ("Slide", "counts"), ("Slide", "features"))


@pytest.mark.parametrize(
    ("entry", "argument", "kind"),
    [(*place, kind) for place in ARGUMENTS for kind in REFUSED if not (kind == "None" and place in MAY_BE_NONE)],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # they are on their way out
def test_what_is_no_array_of_numbers_is_refused_in_one_line(entry: str, argument: str, kind: str) -> None:
    spoil, complaint = REFUSED[kind]
    with pytest.raises(InputError, match=f"^(slide s: )?{argument}: .*{complaint}") as refused:
        call(entry, argument, spoil(spots(12)[PLAIN.get(argument, argument)]))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("missing", [np.nan, pd.NA])
@pytest.mark.parametrize(("entry", "argument"), [pair for pair in ARGUMENTS if pair[1] != "x_t"])
def test_missing_values_are_refused(entry: str, argument: str, missing: object) -> None:
    frame = pd.DataFrame(spots(12)[PLAIN.get(argument, argument)]).convert_dtypes()
    frame.iloc[[3, 4], 1] = missing
    with pytest.raises(InputError, match=rf"{argument}.* NaN or infinite|counts are negative, NaN"):
        call(entry, argument, frame)


def test_shapes_are_told_with_the_one_that_is_wanted() -> None:
    made = spots(12)
    features, coords = made["features"], made["coords"]
    for slide, complaint in (
        ((features[:, :5], coords), r"^features: must have shape \[N, 6\], not \[12, 5\]; use embeddings of the enc"),
        ((features[None, :, :5], coords), r"^features: must have shape \[N, 6\], not \[1, 12, 5\]; use embeddings"),
        ((features, coords[:11]), r"^coords: must have shape \[12, 2\], not \[11, 2\]; features are of 12 spots$"),
        ((features[:11], coords[None]), r"^coords: must have shape \[11, 2\], not \[1, 12, 2\]; features are of 11"),
    ):
        for entry in (functools.partial(sample, model()), Sampler(model()).prepare):
            with pytest.raises(InputError, match=complaint):
                entry(slide)


@pytest.mark.parametrize(
    ("pair", "found"), [((1, 2, 3), "3 of them"), ([], "0 of them"), ({1: 2, 3: 4}, "dict"), (None, "NoneType")]
)
def test_a_slide_is_a_slide_or_two_arrays(pair: object, found: str) -> None:
    for entry in (functools.partial(sample, model()), Sampler(model()).prepare):
        with pytest.raises(InputError, match=rf"^slide: must be a Slide, or two arrays, .*, not {found}$"):
            entry(pair)


@pytest.mark.usefixtures("no_warnings")
def test_features_beyond_float32_are_counted() -> None:
    features, coords = spots(12)["features"].astype(np.float64), spots(12)["coords"]
    features[[2, 5], 1] = 1e300
    with pytest.raises(InputError, match="^features: 2 of 12 spots are NaN or infinite"):
        sample(model(), (features, coords))
    with pytest.raises(InputError, match="^slide s: features of 2 of 12 spots are NaN or infinite"):
        Slide("s", features, coords, range(12))
    features = np.abs(features)
    with pytest.raises(InputError, match="^slide s: 2 counts are negative, NaN or infinite"):
        Slide("s", coords, coords, range(12), scipy.sparse.csr_matrix(features), [*"abcdef"])

"""Arrays as notebooks have them: taken with the same bits through every entry, or refused in one line."""

from __future__ import annotations

import datetime
import functools
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from stflow_fast import knn_graph
from stflow_fast.arrays import as_array, as_counts, as_names, as_tensor
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.priors.observation import CensoredGaussian, ObservationModel
from stflow_fast.priors.shared_error import SharedError
from stflow_fast.sampling import PreparedSlide, Sampler, sample
from stflow_fast.slides import Slide

GENES, FEATURES, NEIGHBORS = 4, 6, 3


@functools.cache
def model() -> Denoiser:
    torch.manual_seed(0)
    config = DenoiserConfig(
        GENES, FEATURES, hidden_dim=8, pairwise_hidden_dim=8, n_layers=1, n_heads=2, n_neighbors=NEIGHBORS
    )
    return Denoiser(config)


def spots(n: int) -> dict[str, np.ndarray]:
    """Plain arrays of n spots."""
    rng = np.random.default_rng(n)
    return {
        "features": rng.normal(size=(n, FEATURES)).astype(np.float32),
        "coords": rng.uniform(0, 5000, size=(n, 2)),
        "x": rng.normal(size=(n, GENES)).astype(np.float32),
        "counts": rng.poisson(1.0, size=(n, GENES)).astype(np.float32),
    }


# What the same numbers come as.


class ReadByIndexing:
    """A table on disk of no library."""

    def __init__(self, table: np.ndarray) -> None:
        self._table, self.shape, self.dtype = table, table.shape, table.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._table[index]


def unaligned(x: np.ndarray) -> np.ndarray:
    table = np.zeros(len(x), dtype=[("flag", np.uint8), ("x", x.dtype, x.shape[1:])])
    table["x"] = x
    return table["x"]


def read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


def in_hdf5(x: np.ndarray) -> h5py.Dataset:
    return h5py.File.in_memory().create_dataset("x", data=x)


def view_of_anndata(x: np.ndarray) -> np.ndarray:
    return anndata.AnnData(obs=pd.DataFrame(index=np.arange(len(x)).astype(str)), obsm={"x": x})[:].obsm["x"]


def negated(x: np.ndarray) -> torch.Tensor:
    """A tensor that is negative by a flag alone."""
    flagged = torch.complex(torch.from_numpy(x), torch.from_numpy(-x)).conj().imag
    assert flagged.is_neg()
    return flagged


KEEPING_PRECISION: dict[str, Callable[[np.ndarray], Any]] = {
    "plain": lambda x: x,
    "negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
    "every other": lambda x: x.repeat(2, axis=0).repeat(2, axis=1)[::2, ::2],
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "Fortran order": np.asfortranarray,
    "read-only": read_only,
    "unaligned": unaligned,
    "list of arrays": list,
    "data frame": pd.DataFrame,
    "nullable data frame": lambda x: pd.DataFrame(x).convert_dtypes(convert_integer=False),
    "masked without a mask": np.ma.masked_array,
    "matrix": lambda x: scipy.sparse.csr_matrix(x).todense(),
    "leading axis of one": lambda x: x[None],
    "sparse matrix": scipy.sparse.csc_matrix,
    "sparse array": scipy.sparse.coo_array,
    "HDF5": in_hdf5,
    "zarr": zarr.array,
    "read by indexing": ReadByIndexing,
    "view of AnnData": view_of_anndata,
    "tensor": torch.from_numpy,
    "tensor with gradients": lambda x: torch.from_numpy(x).requires_grad_() * 1,
    "parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x)),
    "transposed tensor": lambda x: torch.from_numpy(x).T.contiguous().T,
    "negated tensor": negated,
    "tensor with a leading axis": lambda x: torch.from_numpy(x)[None],
    "list of tensors": lambda x: list(torch.from_numpy(x).requires_grad_()),
}
AS_FLOAT64: dict[str, Callable[[np.ndarray], Any]] = {
    "extended precision": lambda x: x.astype(np.longdouble),
    "objects": lambda x: x.astype(object),
    "decimals": lambda x: [[Decimal(float(value)) for value in row] for row in x],
    "text": lambda x: x.astype(str),
    "bytes": lambda x: x.astype(bytes),
    "lists": lambda x: x.tolist(),
    "lists of text": lambda x: x.astype(str).tolist(),
    "data frame of text": lambda x: pd.DataFrame(x).astype(str),
    "data frame of text and numbers": lambda x: pd.DataFrame(x).astype({0: str}),
}
DISGUISES = {**KEEPING_PRECISION, **AS_FLOAT64}

# What whole numbers come as, too.
WHOLE: dict[str, Callable[[np.ndarray], Any]] = {
    **{name: (lambda x, name=name: x.astype(name)) for name in ("u1", "u2", ">u2", "u4", "u8", ">i8", "i2", "f2")},
    **{
        str(dtype): (lambda x, dtype=dtype: torch.from_numpy(x).to(dtype))
        for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int32, torch.half, torch.bfloat16)
    },
    "integers of Python": lambda x: x.astype(int).astype(object),
    "nullable integers": lambda x: pd.DataFrame(x.astype(int)).convert_dtypes(),
    "categories": lambda x: pd.DataFrame(x.astype(int)).astype("category"),
}

Disguise = Callable[[np.ndarray], Any]
Result = dict[str, torch.Tensor | np.ndarray]


# The entries: what they make of arrays in disguise.


def by_sample(made: dict[str, np.ndarray], disguise: Disguise) -> Result:
    drawn = sample(model(), (disguise(made["features"]), disguise(made["coords"])), disguise(made["x"]))
    return {"expression": drawn.expression}


def by_draws(made: dict[str, np.ndarray], disguise: Disguise) -> Result:
    """Whose errors depend on the places."""
    calibrated = model()
    law = CensoredGaussian(np.full(GENES, 0.5, np.float32))
    shared = SharedError(np.full(GENES, 0.7, np.float32), np.array([0.1, 0.8, 3.0], np.float32))
    calibrated.observation = ObservationModel(tuple(map(str, range(GENES))), law, shared, {})
    drawn = sample(calibrated, (disguise(made["features"]), disguise(made["coords"])), draws=2)
    return {"std": drawn.std, "draws": drawn.draws}


def prepared(made: dict[str, np.ndarray], disguise: Disguise) -> PreparedSlide:
    return Sampler(model()).prepare((disguise(made["features"]), disguise(made["coords"])))


def by_prepare(made: dict[str, np.ndarray], disguise: Disguise) -> Result:
    slide = prepared(made, disguise)
    drawn = slide.draw(disguise(made["x"]), trajectory=True)
    return {"trajectory": drawn.trajectory, "denoised": slide.denoise(disguise(made["x"]), 0.5)}


def by_knn_graph(made: dict[str, np.ndarray], disguise: Disguise) -> Result:
    return {"table": knn_graph(disguise(made["coords"]), NEIGHBORS)}


def by_slide(made: dict[str, np.ndarray], disguise: Disguise) -> Result:
    n = len(made["coords"])
    features, coords, counts = (disguise(made[name]) for name in ("features", "coords", "counts"))
    slide = Slide("s", features, coords, list(map(str, range(n))), counts, [f"g{i}" for i in range(GENES)])
    assert (slide.features.dtype, slide.coords.dtype) == (np.float32, np.float64)
    assert isinstance(slide.counts, scipy.sparse.csr_matrix)
    assert slide.counts.dtype == np.float32
    return {"features": slide.features, "coords": slide.coords, "counts": slide.counts.toarray()}


ENTRIES = {"sample": by_sample, "draws": by_draws, "prepare": by_prepare, "knn_graph": by_knn_graph, "Slide": by_slide}


def assert_same(found: Result, expected: Result) -> None:
    for name, plain in expected.items():
        assert np.array_equal(np.asarray(found[name]), np.asarray(plain)), name


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Warnings of torch come once in a process, if one does not ask for more."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(always)


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


# What is refused.


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


# What it costs, and what it must leave alone.


@pytest.mark.parametrize(
    "kind", ["plain", "every other", "Fortran order", "read-only", "matrix", "leading axis of one", "view of AnnData"]
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64])
def test_what_torch_can_have_where_it_lies_is_not_copied(kind: str, dtype: type) -> None:
    x = DISGUISES[kind](np.arange(24, dtype=np.float64).reshape(6, 4)).astype(dtype, copy=False)
    x = read_only(x) if kind == "read-only" else x
    assert np.shares_memory(as_tensor("x", x, (6, 4)).numpy(), x)
    assert np.shares_memory(as_array("x", x, (6, 4), x.dtype.type), x)


def test_tensors_and_data_frames_are_not_copied() -> None:
    x = torch.rand(6, 4)
    for value in (x, x[None], torch.nn.Parameter(x)):
        assert as_tensor("x", value, (6, 4)).data_ptr() == x.data_ptr()
        assert not as_tensor("x", value, (6, 4)).requires_grad
        assert as_array("x", value, (6, 4), np.float32).ctypes.data == x.data_ptr()
    frame = pd.DataFrame(x.numpy().copy())
    assert np.shares_memory(as_tensor("x", frame, (6, 4)).numpy(), frame.to_numpy())


def test_slides_are_made_in_the_memory_that_they_are_given() -> None:
    made = spots(12)
    counts = scipy.sparse.csr_matrix(made["counts"])
    slide = Slide("s", made["features"], made["coords"], np.arange(12).astype(str), counts, ("a", "b", "c", "d"))
    assert slide.features is made["features"]
    assert slide.coords is made["coords"]
    assert np.shares_memory(slide.counts.data, counts.data)
    assert np.shares_memory(as_counts("counts", counts, (12, 4)).indices, counts.indices)


def test_counts_that_anndata_left_on_disk_are_read(tmp_path: Path) -> None:
    counts = spots(12)["counts"]
    anndata.AnnData(scipy.sparse.csr_matrix(counts)).write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert np.array_equal(as_counts("counts", backed.X, (12, GENES)).toarray(), counts)
    assert np.array_equal(as_tensor("features", backed.X, (12, GENES)).numpy(), counts)
    backed.file.close()


@pytest.mark.usefixtures("no_warnings")
def test_files_that_may_only_be_read_are_only_read(tmp_path: Path) -> None:
    """A write into their memory would end the process."""
    made = {name: part for name, part in spots(12).items() if name != "counts"}
    for name, part in made.items():
        np.save(tmp_path / f"{name}.npy", part)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in made}
    for entry in (by_sample, by_prepare, by_knn_graph):
        assert_same(entry(mapped, lambda x: x), entry(made, np.asarray))
    for name, part in made.items():
        assert np.array_equal(mapped[name], part)


def test_the_callers_arrays_are_left_alone() -> None:
    made = spots(12)
    for entry in ENTRIES.values():
        entry(made, lambda x: x)
    assert_same(made, spots(12))


def test_boundaries_are_the_graphs_own() -> None:
    pointers = torch.tensor([0, 12])
    graph = model().build_graph(spots(12)["coords"], pointers)
    pointers[1] = 0
    assert graph.slide_ptr.tolist() == [0, 12]


@pytest.mark.parametrize("kind", KEEPING_PRECISION)
def test_the_precision_is_kept(kind: str) -> None:
    x = np.arange(24).reshape(6, 4).astype(np.float32)
    assert as_tensor("x", KEEPING_PRECISION[kind](x), (6, 4)).dtype == torch.float32
    assert as_tensor("x", KEEPING_PRECISION[kind](x.astype(np.float64)), (6, 4)).dtype == torch.float64


def test_half_precision_is_kept() -> None:
    x = np.arange(24).reshape(6, 4).astype(np.float16)
    for value in (x, x[::-1], x.astype(">f2"), pd.DataFrame(x), torch.from_numpy(x)):
        assert as_tensor("x", value, (6, 4)).dtype == torch.float16
    assert as_tensor("x", torch.from_numpy(x).bfloat16(), (6, 4)).dtype == torch.bfloat16


def test_tensors_come_as_every_operation_can_have_them() -> None:
    x = np.arange(24).reshape(6, 4).astype(np.float32)
    assert not as_tensor("x", negated(x), (6, 4)).is_neg()
    assert as_tensor("x", torch.from_numpy(x).to(torch.float8_e5m2), (6, 4)).dtype == torch.float32
    offset = np.frombuffer(b"." + x.tobytes(), np.float32, offset=1).reshape(6, 4)
    assert not offset.flags.aligned
    assert as_tensor("x", offset, (6, 4)).data_ptr() % 4 == 0


@pytest.mark.parametrize(
    "kind", ["negative strides", "other byte order", "data frame", "leading axis of one", "tensor"]
)
def test_ties_are_told_by_the_precision_that_coordinates_came_in(kind: str) -> None:
    """A lattice, turned, far from the origin: rounding parts what is tied, and is known to do so."""
    row, column = np.divmod(np.arange(64), 8)
    place = (column + 1j * row) * 100 * np.exp(0.3j)
    rounded = (np.column_stack([place.real, place.imag]) + 20_000).astype(np.float32)
    table = knn_graph(rounded, 8)
    assert torch.equal(knn_graph(DISGUISES[kind](rounded), 8), table)
    for exact in (np.float64, object, str):
        assert not torch.equal(knn_graph(rounded.astype(exact), 8), table)


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

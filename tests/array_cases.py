"""What the same numbers come as, and the entries that take them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import zarr

from stflow_fast import knn_graph
from stflow_fast.config import DenoiserConfig
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

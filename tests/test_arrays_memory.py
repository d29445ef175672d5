"""What taking an array costs, and what it leaves alone: memory, precision, the caller's numbers."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from stflow_fast import knn_graph
from stflow_fast.arrays import as_array, as_counts, as_tensor
from stflow_fast.slides import Slide

from .array_cases import (
    DISGUISES,
    ENTRIES,
    GENES,
    KEEPING_PRECISION,
    assert_same,
    by_knn_graph,
    by_prepare,
    by_sample,
    model,
    negated,
    no_warnings,
    read_only,
    spots,
)

__all__ = ["no_warnings"]  # a fixture


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

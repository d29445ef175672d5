"""Samples by blocks of spots, shares of the neighbours mixed in, and features that stay on the disk."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from stflow_fast.errors import InputError
from stflow_fast.graph import knn_graph
from stflow_fast.model import Denoiser
from stflow_fast.sampling import Sampler, sample, samples
from stflow_fast.slides.rows import stored_rows

from .sampling_cases import model, slide


@pytest.mark.parametrize("n", [1, 30, 1024, 2500])
@pytest.mark.parametrize(("n_genes", "non_negative"), [(5, False), (40, False), (40, True)])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_sample_by_blocks_is_the_sample(
    n: int, n_genes: int, non_negative: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in whatever thread it is read, in blocks of one piece of rows; also when the slide is gone."""
    monkeypatch.setattr(samples, "EXPRESSION_BYTES", 1)
    monkeypatch.setattr("stflow_fast.priors.prior.PIECE", 1000)
    config = dataclasses.replace(model(n_genes).config, non_negative=non_negative)
    prepared = Sampler(Denoiser(config), precision=precision).prepare(slide(n))
    expected = prepared.draw(seed=3).expression
    drawn, slide_graph = prepared.draw_blocks(seed=3), weakref.ref(prepared.graph)
    del prepared
    assert slide_graph() is None
    found = torch.full(drawn.shape, torch.nan)

    def read() -> None:
        for rows, part in drawn.blocks():
            assert rows.start % 1024 == 0
            found[rows] = part

    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
    assert torch.equal(found, expected)
    assert drawn.nfe == 4


@pytest.mark.parametrize(("n_genes", "non_negative"), [(5, False), (40, False), (40, True)])
@pytest.mark.parametrize("n", [1, 3, 300])
def test_a_share_of_the_neighbours_is_mixed_in(n: int, n_genes: int, non_negative: bool) -> None:
    config = dataclasses.replace(model(n_genes).config, non_negative=non_negative)
    network, places = Denoiser(config), slide(n)
    plain = Sampler(network).prepare(places)
    sharp = plain.draw(seed=3).expression
    expected, near = sharp.clone(), knn_graph(places.coords, config.n_neighbors)
    for spot, row in enumerate(near):
        row = row[row >= 0]
        if len(row):
            expected[spot] = 0.75 * sharp[spot] + 0.25 * sharp[row].mean(dim=0)
    prepared = Sampler(network, smooth=0.25).prepare(places)
    torch.testing.assert_close(prepared.draw(seed=3).expression, expected)
    torch.testing.assert_close(prepared.draw_blocks(seed=3).expression, expected)
    source = torch.zeros(n, n_genes, dtype=sharp.dtype)
    assert torch.equal(prepared.denoise(source, 0.5), plain.denoise(source, 0.5))
    assert torch.equal(Sampler(network, smooth=0.0).prepare(places).draw(seed=3).expression, sharp)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(InputError, match="smooth: must be a share from 0 to 1"):
        Sampler(model(5), smooth=share)


def test_memory_of_a_sample_by_blocks_does_not_depend_on_the_genes() -> None:
    """No tensor of the draw has more numbers than a block, or than what the network makes of the spots."""
    n, n_genes = 5000, 4000
    prepared = Sampler(model(n_genes).float()).prepare(slide(n))
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in prepared.draw_blocks().blocks():
            pass
    largest = max(int(np.prod(shape)) for event in profile.events() for shape in event.input_shapes if shape)
    assert largest <= samples.EXPRESSION_BYTES // 4 < n * n_genes


@pytest.mark.parametrize("chunks", [None, (1, 6), (300, 4), (2500, 6)])
@pytest.mark.parametrize("threads", [1, 2])
def test_features_on_a_disk_give_the_same_bits(tmp_path: Path, chunks: tuple[int, int] | None, threads: int) -> None:
    """More spots than a block, read by pieces of whole chunks, however large those are."""
    in_memory, path = slide(2500), tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        stored = file.create_dataset("f", data=in_memory.features, chunks=chunks, compression=chunks and "gzip")
        rows = stored_rows(path, "f", stored)
    on_disk = dataclasses.replace(in_memory, features=rows)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, expected = (sample(model(), each, seed=3).expression for each in (on_disk, in_memory))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    as_arrays = (sample(model(), (features, in_memory.coords)).expression for features in (rows, in_memory.features))
    assert torch.equal(*as_arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_features_on_a_disk_are_counted(tmp_path: Path, value: float) -> None:
    path, features = tmp_path / "a.h5", slide(2500).features.copy()
    features[[3, 1030, 2499], [0, 5, 2]] = value
    with h5py.File(path, "w") as file:
        rows = stored_rows(path, "f", file.create_dataset("f", data=features))
    on_disk = dataclasses.replace(slide(2500), features=rows)
    with pytest.raises(InputError, match=r"^slide a: features: 3 of 2500 spots are NaN or infinite; remove them"):
        sample(model(), on_disk)
    with pytest.raises(InputError, match=r"^slide a: features: must have shape \[N, 6\], not \[2500, 5\]; use embedd"):
        sample(model(), dataclasses.replace(on_disk, features=dataclasses.replace(rows, columns=5)))
    with pytest.raises(InputError, match=r"^slide a: has no patch features; give a file of them too \(--embeddings\)"):
        sample(model(), dataclasses.replace(on_disk, features=None))

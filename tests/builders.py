"""Tiny data in the layouts that users have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse
import torch

from stflow_fast.config import DenoiserConfig
from stflow_fast.files import write_json
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance

GENE_LIST = "var_50genes.json"
ENCODER = "tiny"
SLIDES = ("S0", "S1", "S2")
BASELINES = {
    "train_mean",
    "hest_ridge",
    "ridge_alpha_1e4",
    "ridge",
    "ridge_smoothed",
    "ridge_neighbors",
    "depth_oracle",
}
"""Names of those that stand beside a model."""
N_SPOTS, N_GENES, PANEL, FEATURES, PATCH = 60, 30, 8, 16, 40


def arrays(name: str, n: int = N_SPOTS) -> dict[str, np.ndarray]:
    """Features, counts that follow them, spot centres on a lattice, and barcodes of one slide."""
    rng = np.random.default_rng([SLIDES.index(name) if name in SLIDES else 99, n])
    row, column = np.divmod(np.arange(n), 8)
    features = rng.normal(size=(n, FEATURES)).astype(np.float32)
    loading = np.random.default_rng(0).normal(scale=0.3, size=(FEATURES, N_GENES))
    return {
        "features": features,
        "counts": rng.poisson(np.exp(0.5 + features @ loading)).astype(np.float32),
        "centres": np.column_stack([column + 0.5 * (row % 2), row * 0.866]) * 100.0 + 500.0,
        "barcodes": np.array([f"{a}x{b}" for a, b in zip(row, column, strict=True)]),
    }


def gene_names() -> list[str]:
    return [f"GENE{i}" for i in range(N_GENES)]


def write_embeddings(
    path: Path,
    made: dict[str, np.ndarray],
    order: np.ndarray | None = None,
    text: bool = False,
    flat: bool = False,
    key: str = "barcodes",
    patch_size: int | None = None,
) -> Path:
    """A STFlow embeddings file; ``order`` picks and orders the spots, the other switches vary the barcodes' form."""
    order = np.arange(len(made["barcodes"])) if order is None else order
    path.parent.mkdir(parents=True, exist_ok=True)
    names = made["barcodes"][order]
    barcodes = names.astype(object) if text else names.astype("S")
    with h5py.File(path, "w") as file:
        file["embeddings"] = made["features"][order]
        file["coords"] = (made["centres"][order] - PATCH / 2).astype(np.int64)
        dtype = h5py.string_dtype() if text else None
        file.create_dataset(key, data=barcodes if flat else barcodes[:, None], dtype=dtype)
        if patch_size:
            file["coords"].attrs["patch_size_src"] = patch_size
    return path


def write_h5ad(path: Path, made: dict[str, np.ndarray], x: object = "csr", features: bool = False) -> Path:
    """An .h5ad; ``x`` is csr, csc, dense, int or None."""
    forms = {
        "csr": scipy.sparse.csr_matrix,
        "csc": scipy.sparse.csc_matrix,
        "dense": np.asarray,
        "int": lambda counts: counts.astype(np.int32),
    }
    table = anndata.AnnData(
        X=None if x is None else forms[x](made["counts"]),
        obs=pd.DataFrame(index=made["barcodes"].astype(str)),
        var=pd.DataFrame(index=gene_names()),
        obsm={"spatial": made["centres"], **({"features": made["features"]} if features else {})},
        uns={"pixel_size_um_estimated": 0.5},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_h5ad(path)
    return path


def embeddings_of(task: Path, name: str) -> Path:
    """Where :func:`write_task` puts the embeddings of a slide."""
    return task / "embeddings" / ENCODER / "fp32" / f"{name}.h5"


def write_task(root: Path) -> Path:
    """A HEST-bench task folder: train S0 and S1, test S2."""
    for name in SLIDES:
        made = arrays(name)
        write_embeddings(embeddings_of(root, name), made)
        write_h5ad(root / "adata" / f"{name}.h5ad", made)
    (root / "splits").mkdir()
    for side, names in (("train", SLIDES[:2]), ("test", SLIDES[2:])):
        write_split(root, side, names)
    write_json(root / GENE_LIST, {"genes": gene_names()[3 : 3 + PANEL]})
    return root


def small_model(n_genes: int, genes: Sequence[str], encoder: str) -> Denoiser:
    """Of random weights, for :data:`FEATURES` features."""
    torch.manual_seed(0)
    config = DenoiserConfig(n_genes, FEATURES, hidden_dim=16, pairwise_hidden_dim=16, n_layers=1)
    return Denoiser(config, Provenance(tuple(genes), encoder)).eval()


def write_model(folder: Path, genes: Sequence[str]) -> Path:
    """A small model, for the encoder of :func:`write_task`."""
    small_model(PANEL, genes, ENCODER).save_pretrained(folder)
    return folder


def write_split(root: Path, side: str, names: tuple[str, ...], fold: int = 0) -> None:
    rows = [f"{name},patches/{name}.h5,adata/{name}.h5ad" for name in names]
    content = "\n".join(["sample_id,patches_path,expr_path", *rows]) + "\n"
    (root / "splits" / f"{side}_{fold}.csv").write_text(content)


def slide_file(folder: Path, name: str = "S0", n: int = 60, **changes: np.ndarray) -> Path:
    return write_h5ad(folder / f"{name}.h5ad", {**arrays(name, n), **changes}, features=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

"""Features of patches as TRIDENT and CLAM write them, and a small table of anndata."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd

N, F = 64, 12


def lattice(side: int = 8, pitch: float = 512.0, start: float = 2048.0) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * pitch + start


def features(n: int = N) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, F)).astype(np.float32)


def save_as_trident(path: Path, assets: dict[str, np.ndarray], attributes: dict[str, dict[str, object]]) -> Path:
    """As ``save_h5`` of TRIDENT and CLAM writes: tables that can grow, in chunks of one row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in assets.items():
            growing = {"maxshape": (None, *values.shape[1:]), "chunks": (1, *values.shape[1:])} if values.size else {}
            file.create_dataset(key, data=values, **growing).attrs.update(attributes.get(key, {}))
    return path


TRIDENT_COORDS = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "level0_width": 9000,
    "level0_height": 8000,
    "name": "slide",
}


def trident(path: Path, leading: bool = False, **attributes: object) -> Path:
    assets = {"features": features(), "coords": lattice().astype(np.int64)}
    if leading:
        assets["features"] = assets["features"][None]
    of_features = {"encoder": "uni_v1", "name": "slide", **attributes}
    return save_as_trident(path, assets, {"features": of_features, "coords": TRIDENT_COORDS})


def clam(root: Path, patches: dict[str, object] | None) -> Path:
    corners = lattice().astype(np.int32)
    if patches is not None:
        save_as_trident(root / "patches" / "slide.h5", {"coords": corners}, {"coords": patches})
    path = root / "features" / "h5_files" / "slide.h5"
    return save_as_trident(path, {"features": features(), "coords": corners}, {})


def table(n: int = N, **obsm: object) -> anndata.AnnData:
    made = anndata.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]))
    made.obsm["features"] = features(n)
    made.obsm["spatial"] = lattice()[:n]
    for key, value in obsm.items():
        made.obsm[key] = value
    return made

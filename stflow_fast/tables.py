"""Predictions added to a table that is in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .arrays import as_array, as_names
from .cohort import SamplingConfig, drawn_by, gene_names, made_by, model_and_origin
from .errors import InputError
from .model import Denoiser
from .slides import Slide

if TYPE_CHECKING:
    import anndata

WHOLE = "adata"
"""Id of the slide that a table without sections is."""


def predict_adata(
    run: str | Path | Denoiser,
    adata: anndata.AnnData,
    features: str = "X_uni",
    key_added: str = "stflow",
    *,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    sampling: SamplingConfig | None = None,
    device: str = "auto",
) -> None:
    """Predict the spots of a table, and add the prediction to it.

    Where the table has genes that the model predicts, it becomes ``layers[key_added]``, [N, G_all] float32 in the unit
    of the training, with NaN for genes that are not predicted; predicted genes that the table lacks are left out, and a
    warning says how many. A layer is dense: 7 GB for 100,000 spots of 18,000 genes. Where the table has none of the
    genes, or no genes at all, the prediction becomes ``obsm[key_added]``, a DataFrame [N, G] of all of them.
    ``uns[key_added]`` says what made it, and its "in" where it is: "layers" or "obsm".

    Args:
        run: a run or model folder, or a model.
        adata: the table; it stays as it is if anything fails.
        features: of ``obsm`` with the patch embeddings [N, F], or "X".
        key_added: name of what is added. An earlier prediction of that name is replaced, and nothing else is.
        spatial_key: of ``obsm`` with the spot centres in level-0 pixels.
        library_key: column of ``obs`` that names the section of each spot. Each is predicted as a slide of its own,
            whose id is that name; without it all spots are one slide, "adata".
        sampling: how to draw.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is.

    Raises:
        InputError: a bad model, keys that are not there, a gene that stands in several columns, a ``key_added`` that is
            taken, features of another size than the model's, or what Slide refuses.
    """
    model, origin = model_and_origin(run, device)
    sampling, genes = sampling or SamplingConfig(), gene_names(model)
    _check_table(adata, key_added)
    column = _columns(adata.var_names, genes)
    target, width, chosen, columns = "obsm", len(genes), slice(None), slice(None)
    if column:
        target, width = "layers", adata.n_vars
        chosen, columns = np.array([gene in column for gene in genes]), list(column.values())
    predicted = np.full((adata.n_obs, width), np.nan, dtype=np.float32)
    draw, names, notes = sampling.drawer(model), [], []
    for slide, rows in _slides(adata, features, spatial_key, library_key):
        drawn = draw(slide)
        of_slide = predicted[rows]
        of_slide[:, columns] = drawn.expression.float().numpy()[:, chosen]
        predicted[rows] = of_slide
        names.append(slide.id)
        notes.extend(f"{slide.id}: {note}" for note in slide.notes)
    if 0 < len(column) < len(genes):
        left_out = len(genes) - len(column)
        warnings.warn(
            f"{left_out} of {len(genes)} predicted genes are not in adata.var_names, and left out", stacklevel=2
        )
    added = predicted if target == "layers" else pd.DataFrame(predicted, adata.obs_names, list(genes))
    getattr(adata, target)[key_added] = added
    adata.uns[key_added] = {
        "model": origin,
        **made_by(model, sampling),
        **drawn_by(model, drawn),
        "in": target,
        "features": features,
        "slides": names,
        "notes": "; ".join(notes),
    }


def _check_table(adata: anndata.AnnData, key_added: str) -> None:
    if not all(hasattr(adata, part) for part in ("obs", "obsm", "layers", "uns")):
        raise InputError(f"adata: must be an AnnData, not {type(adata).__name__}")
    if not adata.n_obs:
        raise InputError("adata: has no spots")
    before = adata.uns.get(key_added)
    if isinstance(before, Mapping) and "weights_sha256" in before:
        return
    taken = [part for part in ("layers", "obsm", "uns") if key_added in getattr(adata, part)]
    if taken:
        raise InputError(f"key_added: adata.{taken[0]}[{key_added!r}] is no prediction; choose another name")


def _columns(var_names: pd.Index, genes: Sequence[str]) -> dict[str, int]:
    """The column of each gene that the table has, in the order of the genes."""
    place = {name: index for index, name in enumerate(var_names)}
    twice = set(var_names[var_names.duplicated()]).intersection(genes)
    if twice:
        raise InputError(f"adata: gene {min(twice)} stands in several columns; call adata.var_names_make_unique()")
    return {gene: place[gene] for gene in genes if gene in place}


def _slides(
    adata: anndata.AnnData, features: str, spatial_key: str, library_key: str | None
) -> Iterator[tuple[Slide, np.ndarray | slice]]:
    """The sections of a table, one slide each, and their rows in it."""
    shape = (adata.n_obs, "columns")
    images = as_array(f"adata: {_said(features)}", _part(adata, features), shape, np.float32)
    coords = as_array(f"adata: {_said(spatial_key)}", _part(adata, spatial_key), shape, np.float64)
    barcodes = adata.obs_names.to_numpy(dtype=str)
    for name, rows in _sections(adata, library_key):
        yield Slide(name, images[rows], coords[rows], barcodes[rows]), rows


def _sections(adata: anndata.AnnData, library_key: str | None) -> Iterator[tuple[str, np.ndarray | slice]]:
    if library_key is None:
        yield WHOLE, slice(None)
        return
    if library_key not in adata.obs:
        known = ", ".join(map(str, adata.obs.columns)) or "none"
        raise InputError(f"library_key: adata.obs has no column {library_key!r}; its columns: {known}")
    labels = as_names(f"adata: obs[{library_key!r}]", adata.obs[library_key].to_numpy(dtype=object))
    for name in dict.fromkeys(labels.tolist()):
        yield name, np.flatnonzero(labels == name)


def _said(key: str) -> str:
    return "X" if key == "X" else f"obsm[{key!r}]"


def _part(adata: anndata.AnnData, key: str) -> Any:
    if key == "X" and adata.X is not None:
        return adata.X
    if key not in adata.obsm:
        raise InputError(f"adata: has no {_said(key)}; obsm has {', '.join(sorted(adata.obsm)) or 'nothing'}")
    return adata.obsm[key]

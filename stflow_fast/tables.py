"""Predictions added to a table that is in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .arrays import as_array, as_names
from .cohort import SamplingConfig, drawn_by, gene_names, made_by, model_and_origin
from .errors import InputError
from .model import Denoiser
from .sampling import observation_of
from .slides import Origin, Slide
from .slides.anndata_file import library_of
from .slides.genes import known_otherwise, other_spelling

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
    gene_key: str | None = None,
    sampling: SamplingConfig | None = None,
    device: str = "auto",
) -> None:
    """Predict the spots of a table, and add the prediction to it.

    Where the table has genes that the model predicts, it becomes ``layers[key_added]``, [N, G_all] float32 in the unit
    of the training, with NaN for genes that are not predicted; predicted genes that the table lacks are left out, and a
    warning says how many, and how it spells them if otherwise. A layer is dense: 7 GB for 100,000 spots of 18,000
    genes. Where the table has none of the genes (a warning says so) or no genes at all, the prediction becomes
    ``obsm[key_added]``, a DataFrame [N, G] of all of them. ``uns[key_added]`` says what made it, its "in" where it is
    ("layers" or "obsm"), and its "notes" what is strange about the slides.

    Args:
        run: a run or model folder, or a model.
        adata: the table; it stays as it is if anything fails.
        features: of ``obsm`` with the patch embeddings [N, F], or "X".
        key_added: name of what is added. An earlier prediction of that name is taken away, wherever it is, and nothing
            else is.
        spatial_key: of ``obsm`` with the spot centres in level-0 pixels.
        library_key: column of ``obs`` that names the section of each spot. Each is predicted as a slide of its own,
            whose id is that name; without it all spots are one slide, "adata", which is refused where a column such as
            ``library_id`` names sections that lie over one another. "" is no column: there are no sections.
        gene_key: column of ``var`` with the names of the genes; the index when None.
        sampling: how to draw. With its ``draws``, the standard deviation by the model's observation model is added
            beside as ``key_added + "_std"``.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is.

    Raises:
        InputError: a bad model, keys that are not there, a gene that stands in several columns, a ``key_added`` that is
            taken, features of another size than the model's, or what Slide refuses.
        SeveralSections: sections that lie over one another, see :class:`stflow_fast.slides.Slide`.
    """
    model, origin = model_and_origin(run, device)
    sampling, genes = sampling or SamplingConfig(), gene_names(model)
    std_key = f"{key_added}_std"
    before = _earlier(adata, key_added, (key_added, *([std_key] if sampling.draws else [])))
    names = _gene_index(adata, gene_key)
    column = _columns(names, genes)
    place = _place_of(column, genes, adata.n_vars)
    predicted = {key_added: np.full((adata.n_obs, place.width), np.nan, dtype=np.float32)}
    if sampling.draws:
        predicted[std_key] = predicted[key_added].copy()
    draw, slides = sampling.drawer(model), []
    notes: list[str] = []
    for slide, rows in _slides(adata, features, spatial_key, library_key):
        drawn = draw(slide)
        mean = drawn.expression.float().numpy()
        for name, values in predicted.items():
            made = mean if name == key_added else observation_of(model).std(mean)
            of_slide = values[rows]
            of_slide[:, place.columns] = made[:, place.chosen]
            values[rows] = of_slide
        slides.append(slide.id)
        notes.extend(f"{slide.id}: {note}" for note in slide.notes)
    missing = [gene for gene in genes if gene not in column]
    if missing and adata.n_vars and features != "X":
        warnings.warn(_genes_missing(missing, genes, names, adata.var), stacklevel=2)
    for part, name in before:
        del getattr(adata, part)[name]
    for name, values in predicted.items():
        added = values if place.part == "layers" else pd.DataFrame(values, adata.obs_names, list(genes))
        getattr(adata, place.part)[name] = added
    adata.uns[key_added] = {
        "model": origin,
        **made_by(model, sampling),
        **drawn_by(model, drawn),
        "in": place.part,
        "features": features,
        "slides": slides,
        "notes": "; ".join(notes),
    }


def _earlier(adata: anndata.AnnData, key_added: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """What an earlier prediction of the name ``key_added`` has left, as (part of the table, name).

    Raises:
        InputError: no table, an empty one, or something else in the way of what is to be added as ``names``.
    """
    if not all(hasattr(adata, part) for part in ("obs", "obsm", "layers", "uns")):
        raise InputError(f"adata: must be an AnnData, not {type(adata).__name__}")
    if not adata.n_obs:
        raise InputError("adata: has no spots")
    about = adata.uns.get(key_added)
    ours = []
    if isinstance(about, Mapping) and "weights_sha256" in about:
        there = (key_added, *([f"{key_added}_std"] if "draws" in about else []))
        ours = [("uns", key_added), *((str(about.get("in")), name) for name in there)]
    for name in names:
        for part in ("layers", "obsm", "uns"):
            if name in getattr(adata, part) and (part, name) not in ours:
                raise InputError(f"key_added: adata.{part}[{name!r}] is no prediction; choose another name")
    return [(part, name) for part, name in ours if part in ("layers", "obsm") and name in getattr(adata, part)]


def _gene_index(adata: anndata.AnnData, gene_key: str | None) -> pd.Index:
    """Names of the genes of the columns; ``name`` of the index is what to call it."""
    if gene_key is None:
        return adata.var_names.rename("adata.var_names")
    if gene_key not in adata.var:
        known = ", ".join(map(str, adata.var.columns)) or "none"
        raise InputError(f"gene_key: adata.var has no column {gene_key!r}; its columns: {known}")
    return pd.Index(adata.var[gene_key].astype(str), name=f"adata.var[{gene_key!r}]")


def _columns(names: pd.Index, genes: Sequence[str]) -> dict[str, int]:
    """The column of each gene that the table has, in the order of the genes."""
    place = {name: index for index, name in enumerate(names)}
    twice = set(names[names.duplicated()]).intersection(genes)
    if twice:
        raise InputError(f"adata: gene {min(twice)} stands in several columns; make {names.name} unique")
    return {gene: place[gene] for gene in genes if gene in place}


class _Place(NamedTuple):
    """Where a prediction of G genes goes."""

    part: str  # of the table: "layers" or "obsm"
    width: int  # columns of what is added
    chosen: np.ndarray | slice  # of the G genes, those that are added
    columns: list[int] | slice  # of what is added, those of these genes


def _place_of(column: Mapping[str, int], genes: Sequence[str], n_vars: int) -> _Place:
    """By the columns of :func:`_columns`."""
    if not column:
        return _Place("obsm", len(genes), slice(None), slice(None))
    return _Place("layers", n_vars, np.array([gene in column for gene in genes]), list(column.values()))


def _genes_missing(missing: Sequence[str], genes: Sequence[str], names: pd.Index, var: pd.DataFrame) -> str:
    """What to say of predicted genes that a table with genes lacks."""
    there = names.to_list()
    if len(missing) == len(genes):
        some = other_spelling(missing, there, var)
        return f"none of {len(genes)} predicted genes is in {names.name}, so the prediction is in obsm{some}"
    otherwise = known_otherwise(missing, there, var)
    return f"{len(missing)} of {len(genes)} predicted genes are not in {names.name}, and left out{otherwise}"


def _slides(
    adata: anndata.AnnData, features: str, spatial_key: str, library_key: str | None
) -> Iterator[tuple[Slide, np.ndarray | slice]]:
    """The sections of a table, one slide each, and their rows in it."""
    shape = (adata.n_obs, "columns")
    images = as_array(f"adata: {_said(features)}", _part(adata, features), shape, np.float32)
    coords = as_array(f"adata: {_said(spatial_key)}", _part(adata, spatial_key), shape, np.float64)
    barcodes = adata.obs_names.to_numpy(dtype=str)
    if not library_key:
        column, library = library_of(adata.obs, library_key)
        origin = Origin(library_key=column)
        yield Slide(WHOLE, images, coords, barcodes, library_id=library, origin=origin), slice(None)
        return
    for name, rows in _sections(adata, library_key):
        yield Slide(name, images[rows], coords[rows], barcodes[rows]), rows


def _sections(adata: anndata.AnnData, library_key: str) -> Iterator[tuple[str, np.ndarray]]:
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

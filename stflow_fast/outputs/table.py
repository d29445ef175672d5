"""A prediction as a table that squidpy and scanpy draw as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..slides import Origin, Slide
from ..slides.places import spacing
from .columns import carried
from .layout import ABOUT
from .names import free_names, key_of, text_index, text_of

if TYPE_CHECKING:
    import anndata  # where it is used, it is imported, as in slides/anndata_table.py

CANVAS = 500
"""Pixels of the longer side of the white image that spots are drawn on; circles do not get coarser by it."""


def prediction_table(slide: Slide, genes: Sequence[str], about: dict[str, Any]) -> anndata.AnnData:
    """A prediction as AnnData without its X, laid out so that squidpy and scanpy draw it as it is.

    Args:
        slide: what was predicted. Its ``obs`` is carried, with its barcodes as the index; columns of what anndata
            cannot write become text, and a note of the prediction names them.
        genes: the G names of X.
        about: what made it, plain types; becomes ``uns["stflow_fast"]`` with the slide, its notes, and where the
            diameter of its spots is from: "file", "spacing" (the distance between those of a library) or "unknown" (a
            library of a single spot: 1 pixel), each where it is so of all its libraries, else "mixed".
    """
    import anndata

    barcodes = text_index(slide.barcodes.tolist())
    libraries, drawn, known_from = _libraries(slide)
    obs, notes = carried(slide.obs, barcodes, {"library_id": libraries})
    told = {**about, "slide": slide.id, "notes": "; ".join((*slide.notes, *notes)), "spot_diameter_from": known_from}
    if slide.micron_per_pixel is not None:
        told["micron_per_pixel"] = slide.micron_per_pixel
    return anndata.AnnData(
        obs=obs,
        var=pd.DataFrame(index=text_index(genes)),
        obsm={"spatial": slide.coords},
        uns={ABOUT: told, "spatial": drawn},
    )


def _libraries(slide: Slide) -> tuple[pd.Categorical, dict[str, Any], str]:
    """[N] the library of each spot (its section, or the slide where it has none), what each is drawn by
    (``uns["spatial"]``), and where the diameters of their spots are from."""
    given = np.full(slide.n_spots, slide.id) if slide.library_id is None else slide.library_id
    names, codes = np.unique(given, return_inverse=True)
    codes = codes.reshape(-1)
    keys = free_names([key_of(text_of(name)) for name in names.tolist()])
    drawn, known_from = {}, set()
    for number, (key, name) in enumerate(zip(keys, names.tolist(), strict=True)):
        coords, factors = slide.coords[codes == number], _scalefactors(slide.origin, name, len(names))
        diameter, is_from = _spot_diameter(coords, factors)
        drawn[key] = _canvas(coords, {**factors, "spot_diameter_fullres": diameter})
        known_from.add(is_from)
    is_from = "mixed" if len(known_from) > 1 else known_from.pop()
    return pd.Categorical.from_codes(codes, text_index(keys)), drawn, is_from


def _scalefactors(origin: Origin, library: str, n_libraries: int) -> Mapping[str, float]:
    """Those of the library; of the slide as a whole where the file tells them of no library, or it is the only one."""
    told = origin.library_scalefactors
    return told.get(library, {}) if told and (library in told or n_libraries > 1) else origin.scalefactors


def _spot_diameter(coords: np.ndarray, scalefactors: Mapping[str, float]) -> tuple[float, str]:
    """In level-0 pixels, and where it is from."""
    given = scalefactors.get("spot_diameter_fullres")
    if given is not None and given > 0:
        return float(given), "file"
    apart = spacing(coords)
    return (1.0, "unknown") if apart is None else (apart, "spacing")


def _canvas(coords: np.ndarray, scalefactors: dict[str, float]) -> dict[str, Any]:
    """``uns["spatial"][library]`` of a section. scanpy and squidpy want an image "hires", and squidpy shows what lies
    on it: it is white, reaches from the origin beyond the last spot, and has a factor of its own."""
    size = np.maximum(coords.max(axis=0) + scalefactors["spot_diameter_fullres"], 1.0)
    scale = CANVAS / size.max()
    width, height = np.ceil(size * scale).astype(int)
    return {
        "images": {"hires": np.full((height, width, 3), 255, dtype=np.uint8)},
        "scalefactors": {**scalefactors, "tissue_hires_scalef": float(scale)},
        "metadata": {},
    }

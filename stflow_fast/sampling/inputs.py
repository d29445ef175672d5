"""What a sampler is given, of any make, checked against the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arrays import as_tensor
from ..errors import InputError
from ..model import Denoiser
from ..slides import Slide, StoredRows

Features = Tensor | StoredRows
"""[N, F]: slices of rows can be taken of them."""


def slide_inputs(model: Denoiser, slide: object) -> tuple[Features, Tensor, str]:
    """Features [N, F] and coordinates [N, 2] of any make, and the slide's id. What is NaN is not looked for: features
    are read once, by who embeds them, and the graph looks at coordinates."""
    features: Any
    coords: Any
    if isinstance(slide, Slide):
        if slide.features is None:
            raise InputError(f"slide {slide.id}: has no patch features; give a file of them too (--embeddings)")
        features, coords, slide_id = slide.features, slide.coords, slide.id
    elif isinstance(slide, (tuple, list)) and len(slide) == 2:
        (features, coords), slide_id = slide, ""
    else:
        found = f"{len(slide)} of them" if isinstance(slide, (tuple, list)) else type(slide).__name__
        raise InputError(f"slide: must be a Slide, or two arrays, features [N, F] and coordinates [N, 2], not {found}")
    where = where_of(slide_id)
    wanted, mend = model.config.feature_dim, "use embeddings of the encoder that the model was trained with"
    if isinstance(features, StoredRows):
        if features.columns != wanted:
            raise InputError(f"{where}features: must have shape [N, {wanted}], not {list(features.shape)}; {mend}")
    else:
        features = as_tensor(f"{where}features", features, ("N", wanted), mend)
    n = len(features)
    return features, as_tensor(f"{where}coords", coords, (n, 2), f"features are of {n} spots"), slide_id


def expression_array(name: str, x: Any, shape: tuple[int, int], slide_id: str) -> Tensor:
    """[N, G] of any make. Contiguous: products of it have the same bits, however it came."""
    return as_tensor(f"{where_of(slide_id)}{name}", x, shape).contiguous()


def where_of(slide_id: str) -> str:
    return f"slide {slide_id}: " if slide_id else ""

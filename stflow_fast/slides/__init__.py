"""Slides: one structure, and one small reader per format."""

from .anndata_file import read_h5ad
from .hest import Fold, HestTask, read_embeddings, read_slide
from .slide import NORMALIZATIONS, Slide, normalize_counts

__all__ = [
    "NORMALIZATIONS",
    "Fold",
    "HestTask",
    "Slide",
    "normalize_counts",
    "read_embeddings",
    "read_h5ad",
    "read_slide",
]

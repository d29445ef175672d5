"""Slides: one structure, and one small reader per format behind one registry."""

from .anndata_file import read_h5ad
from .embeddings import read_embeddings
from .genes import read_genes
from .hest import Fold, HestTask
from .options import ReadOptions
from .places import SeveralSections
from .registry import FORMATS, SlideSource, read, recognise, sources
from .rows import StoredRows
from .slide import NORMALIZATIONS, Origin, Slide, normalize_counts
from .stimage_task import StImageTask
from .tasks import open_task

__all__ = [
    "FORMATS",
    "Fold",
    "HestTask",
    "NORMALIZATIONS",
    "Origin",
    "ReadOptions",
    "SeveralSections",
    "Slide",
    "SlideSource",
    "StImageTask",
    "StoredRows",
    "normalize_counts",
    "open_task",
    "read",
    "read_embeddings",
    "read_genes",
    "read_h5ad",
    "recognise",
    "sources",
]

"""What a person may say about how a file is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SPATIAL_KEY = "spatial"
FEATURES_KEY = "features"
COORDINATE_SYSTEM = "global"


def section_id(stem: str, section: str) -> str:
    """The id of a slide that is a section of a file; fit for a file's name."""
    return f"{stem}_{section}".replace("/", "_")


@dataclass(frozen=True)
class ReadOptions:
    """How to read slides; what a format does not have is not looked at.

    Attributes:
        format: name of the reader, one of :data:`stflow_fast.slides.FORMATS`; by content when None.
        features_key: where the patch features are: of ``obsm``, or "X" (AnnData), name of the table (wsidata), or of
            the data set (HDF5 features). The usual one of the format when None.
        spatial_key: of ``obsm`` with the spot centres.
        library_key: column of ``obs`` that names the section of each spot; each is a slide then. Where a table of
            SpatialData annotates several regions, each of these is one when None. Empty: no column does.
        section: the one of those sections that is read; of STImage-1K4M, the slide.
        gene_key: column of ``var`` with the names of the genes; the index when None.
        coordinate_system: of a SpatialData store.
        table: of a SpatialData store; its only one when None.
        expression: read the counts, where there are some.
        gene_names: read the names of the genes, though not the counts.
        require_features: a file without features is refused; else its slide has none.
        embeddings: file or folder (``{id}.h5``) with the features of slides that have none, matched by barcode.
    """

    format: str | None = None
    features_key: str | None = None
    spatial_key: str = SPATIAL_KEY
    library_key: str | None = None
    section: str | None = None
    gene_key: str | None = None
    coordinate_system: str = COORDINATE_SYSTEM
    table: str | None = None
    expression: bool = False
    gene_names: bool = False
    require_features: bool = True
    embeddings: Path | None = None

"""Cohorts with splits: which of the two kinds a folder is."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from .hest import HestTask
from .stimage_task import ORGANS, StImageTask


def open_task(
    root: str | Path,
    encoder: str,
    embeddings: str | Path | None = None,
    gene_key: str | None = None,
    organ: str | None = None,
) -> HestTask | StImageTask:
    """A HEST-bench task folder, or where an organ is named, that organ of STImage-1K4M.

    Args:
        root, encoder, embeddings: see the two.
        gene_key: of HEST-bench's AnnData.
        organ: one of STImage-Bench's.

    Raises:
        InputError: a folder of STImage-1K4M without an organ, a ``gene_key`` with one, or what the two refuse.
    """
    if organ is None:
        if (Path(root) / "meta").is_dir() and not (Path(root) / "splits").is_dir():
            raise InputError(f"{root}: is the folder of STImage-1K4M; name one of {', '.join(ORGANS)} with --organ")
        return HestTask(root, encoder, embeddings, gene_key)
    if gene_key is not None:
        raise InputError("gene_key: is of AnnData; the tables of STImage-1K4M have names of genes only")
    return StImageTask(root, encoder, embeddings, organ)

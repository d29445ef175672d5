"""Folds of benchmarks as what a model learns from, and what its epoch is chosen on."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..slides import open_task
from ..windows import (
    HELD_OUT_REGIONS,
    HELD_OUT_SLIDES,
    NOTHING,
    TEST,
    TrainingConfig,
    TrainingData,
    hold_out_regions,
    hold_out_slides,
)

SELECTIONS = ("none", "validation", "test")
"""What the epoch may be chosen on, see :func:`load_fold`."""


def load_fold(
    data: str | Path,
    encoder: str,
    fold: int = 0,
    genes: str = "var_50genes.json",
    *,
    embeddings: str | Path | None = None,
    normalize: str = "log1p",
    select_on: str = "none",
    gene_key: str | None = None,
    organ: str | None = None,
    config: TrainingConfig | None = None,
) -> TrainingData:
    """The training side of one fold of a HEST-bench task folder, or of an organ of STImage-1K4M.

    With ``select_on="validation"`` the epoch is chosen on the slides of ``splits/val_{fold}.csv`` where there is one,
    else on training slides that are held out, or on regions of them where they are few; with "test" on the test slides,
    as the published code does; with "none" on nothing: all slides but those of the test train, for a fixed number of
    epochs, and the model is the mean of the weights on the way.

    Args:
        data: the task folder.
        encoder: name of the embeddings' folder.
        fold: number of the split.
        genes: the gene list, a file in the task folder or elsewhere; see :func:`stflow_fast.slides.read_genes`.
        embeddings: where the embeddings are, if not in the task folder.
        normalize: see ``stflow_fast.slides.NORMALIZATIONS``.
        select_on: one of :data:`SELECTIONS`.
        gene_key: column of ``var`` with the names of the genes; its index when None.
        organ: of STImage-1K4M, whose folder ``data`` then is; see :class:`stflow_fast.slides.StImageTask`.
        config: its seed and validation_fraction decide the regions.

    Raises:
        InputError: as :func:`stflow_fast.slides.open_task` and Slide; another ``select_on``.
    """
    if select_on not in SELECTIONS:
        raise InputError(f"select_on: must be {', '.join(SELECTIONS[:-1])} or {SELECTIONS[-1]}, not {select_on!r}")
    config = config or TrainingConfig()
    task = open_task(data, encoder, embeddings, gene_key, organ)
    split = task.fold(fold)
    train = [task.slide(name) for name in split.train]
    if select_on == "none":
        train += [task.slide(name) for name in split.val]
        selection, selected_on = [], NOTHING
    elif select_on == "test":
        selection, selected_on = [task.slide(name) for name in split.test], TEST
    elif split.val:
        selection, selected_on = [task.slide(name) for name in split.val], HELD_OUT_SLIDES
    else:
        train, selection = hold_out_slides(train, config.validation_fraction, config.seed)
        selected_on = HELD_OUT_SLIDES
        if not selection:
            train, selection = hold_out_regions(train, config.validation_fraction, config.seed)
            selected_on = HELD_OUT_REGIONS
    told = {"data": str(data), "organ": organ, "fold": fold, "gene_list": genes, "gene_key": gene_key}
    description = {**told, "test": list(split.test)}
    return TrainingData(train, selection, selected_on, task.genes(genes), encoder, normalize, description)

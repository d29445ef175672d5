"""Options that several commands have."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from ..slides import FORMATS

# Whether a path may be read is seen where it is read: there it is one line, and the others have their turn.
PathArgument = functools.partial(typer.Argument, readable=False)
PathOption = functools.partial(typer.Option, readable=False)

GENE_LIST = 'Gene list: JSON ([...] or {"genes": [...]}), or text with one name a line'

Data = Annotated[Path, PathArgument(help="HEST-bench task folder: splits/, adata/, gene lists, embeddings/.")]
EncoderName = Annotated[str, typer.Option(help="Patch encoder: the name of its embeddings' folder.")]
Embeddings = Annotated[Path | None, PathOption(help="Folder of the embeddings, if not DATA/embeddings.")]
Fold = Annotated[int, typer.Option(help="Number of the split.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any field of TrainingConfig or DenoiserConfig; repeatable."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")]

Seed = Annotated[int, typer.Option(help="Seed of the sampled noise.")]
Steps = Annotated[
    int | None,
    typer.Option(help="Times S of the flow's grid (S - 1 denoiser calls); as trained when left out."),
]
PriorName = Annotated[str | None, typer.Option(help="As trained when left out.")]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
Budget = Annotated[str, typer.Option(help="Memory to keep edge messages in between flow steps.")]
Precision = Annotated[str, typer.Option(help="Of matrix products: float32, on a GPU tf32, or bf16 (error some 1 %).")]
Smooth = Annotated[float, typer.Option(help="Share of the mean over a spot's neighbours to mix in, such as 0.25.")]
Draws = Annotated[
    int | None,
    typer.Option(help="Predict the mean of so many samples, with its standard deviation by the observation model."),
]
Fast = Annotated[bool, typer.Option("--fast", help="One denoiser call from a source of zeros: a quarter of the work.")]

FeaturesKey = Annotated[
    str | None,
    typer.Option(help="Where features are: of obsm, or X; name of a table or data set. As usual if left out."),
]
SpatialKey = Annotated[str, typer.Option(help="Of obsm with the spot centres.")]
LibraryKey = Annotated[str | None, typer.Option(help="Column of obs that names sections; each is a slide then.")]
FeaturesOf = Annotated[
    Path | None, PathOption(help="File, or folder of ID.h5, with features of slides that hold none.")
]
IgnoreEncoder = Annotated[
    bool, typer.Option("--ignore-encoder", help="Take features that another encoder is said to have made.")
]
TableName = Annotated[str | None, typer.Option(help="Of a SpatialData store.")]
CoordinateSystem = Annotated[str, typer.Option(help="Of a SpatialData store.")]
FormatName = Annotated[str | None, typer.Option(help=f"Of {', '.join(FORMATS)}; by content if left out.")]
GeneKey = Annotated[str | None, typer.Option(help="Column of var with the genes' names; the index if left out.")]

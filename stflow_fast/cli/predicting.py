"""Commands that predict, and those that make what predicting wants: sound files, a model, embeddings."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checkpoints import convert as convert_checkpoint
from ..cohort import PAGE, RunConfig, SamplingConfig, SlideLine, load_model, predict, summarize, would_do
from ..embedding import PRECISIONS, embed, patch_files
from ..encoders import LITE0, PUBLISHED
from ..errors import InputError
from ..files import check_output
from ..inspection import Finding, inspect, remarks_of, table_of
from ..outputs import DTYPES, SUFFIXES, OutputConfig
from ..progress import patches_bar, paths_bar, slides_bar
from ..sampling import DEFAULT_MEMORY_BUDGET
from ..slides import ReadOptions, read_genes
from ..slides.options import COORDINATE_SYSTEM, SPATIAL_KEY
from .options import (
    GENE_LIST,
    Budget,
    CoordinateSystem,
    Device,
    Draws,
    Fast,
    FeaturesKey,
    FeaturesOf,
    FormatName,
    GeneKey,
    IgnoreEncoder,
    LibraryKey,
    Overwrite,
    PathArgument,
    PathOption,
    Precision,
    PriorName,
    Seed,
    Smooth,
    SpatialKey,
    Steps,
    TableName,
)
from .parsing import numbers_of, shard_of, solver_of, words_of
from .program import app, complain, screen


@app.command(name="predict")
def predict_command(
    run: Annotated[str | None, typer.Argument(help="Folder of a run or of a model.", show_default=False)] = None,
    slides: Annotated[
        list[Path] | None,
        PathArgument(
            help="Features of slides, in any format that inspect knows; folders of them; CSV lists with a column path "
            "(sample_id, and options such as library_key, as further ones).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, PathOption(help="Folder of the predictions.")] = None,
    search_nested: Annotated[bool, typer.Option("--search-nested", help="Look into folders of folders too.")] = False,
    maps: Annotated[str, typer.Option(help="Genes, with commas between, that the page shows of every slide.")] = "",
    engine: Annotated[str, typer.Option(help="local, or ray for the workers of a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of the Ray cluster, such as auto; one on this machine when left out.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes on a CPU; as many as cores for many slides when left out.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, each with a process of its own, such as 0,1.")] = "",
    shard: Annotated[
        str, typer.Option(help="I/N: every N-th slide from the I-th on; all write into one --out.")
    ] = "1/1",
    limit: Annotated[int | None, typer.Option(help="Predict so many slides at most.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be done, and what could not.")
    ] = False,
    summary: Annotated[
        Path | None, PathOption(help="Only draw tables and page of this folder of predictions anew.")
    ] = None,
    features_key: FeaturesKey = None,
    spatial_key: SpatialKey = SPATIAL_KEY,
    library_key: LibraryKey = None,
    table: TableName = None,
    coordinate_system: CoordinateSystem = COORDINATE_SYSTEM,
    format: FormatName = None,
    embeddings: FeaturesOf = None,
    ignore_encoder: IgnoreEncoder = False,
    to: Annotated[str, typer.Option(help=f"What to write: {' or '.join(SUFFIXES)} (a zarr folder).")] = "h5ad",
    dtype: Annotated[str, typer.Option(help=f"Of the numbers written: {' or '.join(DTYPES)}.")] = "float32",
    genes: Annotated[
        Path | None, PathOption(help="List of the genes to write: one a line, or JSON. All if left out.")
    ] = None,
    draws: Draws = None,
    quantiles: Annotated[
        str, typer.Option(help="Percentiles to write with --draws, such as 5,50,95: layers q5, q50, q95.")
    ] = "",
    keep_draws: Annotated[
        bool, typer.Option("--keep-draws", help="Write the draws too: layers draw_0, draw_1, ...")
    ] = False,
    smooth: Smooth = 0.0,
    fast: Fast = False,
    n_sample_steps: Steps = None,
    prior: PriorName = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory_budget: Budget = DEFAULT_MEMORY_BUDGET,
    precision: Precision = "float32",
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="Predict only the slides that --out lacks.")] = False,
) -> None:
    """Predict slides: one .h5ad (or SpatialData .zarr) each, slides.csv, genes.csv and index.html. Exit code 3 where
    some slides failed."""
    if summary is not None:
        raise typer.Exit(_draw_anew(summary))
    if run is None or not slides or (out is None and not dry_run):
        raise InputError("predict: wants a model, slides and --out (or --summary FOLDER); see predict --help")
    reading = ReadOptions(
        format=format,
        features_key=features_key,
        spatial_key=spatial_key,
        library_key=library_key,
        coordinate_system=coordinate_system,
        table=table,
        embeddings=embeddings,
    )
    solver, percents = solver_of(n_sample_steps, prior, fast), numbers_of("quantiles", quantiles, float)
    config = RunConfig(
        shard=shard_of(shard),
        limit=limit,
        nested=search_nested,
        engine=engine,
        address=address,
        workers=workers,
        gpus=numbers_of("gpus", gpus) or None,
        maps=tuple(words_of(maps)),
    )
    if dry_run or out is None:
        with paths_bar() as on_path:
            found = would_do(run, slides, reading, config, ignore_encoder, on_path)
        _show(found)
        raise typer.Exit(3 if any(each.problem for each in found) else 0)
    _predict(
        run,
        slides,
        out,
        sampling=SamplingConfig(*solver, seed, memory_budget, precision, smooth, draws),
        output=OutputConfig(to, dtype, read_genes(genes) if genes else None, percents, keep_draws),
        config=config,
        device=device,
        reading=reading,
        ignore_encoder=ignore_encoder,
        overwrite=overwrite,
        resume=resume,
    )


def _draw_anew(folder: Path) -> int:
    """Tables and page of a folder of predictions; the exit code."""
    lines = summarize(folder)
    failed = sum(not line.is_done for line in lines)
    typer.echo(f"{len(lines) - failed} slides in {folder}, {failed} failed; {folder / PAGE}")
    return 3 if failed else 0


def _predict(run: str, slides: list[Path], out: Path, **options: Any) -> None:
    """With a progress bar, until done or interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's is as good as Ctrl-C
    with slides_bar() as bar:

        def on_slide(line: SlideLine, total: int) -> None:
            bar(line.slide, line.notes, line.spots or 0, total)

        try:
            written = predict(run, slides, out, on_slide=on_slide, **options)
        except KeyboardInterrupt:
            said = "interrupted; what is done is kept: the same command with --resume (without --overwrite) goes on"
            complain(said, code=130)
    typer.echo(f"{len(written)} slides in {out}; {out / PAGE}")


@app.command(name="inspect")
def inspect_command(
    paths: Annotated[list[Path], PathArgument(help="Files of slides, or folders with such.")],
    model: Annotated[str | None, typer.Option(help="Folder of a run or of a model, to hold them against.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a list of one object a slide.")] = False,
    features_key: FeaturesKey = None,
    spatial_key: SpatialKey = SPATIAL_KEY,
    library_key: LibraryKey = None,
    gene_key: GeneKey = None,
    table: TableName = None,
    coordinate_system: CoordinateSystem = COORDINATE_SYSTEM,
    format: FormatName = None,
    embeddings: FeaturesOf = None,
    ignore_encoder: IgnoreEncoder = False,
) -> None:
    """Say what files are, and what is wrong with them. Exit code 3 where one cannot be predicted; files of expression
    without features, as a task folder has them, count as such only with --model, --features-key or --embeddings."""
    reading = ReadOptions(
        format=format,
        features_key=features_key,
        spatial_key=spatial_key,
        library_key=library_key,
        gene_key=gene_key,
        coordinate_system=coordinate_system,
        table=table,
        embeddings=embeddings,
    )
    held_against = None if model is None else load_model(model, "cpu")
    with paths_bar() as on_path:
        found = inspect(paths, reading, held_against, on_path, ignore_encoder)
    if as_json:
        typer.echo(json.dumps([each.to_dict() for each in found], indent=2))
    else:
        _show(found)
    if any(each.problem for each in found):
        raise typer.Exit(3)


def _show(found: list[Finding]) -> None:
    """A table for people, and what is to be said of it."""
    console = screen(160)
    console.print(table_of(found))
    for remark in remarks_of(found):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)


@app.command()
def convert(
    published: Annotated[Path, PathArgument(help="A state_dict (.pth) of the published code.")],
    out: Annotated[Path, PathOption(help="Folder of the model.")],
    genes: Annotated[Path, PathOption(help=f"The predicted genes in order. {GENE_LIST}.")],
    encoder: Annotated[str, typer.Option(help="Patch encoder it was trained with.")] = "",
    normalize: Annotated[str, typer.Option(help="What it predicts.")] = "log1p",
    n_neighbors: Annotated[int | None, typer.Option(help="Neighbours K it was trained with; published: 8.")] = None,
    non_negative: Annotated[
        bool | None,
        typer.Option(
            "--non-negative/--no-non-negative",
            help="A ReLU behind every gene head: gene_updater.non_negative of the code that trained it.",
        ),
    ] = None,
    activation: Annotated[str | None, typer.Option(help="gelu or relu, where the MLPs are not gated.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn a published checkpoint into a model folder (config.json and model.safetensors)."""
    names = read_genes(genes)
    asked = {"n_neighbors": n_neighbors, "non_negative": non_negative, "activation": activation}
    settings = {name: value for name, value in asked.items() if value is not None}
    model = convert_checkpoint(published, names, encoder, normalize, **settings)
    check_output(out, "config.json", reuse=overwrite)
    model.save_pretrained(out)
    typer.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} genes; model in {out}")


@app.command(name="embed")
def embed_command(
    patches: Annotated[list[Path], PathArgument(help="HEST's patches: files, their folder, or task folders.")],
    encoder: Annotated[
        str,
        typer.Option(
            help=f"{LITE0}; a folder, or OWNER/NAME of the Hub, for transformers; {', '.join(PUBLISHED)} or timm:NAME."
        ),
    ],
    out: Annotated[
        Path | None, PathOption(help="Folder of all encoders' embeddings; embeddings/ beside patches/ when left out.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the folder in --out; the encoder's when left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Patches encoded at once.")] = 64,
    precision: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRECISIONS)}; the last two are faster on a GPU, and less exact.")
    ] = "float32",
    dtype: Annotated[str, typer.Option(help="Of the embeddings in the file: float32 or float16.")] = "float32",
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep the files that this call would write again.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of these slides.")] = False,
) -> None:
    """Embed the patches of slides: one .h5 each, where train --encoder NAME looks for it."""
    files = patch_files(patches)
    with patches_bar(len(files)) as on_patches:
        written = embed(
            files.values(),
            encoder,
            out,
            name=name,
            batch_size=batch_size,
            precision=precision,
            dtype=dtype,
            device=device,
            resume=resume,
            overwrite=overwrite,
            on_patches=on_patches,
        )
    typer.echo(f"{len(written)} slides in {written[0].parent}")

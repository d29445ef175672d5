"""The command line. Bad input is one line on standard error and exit code 2."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from . import report
from ._version import __version__
from .calibration import calibrate
from .checkpoints import convert as convert_checkpoint
from .cohort import PAGE, RunConfig, SamplingConfig, SlideLine, evaluate, load_model, predict, summarize, would_do
from .config import DenoiserConfig
from .demo import run_demo
from .doctor import diagnose
from .embedding import PRECISIONS, embed, patch_files
from .encoders import LITE0, PUBLISHED
from .errors import InputError, SlidesFailed, others_written
from .files import check_output, write_json
from .inspection import Finding, inspect, remarks_of, table_of
from .outputs import DTYPES, SUFFIXES, OutputConfig
from .priors import FittedSource
from .progress import cases_bar, epochs_bar, groups_bar, patches_bar, paths_bar, slides_bar
from .protocol import (
    CERTAINTY_HEAD,
    CERTAINTY_NOTE,
    PAGE_FILE,
    Plan,
    cells_of,
    certainty_cells_of,
    hest_tasks,
    notes_of,
    read_patients,
    run_protocol,
    stimage_tasks,
)
from .runs import CURVES_FILE, EVALUATION_FOLDER, MODEL_FOLDER, RUN_FILE
from .sampling import DEFAULT_MEMORY_BUDGET
from .slides import FORMATS, NORMALIZATIONS, HestTask, ReadOptions, Slide, read_genes
from .slides.options import COORDINATE_SYSTEM, SPATIAL_KEY
from .slides.panels import variable_genes_of
from .slides.stimage import ORGANS
from .training import SELECTIONS, fit, load_fold
from .windows import FIXED_EPOCHS, TrainingConfig, selection_words

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Predict spatial gene expression from histology: STFlow in memory linear in the spots.",
)

# One default for the flags and for Python.
_TRAINING = TrainingConfig()

# Whether a path may be read is seen where it is read: there it is one line, and the others have their turn.
PathArgument = functools.partial(typer.Argument, readable=False)
PathOption = functools.partial(typer.Option, readable=False)

Data = Annotated[Path, PathArgument(help="HEST-bench task folder: splits/, adata/, gene lists, embeddings/.")]
Embeddings = Annotated[Path | None, PathOption(help="Folder of the embeddings, if not DATA/embeddings.")]
Fold = Annotated[int, typer.Option(help="Number of the split.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampled noise.")]
Steps = Annotated[
    int | None,
    typer.Option(help="Times S of the flow's grid (S - 1 denoiser calls); as trained when left out."),
]
Device = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
Budget = Annotated[str, typer.Option(help="Memory to keep edge messages in between flow steps.")]
Precision = Annotated[str, typer.Option(help="Of matrix products: float32, on a GPU tf32, or bf16 (error some 1 %).")]
Smooth = Annotated[float, typer.Option(help="Share of the mean over a spot's neighbours to mix in, such as 0.25.")]
Draws = Annotated[
    int | None,
    typer.Option(help="Predict the mean of so many samples, with its standard deviation by the observation model."),
]
Fast = Annotated[bool, typer.Option("--fast", help="One denoiser call from a source of zeros: a quarter of the work.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")]
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
GENE_LIST = 'Gene list: JSON ([...] or {"genes": [...]}), or text with one name a line'
GeneKey = Annotated[str | None, typer.Option(help="Column of var with the genes' names; the index if left out.")]


MOST_SHOWN = 50
"""Lines about failed slides on a terminal."""


def main() -> None:
    """Entry point of ``stflow-fast``."""
    try:
        app()
    except SlidesFailed as error:
        shown = list(error.failed[:MOST_SHOWN])
        if len(error.failed) > MOST_SHOWN:
            shown.append(f"and {len(error.failed) - MOST_SHOWN} more slides failed; slides.csv has them all")
        others = [others_written(error.n_written, error.folder)] if error.n_written else []
        _complain("\n".join([*shown, *others]), code=3 if error.n_written else 2)
    except InputError as error:
        _complain(str(error))
    except PermissionError as error:  # of a folder on the way to a file, wherever that is looked for
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}; give yourself the right to read it, or name another path")


def _complain(said: str, code: int = 2) -> NoReturn:
    """Print each line of what is wrong, and end with the code."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in said.splitlines():
        console.print(f"stflow-fast: {line}", markup=False)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


def _parse_settings(pairs: list[str], taken: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """NAME=VALUE pairs as fields of TrainingConfig and of DenoiserConfig, in the types of their defaults."""
    fields = {
        field.name: (home, _kind_of(config, field.name))
        for home, config in enumerate((TrainingConfig, DenoiserConfig))
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and field.name not in taken
    }
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name in taken:
            raise InputError(f"--set {name}: has a flag of its own, --{name.replace('_', '-')}")
        if name not in fields:
            raise InputError(f"--set {name}: is not a setting; the settings are {', '.join(fields)}")
        home, kind = fields[name]
        try:
            found[home][name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise InputError(f"--set {name}: {text!r} is not a {kind.__name__}") from error
    return found


def _kind_of(config: type, field: str) -> type:
    """Of the values of a field, but for None."""
    hint = typing.get_type_hints(config)[field]
    return next((kind for kind in typing.get_args(hint) if kind is not type(None)), hint)


def _print_fallbacks(source: FittedSource | None) -> None:
    """How many genes of a source have the simpler law, if any."""
    if source is not None and (flat := source.fitted_on.get("fell_back")):
        typer.echo(
            f"source {source.name}: {flat:,} of {len(source.genes):,} genes show no over-dispersion, or no count: "
            "Poisson's law is theirs, with excess zeros where these are likelier"
        )


def _print_notes(slides: Iterable[Slide]) -> None:
    console = Console(stderr=True)
    for name, notes in {slide.id: slide.notes for slide in slides}.items():  # the regions of a slide share its notes
        for note in notes:
            console.print(f"{name}: {note}", markup=False)


@app.command()
def train(
    data: Data,
    encoder: Annotated[str, typer.Option(help="Patch encoder: the name of its embeddings' folder.")],
    out: Annotated[Path, PathOption(help="Folder of the run.")],
    fold: Fold = 0,
    genes: Annotated[str, typer.Option(help=f"{GENE_LIST}; in DATA, or elsewhere.")] = "var_50genes.json",
    gene_key: GeneKey = None,
    organ: Annotated[
        str | None, typer.Option(help=f"DATA is STImage-1K4M: one of {', '.join(ORGANS)}; FOLD is the seed.")
    ] = None,
    embeddings: Embeddings = None,
    normalize: Annotated[str, typer.Option(help=f"What to predict: {', '.join(NORMALIZATIONS)}.")] = "log1p",
    select_on: Annotated[
        str,
        typer.Option(
            help=f"What the epoch is chosen on: {', '.join(SELECTIONS)}. none: all slides train for a fixed number of "
            "epochs, and the weights are averaged; validation: held out of training; test: as published."
        ),
    ] = "none",
    epochs: Annotated[
        int | None, typer.Option(help=f"At most; {FIXED_EPOCHS} with --select-on none, else 100, if left out.")
    ] = None,
    patience: Annotated[int, typer.Option(help="Epochs without improvement before stopping.")] = _TRAINING.patience,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = _TRAINING.learning_rate,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field of TrainingConfig or DenoiserConfig; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    precision: Annotated[
        str | None, typer.Option(help="no (float32), bf16 or, on a GPU, fp16; as Accelerate is set when left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train on one fold of a HEST-bench task folder. Several devices: accelerate launch -m stflow_fast train ..."""
    chosen = {"epochs": epochs, "patience": patience, "learning_rate": learning_rate, "seed": seed}
    training, denoiser = _parse_settings(settings or [], taken=chosen)
    config = TrainingConfig(**chosen, **training)
    # Before slides are read, which may take minutes.
    DenoiserConfig(n_genes=1, feature_dim=1, **denoiser)
    if not resume:
        check_output(out, RUN_FILE, reuse=overwrite)
    loaded = load_fold(
        data,
        encoder,
        fold,
        genes,
        embeddings=embeddings,
        normalize=normalize,
        select_on=select_on,
        gene_key=gene_key,
        organ=organ,
        config=config,
    )
    # Under `accelerate launch` every process runs this; the first one speaks and draws.
    speaks = os.environ.get("RANK", "0") == "0"
    if speaks:
        _print_notes((*loaded.train, *loaded.selection))
    epochs = config.filled_in(loaded.selected_on).epochs
    with epochs_bar(epochs, loaded.selected_on, quiet=not speaks) as on_epoch:
        run = fit(
            loaded,
            out,
            denoiser,
            config,
            precision=precision,
            resume=resume,
            overwrite=overwrite,
            on_epoch=on_epoch,
        )
    if not speaks:
        return
    _print_fallbacks(run.model.source)
    report.training_curves(out / CURVES_FILE, run.records, loaded.selected_on)
    slides = f" ({', '.join(sorted({slide.id for slide in loaded.selection}))})" if loaded.selection else ""
    chosen = f"{selection_words(loaded.selected_on)}{slides}"
    typer.echo(f"model of epoch {run.best_epoch} of {len(run.records)}, {chosen}; in {run.folder}")


@app.command(name="calibrate")
def calibrate_command(
    run: Annotated[Path, PathArgument(help="Folder of a run of train.")],
    data: Annotated[
        Path | None, PathArgument(help="The task folder it was trained on; where it was then if left out.")
    ] = None,
    embeddings: Embeddings = None,
) -> None:
    """Fit how sure the model of a run is: networks are trained without some of the slides each, and the errors that
    they make there are given a law. ``predict --draws`` and ``evaluate`` use it. An interrupted call goes on."""
    with groups_bar() as on_epoch:
        observation = calibrate(run, data, embeddings=embeddings, on_epoch=on_epoch)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report.observation_table(observation))
    console.print(f"written into {run / MODEL_FOLDER}", markup=False)


@app.command(name="evaluate")
def evaluate_command(
    run: Annotated[str, typer.Argument(help="Folder of a run or of a model.")],
    data: Data,
    fold: Fold = 0,
    gene_key: Annotated[
        str | None, typer.Option(help="Column of var with the genes' names; as trained if left out.")
    ] = None,
    json_file: Annotated[Path | None, PathOption("--json", help="Write the scores here.")] = None,
    maps: Annotated[Path | None, PathOption(help="Folder of the pictures; RUN/evaluation when left out.")] = None,
    biomarkers: Annotated[str, typer.Option(help="Genes to show one by one, with commas between.")] = "",
    embeddings: Embeddings = None,
    n_sample_steps: Steps = None,
    prior: Annotated[str | None, typer.Option(help="As trained when left out.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory_budget: Budget = DEFAULT_MEMORY_BUDGET,
    precision: Precision = "float32",
    smooth: Smooth = 0.0,
    draws: Draws = None,
    fast: Fast = False,
) -> None:
    """Score a model on the test slides of a fold, beside the baselines; of one that ``calibrate`` has treated, also how
    sure it is."""
    n_sample_steps, prior = _solver(n_sample_steps, prior, fast)
    sampling = SamplingConfig(n_sample_steps, prior, seed, memory_budget, precision, smooth, draws)
    names = _words(biomarkers)
    with Console(stderr=True).status("sampling the test slides and fitting the baselines"):
        found = evaluate(
            run,
            data,
            fold,
            embeddings=embeddings,
            gene_key=gene_key,
            sampling=sampling,
            device=device,
            biomarkers=names,
        )
    _print_notes(found.slides)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(report.results_table(found.result))
    if "certainty" in found.result:
        console.print(report.certainty_table(found.result))
    if names:
        console.print(report.biomarker_table(found.result, names))
        console.print(report.hotspot_table(found.result["biomarkers"]))
    if json_file:
        write_json(json_file, found.result)
    folder = maps or (Path(run) if Path(run).is_dir() else Path()) / EVALUATION_FOLDER
    shown = found.result, found.slides, found.truth, found.predicted
    for path in report.evaluation_pictures(folder, *shown, biomarkers=names):
        console.print(f"wrote {path}", markup=False)


@app.command(name="genes")
def genes_command(
    data: Data,
    out: Annotated[Path, PathOption(help="Gene list to write: JSON.")],
    n: Annotated[int, typer.Option(help="Genes wanted.")] = 50,
    fold: Annotated[int | None, typer.Option(help="Pick by the training slides of this split.")] = None,
    all_slides: Annotated[
        bool, typer.Option("--all", help="Pick by all slides, those of the test too, as HEST-bench does.")
    ] = False,
    gene_key: GeneKey = None,
    overwrite: Overwrite = False,
) -> None:
    """Pick the most variable genes of a task folder, as HEST-bench does (detected in a tenth of the spots of each
    slide), from the training slides of a split, or as published from all."""
    if all_slides == (fold is not None):
        raise InputError("genes: wants --fold K, for the training slides of a split, or --all")
    if n < 1:
        raise InputError(f"n: must be at least 1, not {n}")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another --out, or pass --overwrite")
    task = HestTask(data, gene_key=gene_key)
    splits = [task.fold(number) for number in (task.folds() if fold is None else [fold])]
    sides = [(*split.train, *split.val, *(split.test if all_slides else ())) for split in splits]
    names = sorted({name for side in sides for name in side})
    write_json(out, {"genes": list(variable_genes_of(map(task.measured, names), n))})
    typer.echo(f"{n} genes by {len(names)} slides ({', '.join(names)}) in {out}")


@app.command(name="protocol")
def protocol_command(
    name: Annotated[str, typer.Argument(help="hest, or stimage.")],
    root: Annotated[Path, PathArgument(help="HEST-bench's folder of tasks, or one such; or that of STImage-1K4M.")],
    encoder: Annotated[str, typer.Option(help="Patch encoder: the name of its embeddings' folder.")],
    out: Annotated[Path, PathOption(help="Folder of the runs and of results.json, results.md.")],
    tasks: Annotated[str, typer.Option(help="With commas between; all if left out.")] = "",
    seeds: Annotated[str, typer.Option(help="With commas between; stimage: each has a split of its own.")] = "0,1,2",
    selections: Annotated[
        str, typer.Option(help=f"What the epoch is chosen on, of {', '.join(SELECTIONS)}.")
    ] = "none,validation,test",
    genes: Annotated[str, typer.Option(help=f"{GENE_LIST}; in each task, or elsewhere.")] = "var_50genes.json",
    embeddings: Embeddings = None,
    patients: Annotated[
        Path | None, PathOption(help="CSV of sample_id (or id) and patient; slides.csv of a task if left out.")
    ] = None,
    certainty: Annotated[
        bool, typer.Option("--certainty", help="Calibrate each run too, which trains it some five times more.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field of TrainingConfig or DenoiserConfig; repeatable."),
    ] = None,
) -> None:
    """Run a benchmark of the field: all tasks, folds, seeds and selections, beside every baseline. A call that was
    interrupted goes on."""
    place = None if embeddings is None else str(embeddings)
    chosen, numbers = tuple(_words(tasks)), _numbers("seeds", seeds)
    training, denoiser = _parse_settings(settings or [], taken={"seed"})
    if name not in ("hest", "stimage"):
        raise InputError(f"protocol: must be hest or stimage, not {name!r}")
    found = hest_tasks(root, encoder, place, chosen) if name == "hest" else stimage_tasks(root, numbers, chosen)
    selected = tuple(_words(selections))
    plan = Plan(found, encoder, numbers, selected, place, genes, certainty, training, denoiser)
    known = None if patients is None else read_patients(patients)
    with cases_bar() as (on_case, on_epoch):
        result = run_protocol(plan, out, known, lambda case, *place: on_case(case.path, *place), on_epoch)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.protocol_table("Mean Pearson over genes", *cells_of(result), notes_of(result)))
    if certain := certainty_cells_of(result):
        console.print(report.protocol_table("Certainty", CERTAINTY_HEAD, certain, [CERTAINTY_NOTE]))
    console.print(f"wrote {out / PAGE_FILE}", markup=False)


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
    prior: Annotated[str | None, typer.Option(help="As trained when left out.")] = None,
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
        lines = summarize(summary)
        failed = sum(not line.is_done for line in lines)
        typer.echo(f"{len(lines) - failed} slides in {summary}, {failed} failed; {summary / PAGE}")
        raise typer.Exit(3 if failed else 0)
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
    names = tuple(_words(maps))
    solver, percents = _solver(n_sample_steps, prior, fast), _numbers("quantiles", quantiles, float)
    config = RunConfig(
        shard=_shard(shard),
        limit=limit,
        nested=search_nested,
        engine=engine,
        address=address,
        workers=workers,
        gpus=_numbers("gpus", gpus) or None,
        maps=names,
    )
    if dry_run:
        with paths_bar() as on_path:
            found = would_do(run, slides, reading, config, ignore_encoder, on_path)
        _show(found)
        raise typer.Exit(3 if any(each.problem for each in found) else 0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's is as good as Ctrl-C
    with slides_bar() as bar:

        def on_slide(line: SlideLine, total: int) -> None:
            bar(line.slide, line.notes, line.spots or 0, total)

        try:
            written = predict(
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
                on_slide=on_slide,
            )
        except KeyboardInterrupt:
            said = "interrupted; what is done is kept: the same command with --resume (without --overwrite) goes on"
            _complain(said, code=130)
    typer.echo(f"{len(written)} slides in {out}; {out / PAGE}")


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise InputError(f"shard: must be I/N such as 1/4, not {text!r}")
    return int(index), int(count)


def _words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(name: str, text: str, kind: type = int) -> tuple[Any, ...]:
    try:
        return tuple(kind(each) for each in text.split(",")) if text else ()
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{name}: must be {what} with commas between, not {text!r}") from None


def _solver(n_sample_steps: int | None, prior: str | None, fast: bool) -> tuple[int | None, str | None]:
    """Steps and prior. With ``--fast`` a single call from zero: what x_t tells beyond the image is little."""
    if fast and not (n_sample_steps is None and prior is None):
        raise InputError("fast: is --n-sample-steps 2 --prior zero; give either")
    return (2, "zero") if fast else (n_sample_steps, prior)


def _show(found: list[Finding]) -> None:
    """A table for people, and what is to be said of it."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table_of(found))
    for remark in remarks_of(found):
        console.print(remark, markup=False, highlight=False, soft_wrap=True)


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


@app.command()
def demo(
    out: Annotated[Path, PathOption(help="Folder of the demo.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the synthetic cohort and the training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train on a synthetic cohort, predict a slide of 10,000 spots, and report: index.html."""
    run_demo(out, seed=seed, overwrite=overwrite, console=Console(width=None if sys.stdout.isatty() else 120))


@app.command()
def benchmark(
    workload: Annotated[
        str,
        typer.Option(
            help="Of sample, train_step, denoise, graph, and single operations: edge_forward, edge_backward, "
            "edge_messages, gated_mlp, gated_mlp_backward, dropout. With commas between."
        ),
    ] = "sample",
    spots: Annotated[str, typer.Option(help="Sizes of the slides, such as 1e3,1e4,605471.")] = "1e3,3e3,1e4",
    providers: Annotated[str | None, typer.Option(help="What to compare; what suits the device when left out.")] = None,
    genes: Annotated[str, typer.Option(help="Sizes of the gene panel.")] = "50",
    k: Annotated[str, typer.Option("--k", help="Neighbours of a spot.")] = "8",
    layout: Annotated[str, typer.Option(help="Of uniform, visium, visium_jittered and clustered.")] = "visium",
    dtype: Annotated[str, typer.Option(help="Of float32, bf16 and, on a GPU, tf32.")] = "float32",
    threads: Annotated[str | None, typer.Option(help="Threads of torch, such as 1,2; as it has when left out.")] = None,
    busy: Annotated[str, typer.Option(help="Processes that count beside what is timed, such as 0,2.")] = "0",
    busy_nice: Annotated[str, typer.Option(help="Their niceness, such as 0,10.")] = "0",
    device: Device = "auto",
    memory_budget: Annotated[
        str | None, typer.Option(help="What one provider may take; most of what is free when left out.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Timed calls, at most; 2 on a CPU, 20 on a GPU when left out.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Leave out a figure that would take longer; repeat calls within it.")
    ] = 45.0,
    minutes: Annotated[float, typer.Option(help="Leave out what would end later.")] = 2.75,
    resume: Annotated[bool, typer.Option("--resume", help="Go on: leave out what --out holds of this commit.")] = False,
    out: Annotated[
        Path | None, PathOption(help="Folder of the results, which are added to; ./benchmark when left out.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw pictures of --out when all is measured.")] = True,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="On a GPU, also what it did by its own clock, kernel by kernel. Slows later cases."
        ),
    ] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Exit code 1 where a figure failed, or was left out for the time.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="On one tiny slide, once: shows that all of it runs, and no figure.")
    ] = False,
    redraw: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Measure nothing: show --out anew. When left out, ./benchmarks/results and the README's section.",
        ),
    ] = False,
) -> None:
    """Measure time and memory against the published code and other ways to write it."""
    # Of the package that is in use; nothing else needs them.
    from .benchmarks import command

    if redraw:
        command.redraw(out)
        return
    options = command.Options(
        workload=workload,
        spots=spots,
        providers=providers,
        genes=genes,
        k=k,
        layout=layout,
        dtype=dtype,
        threads=threads,
        busy=busy,
        busy_nice=busy_nice,
        device=device,
        memory_budget=memory_budget,
        rounds=rounds,
        seconds=seconds,
        minutes=minutes,
        resume=resume,
        rehearse=rehearse,
        profile=profile,
    )
    if code := command.run(options, out or Path("benchmark"), pictures, complete):
        raise typer.Exit(code)


@app.command()
def doctor() -> None:
    """Say what is installed, what would run and why, and what is missing."""
    Console(width=None if sys.stdout.isatty() else 120).print(diagnose())

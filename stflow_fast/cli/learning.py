"""Commands that learn: what to predict, a model, how sure it is, and how good."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .. import report
from ..calibration import calibrate
from ..cohort import SamplingConfig, evaluate, keep_scores
from ..config import DenoiserConfig
from ..errors import InputError
from ..files import check_output, write_json
from ..priors import FittedSource
from ..progress import cases_bar, epochs_bar, groups_bar
from ..protocol import (
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
from ..runs import CURVES_FILE, EVALUATION_FOLDER, MODEL_FOLDER, RUN_FILE
from ..sampling import DEFAULT_MEMORY_BUDGET
from ..slides import NORMALIZATIONS, HestTask, Slide
from ..slides.panels import variable_genes_of
from ..slides.stimage_task import ORGANS
from ..training import SELECTIONS, fit, load_fold
from ..windows import FIXED_EPOCHS, TrainingConfig, TrainingData, selection_words
from .options import (
    GENE_LIST,
    Budget,
    Data,
    Device,
    Draws,
    Embeddings,
    EncoderName,
    Fast,
    Fold,
    GeneKey,
    Overwrite,
    PathArgument,
    PathOption,
    Precision,
    PriorName,
    Seed,
    Settings,
    Smooth,
    Steps,
)
from .parsing import numbers_of, settings_of, solver_of, words_of
from .program import app, screen

# One default for the flags and for Python.
_TRAINING = TrainingConfig()


@app.command()
def train(
    data: Data,
    encoder: EncoderName,
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
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    precision: Annotated[
        str | None, typer.Option(help="no (float32), bf16 or, on a GPU, fp16; as Accelerate is set when left out.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train on one fold of a HEST-bench task folder. Several devices: accelerate launch -m stflow_fast train ..."""
    chosen: dict[str, Any] = {"epochs": epochs, "patience": patience, "learning_rate": learning_rate, "seed": seed}
    training, denoiser = settings_of(settings or [], taken=chosen)
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
    assert epochs is not None  # it is filled in
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
    typer.echo(f"model of epoch {run.best_epoch} of {len(run.records)}, {_selection(loaded)}; in {run.folder}")


def _selection(loaded: TrainingData) -> str:
    """What the epoch was chosen on."""
    slides = f" ({', '.join(sorted({slide.id for slide in loaded.selection}))})" if loaded.selection else ""
    return f"{selection_words(loaded.selected_on)}{slides}"


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


@app.command(name="calibrate")
def calibrate_command(
    run: Annotated[Path, PathArgument(help="Folder of a run of train.")],
    data: Annotated[
        Path | None, PathArgument(help="The task folder it was trained on; where it was then if left out.")
    ] = None,
    embeddings: Embeddings = None,
) -> None:
    """Fit how sure the model of a run is: networks are trained without some of the slides each, and the errors that
    they make there are given a law. predict --draws and evaluate use it. An interrupted call goes on."""
    with groups_bar() as on_epoch:
        observation = calibrate(run, data, embeddings=embeddings, on_epoch=on_epoch)
    console = screen(120)
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
    prior: PriorName = None,
    seed: Seed = 0,
    device: Device = "auto",
    memory_budget: Budget = DEFAULT_MEMORY_BUDGET,
    precision: Precision = "float32",
    smooth: Smooth = 0.0,
    draws: Draws = None,
    fast: Fast = False,
) -> None:
    """Score a model on the test slides of a fold, beside the baselines; of one that calibrate has treated, also how
    sure it is."""
    n_sample_steps, prior = solver_of(n_sample_steps, prior, fast)
    sampling = SamplingConfig(n_sample_steps, prior, seed, memory_budget, precision, smooth, draws)
    names = words_of(biomarkers)
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
    console = screen(120)
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
    if card := keep_scores(run, found):
        console.print(f"wrote {card}", markup=False)


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
    encoder: EncoderName,
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
    settings: Settings = None,
) -> None:
    """Run a benchmark of the field: all tasks, folds, seeds and selections, beside every baseline. A call that was
    interrupted goes on."""
    place = None if embeddings is None else str(embeddings)
    chosen, numbers = tuple(words_of(tasks)), numbers_of("seeds", seeds)
    training, denoiser = settings_of(settings or [], taken={"seed"})
    if name not in ("hest", "stimage"):
        raise InputError(f"protocol: must be hest or stimage, not {name!r}")
    found = hest_tasks(root, encoder, place, chosen) if name == "hest" else stimage_tasks(root, numbers, chosen)
    selected = tuple(words_of(selections))
    plan = Plan(found, encoder, numbers, selected, place, genes, certainty, training, denoiser)
    known = None if patients is None else read_patients(patients)
    with cases_bar() as (on_case, on_epoch):
        result = run_protocol(plan, out, known, lambda case, *place: on_case(case.path, *place), on_epoch)
    console = screen(160)
    console.print(report.protocol_table("Mean Pearson over genes", *cells_of(result), notes_of(result)))
    if certain := certainty_cells_of(result):
        console.print(report.protocol_table("Certainty", CERTAINTY_HEAD, certain, [CERTAINTY_NOTE]))
    console.print(f"wrote {out / PAGE_FILE}", markup=False)

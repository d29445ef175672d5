"""``stflow-fast demo``: a synthetic cohort, from training to a report, on any machine in minutes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from . import report
from ._version import __version__
from .cohort import Evaluation, SamplingConfig, evaluate_slides, load_model, predict
from .evaluation import score
from .files import check_output, write_json
from .model import Denoiser
from .progress import epochs_bar
from .slides import Slide
from .synthetic import Cohort, make_cohort
from .training import Run, fit
from .windows import HELD_OUT_REGIONS, TrainingConfig, TrainingData, hold_out_regions

REPORT, MARKER = "index.html", "demo.json"

EPOCHS = 24

BIOMARKERS = ("ERBB2", "GATA3", "UBE2C", "VWF")

DENOISER = {"hidden_dim": 64, "pairwise_hidden_dim": 64, "n_layers": 2}
"""A quarter of the default network: the demo is for two cores."""


def run_demo(out: Path, seed: int, overwrite: bool, console: Console) -> Path:
    """Train on four synthetic slides, sample another of 10,000 spots, score it beside the baselines, write a report.

    A control stands among the baselines: the same model with the test slide's spots shuffled over its places, so that
    every spot keeps its patch and loses its neighbours.

    Returns:
        The report's index.html.

    Raises:
        InputError: ``out`` is occupied.
    """
    started = time.perf_counter()
    check_output(out, MARKER, reuse=overwrite)
    write_json(out / MARKER, {"seed": seed, "version": __version__})
    cohort = make_cohort(seed=seed)
    config = TrainingConfig(epochs=EPOCHS, windows_per_slide=6, seed=seed)
    run = _train(out / "run", cohort, config)
    console.print(f"sampling {cohort.test[0].n_spots:,} spots and fitting the baselines")
    model = load_model(run.folder)
    evaluation = evaluate_slides(model, cohort.train, cohort.test)
    evaluation.result["baselines"]["shuffled_spots"] = _score_shuffled(model, cohort.test[0], seed)
    predict(run.folder, cohort.test, out / "predictions", overwrite=True)
    console.print(report.results_table(evaluation.result))
    page = _write_report(out, cohort, run, evaluation, time.perf_counter() - started)
    console.print(f"report: {page} (made in {time.perf_counter() - started:.0f} s)", markup=False)
    return page


def _score_shuffled(model: Denoiser, slide: Slide, seed: int) -> dict[str, Any]:
    places = np.random.default_rng(seed).permutation(slide.n_spots)
    shuffled = dataclasses.replace(slide, coords=slide.coords[places])
    genes, normalize = model.provenance.genes, model.provenance.normalize
    drawn = SamplingConfig().drawer(model)(shuffled).expression.float().numpy()
    return score(slide.expression(genes, normalize), drawn, genes)


def _train(out: Path, cohort: Cohort, config: TrainingConfig) -> Run:
    train, regions = hold_out_regions(cohort.train, config.validation_fraction, config.seed)
    data = TrainingData(train, regions, HELD_OUT_REGIONS, cohort.genes, "synthetic", description={"data": "synthetic"})
    assert config.epochs is not None  # run_demo says it
    with epochs_bar(config.epochs, data.selected_on) as on_epoch:
        return fit(data, out, DENOISER, config, overwrite=True, on_epoch=on_epoch)


def _write_report(out: Path, cohort: Cohort, run: Run, evaluation: Evaluation, seconds: float) -> Path:
    result = evaluation.result
    curves = out / "training.png"
    report.training_curves(curves, run.records, HELD_OUT_REGIONS)
    pictures = report.evaluation_pictures(
        out / "pictures", result, evaluation.slides, evaluation.truth, evaluation.predicted
    )
    slide = cohort.test[0]
    sections: list[tuple[str, str | Table]] = [
        (
            "What this is",
            f"stflow-fast trained a small denoiser on {len(cohort.train)} synthetic slides of "
            f"{cohort.train[0].n_spots:,} spots, chose its epoch on regions held out of them, and sampled the "
            f"expression of {len(cohort.genes)} genes at all {slide.n_spots:,} spots of a test slide in one pass "
            f"({result['nfe']} denoiser calls, {result['sampling_seconds']:.1f} s). The data are made up: they show "
            "that the program works, and what neighbours can add, not what to expect of a real cohort.",
        ),
        ("Scores on the test slide", report.results_table(result)),
        (
            "",
            "The image features of a patch see the tissue through noise that the patches around it do not share. Ridge "
            "regression reads one patch at a time; the denoiser reads the neighbours too. In the row 'spots shuffled' "
            "the same denoiser reads the same patches, each among wrong neighbours.",
        ),
        (
            "Known markers",
            report.biomarker_table(result, [gene for gene in BIOMARKERS if gene in cohort.genes]),
        ),
        (
            "Files",
            f"run/ holds the model, predictions/{slide.id}.h5ad the prediction. Made in {seconds:.0f} s.",
        ),
    ]
    captions = {"scores.png": "Pearson correlation per gene", "training.png": "Training"}
    figures = [(captions.get(path.name, "Truth beside prediction"), path) for path in (*pictures, curves)]
    page = out / REPORT
    report.write_html(page, "stflow-fast demo", sections, figures)
    return page

"""The scores of a model on the test slides of a fold, beside the baselines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..errors import InputError
from ..evaluation import (
    certainty,
    check_biomarkers,
    compare,
    random_training_spots,
    structure,
    top_overlap,
)
from ..model import Denoiser
from ..priors.observation import ObservationModel
from ..slides import Slide, open_task
from ..windows import TEST
from .settings import SamplingConfig, gene_names, model_and_origin, selection_of

CERTAINTY_DRAWS = 100
"""Of each spot, that intervals and CRPS are of."""


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on the test slides of a fold, and what they were computed from.

    Attributes:
        result: of :func:`stflow_fast.evaluation.compare`, with how it was made (plain JSON types).
        slides: the test slides.
        truth: [N_i, G] of each.
        predicted: [N_i, G] of each.
        genes: the panel.
    """

    result: dict[str, Any]
    slides: list[Slide]
    truth: list[np.ndarray]
    predicted: list[np.ndarray]
    genes: tuple[str, ...]


def evaluate(
    run: str | Path | Denoiser,
    data: str | Path,
    fold: int = 0,
    *,
    embeddings: str | Path | None = None,
    gene_key: str | None = None,
    sampling: SamplingConfig | None = None,
    device: str = "auto",
    biomarkers: Sequence[str] = (),
) -> Evaluation:
    """Score a model on the test slides of a HEST-bench task folder, beside the baselines.

    Args:
        run: a run or model folder, or a model.
        data: the task folder.
        fold: number of the split.
        embeddings: where the embeddings are, if not in the task folder.
        gene_key: column of ``var`` with the names of the genes; as the model was trained when None.
        sampling: how to draw.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is.
        biomarkers: genes of which more is said, in ``result["biomarkers"]``: see :func:`of_biomarkers`.

    Raises:
        InputError: a test slide that the model was trained on, a model without gene names, a biomarker that it does not
            predict, or what :func:`stflow_fast.slides.open_task`, Slide and sample refuse.
    """
    model, origin = model_and_origin(run, device)
    check_biomarkers(biomarkers, gene_names(model))
    if not model.provenance.genes or not model.provenance.encoder:
        raise InputError(
            f"model {origin}: its config.json names no genes or no encoder; convert it with --genes and --encoder"
        )
    about = model.provenance.training
    gene_key = about.get("gene_key") if gene_key is None else gene_key
    task = open_task(data, model.provenance.encoder, embeddings, gene_key, about.get("organ"))
    split = task.fold(fold)
    seen = {*about.get("train", ()), *(about.get("selection", ()) if about.get("selected_on") != TEST else ())}
    leaked = sorted(seen & set(split.test))
    if leaked:
        raise InputError(
            f"fold {fold}: the model was trained or chosen on its test slides {', '.join(leaked)}; give its own fold"
        )
    train, test = [task.slide(name) for name in split.train], [task.slide(name) for name in split.test]
    evaluation = evaluate_slides(model, train, test, sampling)
    evaluation.result.update({"run": origin, "data": str(data), "fold": fold})
    if biomarkers:
        evaluation.result["biomarkers"] = of_biomarkers(evaluation, biomarkers, model.observation)
    return evaluation


def evaluate_slides(
    model: Denoiser, train: list[Slide], test: list[Slide], sampling: SamplingConfig | None = None
) -> Evaluation:
    """As :func:`evaluate`, from slides: the baselines are fitted on ``train``, all are scored on ``test``."""
    sampling = sampling or SamplingConfig()
    genes, normalize = model.provenance.genes, model.provenance.normalize
    started = time.perf_counter()
    drawn = list(map(sampling.drawer(model), test))
    seconds = time.perf_counter() - started
    predicted = [one.expression.float().numpy() for one in drawn]
    truth = [slide.expression(genes, normalize) for slide in test]
    result = compare(train, test, np.concatenate(predicted), genes, normalize)
    if model.observation is not None:
        known = np.concatenate([slide.expression(genes, normalize) for slide in train])
        _add_certainty(result, model.observation, known, test, truth, predicted, sampling.seed)
    result.update(
        {
            **selection_of(model),
            "encoder": model.provenance.encoder,
            "normalize": normalize,
            **sampling.describe(model),
            "nfe": drawn[0].nfe,
            "device": str(next(model.parameters()).device),
            "sampling_seconds": round(seconds, 3),
            "notes": {slide.id: list(slide.notes) for slide in test if slide.notes},
            "version": __version__,
        }
    )
    return Evaluation(result, test, truth, predicted, genes)


def _add_certainty(
    result: dict[str, Any],
    law: ObservationModel,
    known: np.ndarray,
    slides: list[Slide],
    truth: list[np.ndarray],
    predicted: list[np.ndarray],
    seed: int,
) -> None:
    """What the law's draws are worth, and beside the baselines what those of random training spots (``known`` [M, G])
    are: the image must add to these."""
    expected, mean = np.concatenate(truth), np.concatenate(predicted)
    result["observation"] = law.law.name
    result["certainty"] = certainty(expected, mean, law.drawn(mean, seed, "", CERTAINTY_DRAWS))
    one = [law.drawer(seed, slide.id, 1)(made)[0] for slide, made in zip(slides, predicted, strict=True)]
    result["structure_of_draws"] = structure([slide.coords for slide in slides], truth, one)
    anywhere = random_training_spots(known, CERTAINTY_DRAWS, seed)
    middle = np.broadcast_to(known.mean(axis=0, dtype=np.float64).astype(np.float32), expected.shape)
    result["baselines"]["train_mean"]["certainty"] = certainty(expected, middle, anywhere)


def of_biomarkers(
    evaluation: Evaluation, names: Sequence[str], law: ObservationModel | None
) -> dict[str, dict[str, Any]]:
    """What a pathologist asks of single genes.

    Returns:
        Of each: ``top_overlap``, the share of the tenth of the spots where the gene is highest that is among the tenth
        where it is predicted to be, by slide and averaged by their spots, and ``top_chance``, what chance would give.
        With a law ``interval_width``, the mean width of the central 90 % interval in the unit of the prediction, and
        ``interval_coverage``, how often the truth lies in it, bounds included.
    """
    columns = [evaluation.genes.index(name) for name in names]
    spots = [slide.n_spots for slide in evaluation.slides]
    pairs = list(zip(evaluation.truth, evaluation.predicted, strict=True))
    found = [top_overlap(truth[:, columns], made[:, columns]) for truth, made in pairs]
    overlap = np.average([share for share, _ in found], axis=0, weights=spots)
    chance = float(np.average([each for _, each in found], weights=spots))
    told = {
        name: {"top_overlap": float(share), "top_chance": chance} for name, share in zip(names, overlap, strict=True)
    }
    if law is not None:
        truth, mean = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        low, high = (law.quantile(mean, percent) for percent in (5, 95))
        inside = (low <= truth) & (truth <= high)
        for name, column in zip(names, columns, strict=True):
            width = float((high[:, column] - low[:, column]).mean(dtype=np.float64))
            told[name] |= {"interval_width": width, "interval_coverage": float(inside[:, column].mean())}
    return told

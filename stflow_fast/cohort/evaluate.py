"""The scores of a model on the test slides of a fold, beside the baselines."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..errors import InputError, OutputError
from ..evaluation import (
    Draws,
    Structure,
    certainty,
    check_biomarkers,
    compare,
    neighborhood_mean,
    random_training_spots,
    top_overlap,
)
from ..model import Denoiser
from ..model_card import CARD_FILE, add_scores
from ..pretrained import fingerprint
from ..priors.observation import ObservationModel
from ..runs import model_folder
from ..slides import Slide, open_task
from ..threads import blocks_of
from ..windows import TEST
from .settings import SamplingConfig, gene_names, model_and_origin, selection_of

CERTAINTY_DRAWS = 100
"""Of each spot, that intervals and CRPS are of."""

LEAST_DRAWS = 16
"""Of neighbourhoods, however many there are."""

STRUCTURE_DRAWS = 8
"""That tissue structure is averaged over: what errors have in common differs from draw to draw."""

NUMBERS_KEPT = 2**25
"""Of draws: 128 MB as they are drawn, and as much again for each of a few arrays made of them."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on the test slides of a fold, and what they were computed from.

    Attributes:
        result: of :func:`stflow_fast.evaluation.compare`, with how it was made (plain JSON types).
        slides: the test slides.
        truth: [N_i, G] of each.
        predicted: [N_i, G] of each.
        genes: the panel.
        model: what was scored.
    """

    result: dict[str, Any]
    slides: list[Slide]
    truth: list[np.ndarray]
    predicted: list[np.ndarray]
    genes: tuple[str, ...]
    model: Denoiser


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
    evaluation = Evaluation(result, test, truth, predicted, genes, model)
    if model.observation is not None:
        known = np.concatenate([slide.expression(genes, normalize) for slide in train])
        _add_certainty(evaluation, model.observation, known, sampling.seed)
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
    return evaluation


def keep_scores(run: str | Path, evaluation: Evaluation) -> Path | None:
    """Keep the scores of a run, or of a model's folder, beside its weights, and write its card with them.

    Args:
        run: as it was evaluated.
        evaluation: of :func:`evaluate`.

    Returns:
        The card; None where none is written: of a model of the Hub, or, which is logged, where somebody has edited it
        or the folder cannot be written.
    """
    folder = model_folder(run)
    if not folder.is_dir():
        return None
    model, slides = evaluation.model, {slide.id: slide.n_spots for slide in evaluation.slides}
    try:
        written = add_scores(folder, model.described(), evaluation.result, slides, fingerprint(model))
    except OutputError as error:  # of somebody else's model: the scores are shown all the same
        logger.warning("%s", error)
        return None
    return folder / CARD_FILE if written else None


def _add_certainty(evaluation: Evaluation, law: ObservationModel, known: np.ndarray, seed: int) -> None:
    """What the law's draws are worth, and beside the baselines what those of random training spots (``known`` [M, G])
    are: the image must add to these."""
    result = evaluation.result
    expected, mean = np.concatenate(evaluation.truth), np.concatenate(evaluation.predicted)
    result["observation"] = law.law.name
    result["certainty"] = certainty(expected, mean, _draws(evaluation, law, seed, CERTAINTY_DRAWS))
    result["certainty_of_neighborhoods"] = _of_neighborhoods(evaluation, law, seed)
    result["structure_of_draws"] = _structure_of_draws(evaluation, law, seed)
    anywhere = random_training_spots(known, CERTAINTY_DRAWS, seed)
    middle = np.broadcast_to(known.mean(axis=0, dtype=np.float64).astype(np.float32), expected.shape)
    result["baselines"]["train_mean"]["certainty"] = certainty(expected, middle, anywhere)


def _structure_of_draws(evaluation: Evaluation, law: ObservationModel, seed: int) -> dict[str, float | None]:
    """That of single draws, one after another, and the mean of what is said of each."""
    slides = evaluation.slides
    of_truth, found = Structure([slide.coords for slide in slides], evaluation.truth), []
    for number in range(STRUCTURE_DRAWS):
        pairs = zip(slides, evaluation.predicted, strict=True)
        drawn = [law.drawer(seed + number, slide.id, 1, slide.coords)(made)[0] for slide, made in pairs]
        found.append(of_truth.beside(drawn))
    means = {name: [value for one in found if (value := one[name]) is not None] for name in found[0]}
    return {name: float(np.mean(values)) if values else None for name, values in means.items()}


def _draws(evaluation: Evaluation, law: ObservationModel, seed: int, n_draws: int) -> Draws:
    """Of the spots of all slides, one after another."""
    drawers = [law.drawer(seed, slide.id, n_draws, slide.coords) for slide in evaluation.slides]

    def draw(rows: slice) -> np.ndarray:
        found, first = [], 0
        for made, of_slide in zip(evaluation.predicted, drawers, strict=True):
            here = made[max(rows.start - first, 0) : max(rows.stop - first, 0)]
            first += len(made)
            if len(here):
                found.append(of_slide(here))
        return np.concatenate(found, axis=1)

    return draw


def _of_neighborhoods(evaluation: Evaluation, law: ObservationModel, seed: int) -> dict[str, Any]:
    """:func:`.evaluation.certainty` of the mean over each spot and its nearest neighbours, where independent errors
    would cancel. All draws are kept at once: of many spots and genes fewer are made, and then those genes alone are
    looked at (``n_genes``) whose truth varies most."""
    expected, spots = np.concatenate(evaluation.truth), [len(made) for made in evaluation.predicted]
    n_draws = int(np.clip(NUMBERS_KEPT // expected.size, LEAST_DRAWS, CERTAINTY_DRAWS))
    most = max(1, NUMBERS_KEPT // (n_draws * len(expected)))
    genes = np.argsort(-expected.var(axis=0, dtype=np.float64), kind="stable")[:most]
    draw = _draws(evaluation, law, seed, n_draws)
    parts = blocks_of(len(expected), max(1, NUMBERS_KEPT // (n_draws * expected.shape[1])))
    drawn = np.concatenate([draw(rows)[..., genes] for rows in parts], axis=1)

    def means(values: np.ndarray) -> np.ndarray:
        of_slides = np.split(values, np.cumsum(spots)[:-1], axis=-2)
        pairs = zip(evaluation.slides, of_slides, strict=True)
        return np.concatenate([neighborhood_mean(slide.coords, part) for slide, part in pairs], axis=-2)

    made, over = np.concatenate(evaluation.predicted)[:, genes], means(drawn)
    return {**certainty(means(expected[:, genes]), means(made), lambda rows: over[:, rows]), "n_genes": len(genes)}


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

"""How sure a model is: its observation model, fitted on spots that networks trained as it was did not see.

Slides of the training side are left out in turn (regions, where slides are few), a network is trained on the others as
the model was, for as many epochs as the model has, and predicts what was left out. Around those predictions the laws of
:mod:`.priors.observation` are fitted, group by group. The median of their parameters stands for a slide to come; the
law with the lower CRPS on groups that it was not fitted on is kept, with what the errors of all groups have in common
(:mod:`.priors.shared_error`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .evaluation import certainty, left_out_groups
from .evaluation.certainty import Draws
from .files import read_json
from .model import Denoiser
from .priors.observation import LAWS, Law, ObservationModel, laws_of
from .priors.shared_error import SharedError
from .runs import LEFT_OUT_FOLDER, MODEL_FOLDER, RUN_FILE
from .sampling import Sampler
from .slides import Slide
from .training import fit, load_fold
from .windows import NOTHING, TEST, TrainingConfig, TrainingData

FEW_SLIDES = 3
"""With fewer, regions of them are left out."""

DRAWS = 64
"""Of a law, that its CRPS is computed from."""

TOLD = {"data", "encoder", "fold", "gene_list", "genes", "normalize", "train", "selection", "selected_on"}
"""By ``run.json`` of a run that ``train`` made."""

OnEpoch = Callable[[int, int, dict[str, Any]], None]
"""The number of a group, how many there are, and the record of an epoch."""


class Predicted(NamedTuple):
    """Spots, and what a network predicts that was trained without them."""

    mean: np.ndarray  # [n, G]
    truth: np.ndarray  # [n, G]
    coords: list[np.ndarray]  # [n_i, 2] of the slides that they are of, one after another


def calibrate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    embeddings: str | Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> ObservationModel:
    """Fit the observation model of a run that ``train`` made, and write it into the run's model.

    Networks that are trained for it stay in ``RUN/left_out``, so that a call which was interrupted goes on.

    Args:
        run: the folder of the run.
        data: the task folder; where it was when the run was trained if None.
        embeddings: where the embeddings are, if not in the task folder.
        on_epoch: called with each epoch of each of those networks.

    Raises:
        InputError: no finished run of ``train`` there, data that are not those of the run, too few spots to leave any
            out, or what ``train`` refuses.
        OutputError: the model cannot be written.
    """
    folder = Path(run)
    if not (folder / MODEL_FOLDER).is_dir():
        raise InputError(f"{folder}: has no {MODEL_FOLDER}/; give the folder of a finished run of train")
    model = Denoiser.from_pretrained(folder / MODEL_FOLDER, observation=False)
    told = read_json(folder / RUN_FILE)
    slides = _training_side(folder, told, data, embeddings)
    observation = fit_observation(predict_left_out(model, slides, folder / LEFT_OUT_FOLDER, on_epoch), model)
    model.observation = observation
    model.save_pretrained(folder / MODEL_FOLDER)
    return observation


def predict_left_out(
    model: Denoiser, slides: Sequence[Slide], folder: Path, on_epoch: OnEpoch | None = None
) -> list[Predicted]:
    """What networks predict that were trained as ``model`` was, but without a group of the slides each.

    Args:
        model: of :func:`stflow_fast.fit`; its provenance tells how it was trained.
        slides: all that it was trained and chosen on.
        folder: of the networks; what is in it already is not trained again, and is taken to be of these slides: they
            are known by their names and numbers of spots.
        on_epoch: see :func:`calibrate`.

    Raises:
        InputError: too few spots to leave any out, or a model that does not tell how it was trained.
    """
    about, groups = model.provenance.training, _groups(slides)
    if not {"training", "best_epoch"} <= about.keys():
        raise InputError(
            "model: does not tell how it was trained, so no other can be trained alike; give a run of train"
        )
    if len(groups) < 2:
        raise InputError("slides: too few spots to leave any out; nothing tells how sure the model is")
    config = dataclasses.replace(TrainingConfig(**about["training"]), epochs=about["best_epoch"])
    found = []
    for number, (kept, left) in enumerate(groups):
        data = TrainingData(
            kept, [], NOTHING, model.provenance.genes, model.provenance.encoder, model.provenance.normalize
        )

        def told(record: dict[str, Any], number: int = number) -> None:
            if on_epoch:
                on_epoch(number, len(groups), record)

        found.append(_predicted(_trained(folder / str(number), data, model, config, told), left, config.seed))
    return found


def _groups(slides: Sequence[Slide]) -> list[tuple[list[Slide], list[Slide]]]:
    """Slides that are kept and left out: a part of every slide, where they are few. Of two slides, a network that has
    seen the other alone errs by all that two slides can differ by, above all in depth: fold 2 of her2st has draws of
    nearly twice the spread of the errors by it."""
    if len(slides) >= FEW_SLIDES:
        return left_out_groups(slides)
    regions = [left_out_groups([slide]) for slide in slides]
    groups = []
    for number in range(max(map(len, regions), default=0)):
        kept: list[Slide] = []
        left: list[Slide] = []
        for slide, of_slide in zip(slides, regions, strict=True):
            own = of_slide[number] if number < len(of_slide) else ([slide], [])
            kept, left = kept + own[0], left + own[1]
        groups.append((kept, left))
    return groups


def _trained(
    folder: Path, data: TrainingData, model: Denoiser, config: TrainingConfig, on_epoch: Callable[..., None]
) -> Denoiser:
    """A network of the model's shape, trained on other data; that of an earlier call as far as it went."""
    shape = {name: value for name, value in model.config.to_dict().items() if name not in ("n_genes", "feature_dim")}
    begun = folder / RUN_FILE
    same = begun.exists() and read_json(begun)["training"] == dataclasses.asdict(config)
    precision = model.provenance.training.get("precision")
    how: dict[str, Any] = {"precision": precision, "resume": same, "overwrite": not same, "on_epoch": on_epoch}
    return fit(data, folder, shape, config, **how).model


def _predicted(model: Denoiser, slides: Sequence[Slide], seed: int) -> Predicted:
    sampler, genes, normalize = Sampler(model), model.provenance.genes, model.provenance.normalize
    means = [sampler.prepare(slide).draw_blocks(seed).expression.float().numpy() for slide in slides]
    truth = np.concatenate([slide.expression(genes, normalize) for slide in slides])
    return Predicted(np.concatenate(means), truth, [slide.coords for slide in slides])


def fit_observation(predicted: Sequence[Predicted], model: Denoiser) -> ObservationModel:
    """The law with the lowest CRPS on groups that it was not fitted on, its parameters on all of them, and what errors
    have in common.

    Args:
        predicted: groups of spots that the networks which predicted them did not see; two or more.
        model: whose mean they stand for.
    """
    normalize = model.provenance.normalize
    fitted = {
        name: [LAWS[name].fit(group.mean, group.truth, normalize) for group in predicted] for name in laws_of(normalize)
    }
    reached = {name: _cross_validated(laws, predicted) for name, laws in fitted.items()}
    best = min(reached, key=lambda name: reached[name]["crps_mean"])
    about = {"spots": sum(len(group.mean) for group in predicted), "groups": len(predicted), "out_of_fold": reached}
    law = _typical(fitted[best])
    low, high = (np.concatenate(bound) for bound in zip(*(law.scores(*group[:2]) for group in predicted), strict=True))
    shared = SharedError.fit(low, high, [coords for group in predicted for coords in group.coords])
    return ObservationModel(model.provenance.genes, law, shared, about)


def _typical(laws: Sequence[Law]) -> Law:
    """The median of each parameter: a slide that is far off, in depth say, widens the intervals of no other. Fitted on
    all groups' spots together, CRPS out of fold was higher on each fold of her2st, by .0001 to .006."""
    names = laws[0].parameters()
    medians = {name: np.median([law.parameters()[name] for law in laws], axis=0).astype(np.float32) for name in names}
    return type(laws[0])(**medians)


def _cross_validated(laws: Sequence[Law], predicted: Sequence[Predicted]) -> dict[str, Any]:
    """:func:`.evaluation.certainty` of each group by the law that the others give, weighted by their spots. It looks at
    one spot at a time, so what errors have in common is left out."""
    scores, independent = [], SharedError.none(predicted[0].mean.shape[1])
    for number, group in enumerate(predicted):
        law = ObservationModel((), _typical([*laws[:number], *laws[number + 1 :]]), independent, {})
        draw = law.drawer(0, str(number), DRAWS, np.concatenate(group.coords))
        scores.append(certainty(group.truth, group.mean, _around(group.mean, draw)))
    weights, found = [len(group.mean) for group in predicted], {}
    for name in ("crps_mean", "coverage_50", "coverage_90", "spread_ratio"):
        values = [each[name] for each in scores]
        found[name] = None if None in values else float(np.average(values, weights=weights))
    return found


def _around(mean: np.ndarray, draw: Callable[[np.ndarray], np.ndarray]) -> Draws:
    """Draws of some rows of a mean [N, G]."""
    return lambda rows: draw(mean[rows])


def _training_side(folder: Path, told: Any, data: str | Path | None, embeddings: str | Path | None) -> list[Slide]:
    """All slides that the run was trained and chosen on.

    Raises:
        InputError: a run that was not made by ``train``, or other slides.
    """
    if not isinstance(told, dict) or not told.keys() >= TOLD:
        raise InputError(f"{folder / RUN_FILE}: tells of no task folder; in Python see stflow_fast.calibration")
    loaded = load_fold(
        data or told["data"],
        told["encoder"],
        told["fold"],
        told["gene_list"],
        embeddings=embeddings,
        normalize=told["normalize"],
        select_on="none",
        gene_key=told.get("gene_key"),
        organ=told.get("organ"),
    )
    chosen_on = told["selection"] if told["selected_on"] != TEST else {}
    missing = sorted({*told["train"], *chosen_on} - {slide.id for slide in loaded.train})
    if missing or loaded.genes != tuple(told["genes"]):
        what = f"lacks {', '.join(missing)}" if missing else "has another gene list"
        raise InputError(f"{data or told['data']}: {what}; give the data that {folder} was trained on")
    return loaded.train

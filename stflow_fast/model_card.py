"""A model's card: README.md of its folder, as the Hugging Face Hub reads it, written from what the folder tells.

What the model is comes from config.json, what it reached from scores.json, where ``stflow-fast evaluate`` keeps it.
Nothing else is written: what neither tells is called unknown.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .errors import InputError
from .files import atomic_path, read_json, write_json

CARD_FILE, SCORES_FILE = "README.md", "scores.json"
TEMPLATE = Path(__file__).with_name("model_card.md")

TAGS = (
    *("spatial-transcriptomics", "histology", "pathology", "gene-expression", "flow-matching", "stflow"),
    *("model_hub_mixin", "pytorch_model_hub_mixin"),  # by which the Hub counts what its mixin wrote
)

SHOWN = 10
"""Genes and slides that are named; config.json has all."""

UNITS = {
    "log1p": "log1p of raw counts",
    "cp10k_log1p": "log1p of counts per 10,000",
    "counts": "raw counts",
}
"""What predictions are, by ``stflow_fast.slides.NORMALIZATIONS``."""

CHOSEN = {
    "nothing": "No epoch was chosen: {epochs} epochs were fixed before the training, and no score was looked at.",
    "held-out slides": "Epoch {epoch}: the best by its score on slides held out of the training ({selection}).",
    "held-out regions": (
        "Epoch {epoch}: the best by its score on regions held out of the training slides ({selection}). Regions of "
        "known slides are easier than new slides."
    ),
    "TEST": (
        "Epoch {epoch}: the best by its score on the TEST slides ({selection}), as the published code does. Scores on "
        "these slides flatter the model; slides that nobody has seen will have lower ones."
    ),
}
"""How weights were chosen, by what ``selected_on`` of a training may be (``stflow_fast.windows``)."""

SCORES = {
    "pearson_mean": ("pearsonr", "Pearson correlation, mean over genes"),
    "spearman_mean": ("spearmanr", "Spearman correlation, mean over genes"),
    "mse_mean": ("mse", "Mean squared error, mean over genes"),
}
"""What is kept of a predictor's scores: the Hub's name of the metric, and a reader's."""

CERTAINTY = ("crps_mean", "coverage_50", "coverage_90", "spread_ratio")
CALLS = ("n_sample_steps", "nfe", "prior", "smooth", "precision", "seed", "draws")

LICENCE = (
    "Unknown: nobody has stated a licence of these weights. They may be bound by the terms of the data and of the "
    "patch encoder that they were trained with. Whoever publishes this folder states it in `license` above."
)

MARK = "<!-- Written by stflow-fast. Once it is edited by hand it stays as it is. sha256 "
"""Begins the last line of a card, which goes on with the digest of what stands above it."""

logger = logging.getLogger(__name__)


def model_card(content: Mapping[str, Any], scores: Sequence[Mapping[str, Any]] = ()) -> ModelCard:
    """The card of a model.

    Args:
        content: of its config.json: ``denoiser``, ``provenance``, and ``observation`` and ``source`` where it has them.
        scores: of its weights, as :func:`known_scores` gives them.
    """
    network, about = content["denoiser"], content["provenance"]
    genes, encoder = list(about["genes"]), about["encoder"]
    evaluations = [_evaluation(each) for each in scores]
    text = ModelCard.from_template(
        _front_matter(encoder, network["n_genes"], scores),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        genes={"count": f"{network['n_genes']:,}"},
        encoder=_plain(encoder),
        version=about["version"],
        facts=_facts(content, genes),
        chosen=_chosen(about["training"]),
        evaluations=evaluations,
        certainty=_certainty_words(content.get("observation")),
        feature_dim=f"{network['feature_dim']:,}",
        unit=UNITS[about["normalize"]],
        licence=LICENCE,
    )
    return ModelCard(_signed(str(text)))


def _front_matter(encoder: str, n_genes: int, scores: Sequence[Mapping[str, Any]]) -> ModelCardData:
    """What the Hub searches by. No pipeline_tag: none of the Hub's tasks is this one."""
    return ModelCardData(
        library_name="stflow-fast",
        license="other",
        license_name="unknown",
        tags=[*TAGS, *([f"encoder:{_line(encoder)}"] if encoder else [])],
        metrics=[name for name, _ in SCORES.values()] if scores else None,
        model_name=f"STFlow, {n_genes} genes" if scores else None,
        eval_results=[found for each in scores for found in _eval_results(each)] or None,
    )


def _eval_results(scores: Mapping[str, Any]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="spatial-gene-expression-prediction",
            dataset_type=scores["dataset"],
            dataset_name=_title(scores),
            dataset_config=f"fold {scores['fold']}",
            dataset_split="test",
            metric_type=metric,
            metric_name=name,
            metric_value=scores["model"][key],
            metric_args={"slides": list(scores["slides"]), **scores["calls"]},
        )
        for key, (metric, name) in SCORES.items()
        if scores["model"].get(key) is not None
    ]


def _title(scores: Mapping[str, Any]) -> str:
    return f"{scores['dataset']}, fold {scores['fold']}"


def _evaluation(scores: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of scores.json, in words."""
    calls, rows = scores["calls"], {"this model": scores["model"], **scores["baselines"]}
    samples = f"The mean of {calls['draws']} samples" if calls.get("draws") else "One sample"
    sampled = f"{samples} from `{calls['prior']}`, {calls['nfe']} calls, {calls['precision']}, seed {calls['seed']}."
    if calls.get("smooth"):
        sampled += f" A share of {calls['smooth']:g} of the mean over a spot's neighbours is mixed in."
    told = {
        "title": _plain(_title(scores)),
        "slides": _named(scores["slides"]),
        "sampled": sampled,
        "n_genes": f"{scores['n_genes']:,}",
        "rows": [
            (_plain(name.replace("_", " ")), [_number(found.get(key)) for key in SCORES])
            for name, found in rows.items()
        ],
    }
    if certainty := scores.get("certainty"):
        crps, half, most, spread = (_number(certainty.get(key)) for key in CERTAINTY)
        told["certainty"] = (
            f"Draws by its observation model: CRPS {crps}; {half} of the truth within 50 % intervals, {most} within "
            f"90 %; spread of the draws over the error of their mean {spread}."
        )
    return told


def _facts(content: Mapping[str, Any], genes: Sequence[str]) -> list[tuple[str, str]]:
    """(what, how much) of a model: the table on top."""
    network, about = content["denoiser"], content["provenance"]
    training = about["training"]
    told = training.get("training", {})
    names = ", ".join(map(_plain, genes[:SHOWN])) if genes else f"{network['n_genes']:,}, names unknown"
    more = f", ... ({len(genes):,}, all in `config.json`)" if len(genes) > SHOWN else ""
    facts = [
        ("genes", names + more),
        ("patch encoder", f"{_plain(about['encoder']) or 'unknown'}, {network['feature_dim']:,} numbers a patch"),
        ("unit of its predictions", UNITS[about["normalize"]]),
        ("training slides", _named(training.get("train"))),
        ("network", _network(network)),
    ]
    if {"n_sample_steps", "prior"} <= told.keys():
        steps, source = told["n_sample_steps"], content.get("source")
        fitted = ", fitted on the training slides" if source else ""
        prior = source["name"] if source else told["prior"]
        facts.append(("a sample", f"from `{prior}`{fitted}, {steps} flow times, {steps - 1} calls of the network"))
    if "seed" in told:
        facts.append(("seed of the training", str(told["seed"])))
    if "data" in training:  # the name alone: a path tells of a person's disk
        organ = f", {training['organ']}" if training.get("organ") else ""
        fold = f", fold {training['fold']}" if "fold" in training else ""
        facts.append(("data", f"{_plain(Path(str(training['data'])).name + organ)}{fold}"))
    return facts


def _network(denoiser: Mapping[str, Any]) -> str:
    plural = "s" if denoiser["n_layers"] > 1 else ""
    relu = ", a ReLU behind the gene heads" if denoiser["non_negative"] else ""
    return (
        f"{denoiser['n_layers']} layer{plural}, hidden size {denoiser['hidden_dim']}, {denoiser['n_heads']} heads, "
        f"{denoiser['n_neighbors']} neighbours, {denoiser['activation']}{relu}"
    )


def _chosen(training: Mapping[str, Any]) -> str:
    """How the weights came about, in a sentence or two."""
    if "converted_from" in training:
        file = _line(str(training["converted_from"]))
        return (
            f"Converted from `{file}`, a file of the published code, which does not say how its epoch was chosen. The "
            "published code chooses it on the test slides: scores on those may flatter it."
        )
    words = CHOSEN.get(str(training.get("selected_on")))
    if words is None:
        return "Unknown: `config.json` does not say how the weights were chosen."
    told = training.get("training", {})
    said = words.format(
        epochs=training.get("best_epoch", "an unknown number of"),
        epoch=training.get("best_epoch", "unknown"),
        selection=_named(training.get("selection")),
    )
    decay = told.get("ema_decay")
    if decay:
        mean = "the mean of those behind every step" if decay == 1 else f"a running mean, {decay:g} of the old per step"
        said += f" The weights are {mean}."
    return said


def _certainty_words(observation: Mapping[str, Any] | None) -> str:
    """What a law of the errors says of itself, or that there is none."""
    if observation is None:
        return (
            "Unknown: it has no observation model. Samples hardly differ from each other, so their spread says "
            "nothing; `stflow-fast calibrate` fits one to a run."
        )
    reached = observation.get("out_of_fold", {}).get(observation["law"], {})
    fitted = ""
    if "spots" in observation:
        fitted = (
            f", fitted on {observation['spots']:,} spots of {observation['groups']} groups that networks trained like "
            "this one did not see"
        )
    numbers = ""
    if reached:
        half, most = (_number(reached.get(key)) for key in ("coverage_50", "coverage_90"))
        numbers = (
            f" On groups that it was not fitted on: CRPS {_number(reached.get('crps_mean'))}, {half} of the truth "
            f"within 50 % intervals, {most} within 90 %."
        )
    return (
        f"It has an observation model (`{observation['law']}`){fitted}.{numbers} `stflow-fast predict --draws 16` "
        "writes standard deviations and draws by it."
    )


def _named(slides: Any) -> str:
    """How many, the first of them, and their spots, of {slide id: spots}; a description that was written otherwise is
    not read."""
    if not isinstance(slides, Mapping) or not all(isinstance(n_spots, int) for n_spots in slides.values()):
        return "unknown"
    if not slides:
        return "none"
    first = ", ".join(f"{_plain(name)} ({n_spots:,})" for name, n_spots in list(slides.items())[:SHOWN])
    more = ", ..." if len(slides) > SHOWN else ""
    plural = "s" if len(slides) > 1 else ""
    return f"{len(slides):,} slide{plural}, {sum(slides.values()):,} spots: {first}{more}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _plain(name: str) -> str:
    """A name of a file or of a table as Markdown shows it, in one line."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|" else letter for letter in _line(name))


def _line(name: str) -> str:
    return " ".join(name.split())


def _signed(text: str) -> str:
    body = text.rstrip("\n") + "\n\n"
    return f"{body}{MARK}{_digest(body)} -->\n"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


def is_replaceable(card: Path) -> bool:
    """Whether nothing would be lost: there is no card, or one as this program wrote it, to the letter."""
    try:
        text = card.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    body, mark, rest = text.rpartition(MARK)
    return bool(mark) and rest.rstrip() == f"{_digest(body)} -->"


def keep_if_edited(card: Path) -> bool:
    """Whether a card must stay as it is, which is then said to whoever listens."""
    if is_replaceable(card):
        return False
    logger.warning(
        "%s: was edited by hand, or is of another program, and stays as it is; move it away for a new one", card
    )
    return True


def known_scores(folder: Path, weights: str) -> list[dict[str, Any]]:
    """What is kept of the scores that these weights reached; what cannot be read, or is of other weights, is none.

    Args:
        folder: of the model.
        weights: their :func:`~stflow_fast.pretrained.fingerprint`.
    """
    try:
        entries = read_json(folder / SCORES_FILE)["evaluations"]
        return [each for each in entries if each["weights_sha256"] == weights]
    except (InputError, KeyError, TypeError):
        return []


def add_scores(
    folder: Path, content: Mapping[str, Any], result: Mapping[str, Any], slides: Mapping[str, int], weights: str
) -> bool:
    """Keep what a model reached on the test slides of a fold in its folder, and write its card anew.

    Earlier scores of the same fold, sampled the same way, are replaced, and those of other weights left out.

    Args:
        folder: of the model.
        content: see :func:`model_card`.
        result: of :func:`stflow_fast.evaluate`.
        slides: spots of each test slide by its id.
        weights: see :func:`known_scores`.

    Returns:
        Whether the card was written; not one that somebody has edited.

    Raises:
        OutputError: the folder cannot be written.
    """
    entry = _kept(result, slides, weights)
    same = ("dataset", "fold", "slides", "calls")
    others = [each for each in known_scores(folder, weights) if any(each[key] != entry[key] for key in same)]
    scores = [*others, entry]
    write_json(folder / SCORES_FILE, {"evaluations": scores})
    if keep_if_edited(folder / CARD_FILE):
        return False
    with atomic_path(folder / CARD_FILE) as temporary:
        model_card(content, scores).save(temporary)
    return True


def _kept(result: Mapping[str, Any], slides: Mapping[str, int], weights: str) -> dict[str, Any]:
    """An entry of scores.json: what a reader of the card is shown. Of the data, the name of the folder alone."""
    certainty = result.get("certainty")
    prior = result["prior"]
    return {
        "dataset": Path(result["data"]).resolve().name,
        "fold": result["fold"],
        "slides": dict(slides),
        "calls": {**{name: result[name] for name in CALLS if name in result}, "prior": prior["name"]},
        "n_genes": result["n_genes"],
        "model": _of_predictor(result),
        "baselines": {name: _of_predictor(scores) for name, scores in result["baselines"].items()},
        **({"certainty": {key: certainty[key] for key in CERTAINTY}} if certainty else {}),
        "weights_sha256": weights,
        "version": result["version"],
    }


def _of_predictor(scores: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: scores.get(key) for key in SCORES}

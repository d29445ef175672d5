"""From a trained model to files and figures: predictions of many slides, and the evaluation of a fold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ._version import __version__
from .config import parse_bytes
from .devices import choose_device
from .errors import InputError, OutputError, batch_error, with_path
from .evaluation import compare
from .files import check_output, is_same_file, read_json, write_json
from .flow import time_grid
from .inspection import encoder_misfit
from .model import Denoiser
from .outputs import (
    SUFFIXES,
    WRITERS,
    OutputConfig,
    as_dtype,
    check_replaceable,
    prediction_table,
    read_about,
    remove_prediction,
)
from .pretrained import fingerprint
from .priors import Prior, check_seed
from .runs import MODEL_FOLDER, RUN_FILE
from .sampling import DEFAULT_MEMORY_BUDGET, Sample, Sampler, check_precision, resolve
from .slides import ReadOptions, Slide, SlideSource, open_task, sources
from .windows import TEST

if TYPE_CHECKING:
    import anndata  # where it is used, it is imported, as in slides/anndata_file.py

MANIFEST = "predictions.json"

DECIDES = ("format", "features_key", "spatial_key", "library_key", "coordinate_system", "table", "embeddings")
"""Fields of ReadOptions that decide what a slide is predicted from."""


@dataclass(frozen=True)
class SamplingConfig:
    """How predictions are drawn. ``None`` is what the model was trained with (else the published default).

    Attributes:
        n_sample_steps: times S of the flow's grid, at least 2; S - 1 denoiser calls.
        prior: the source distribution or its name.
        seed: with the slide's id, decides the noise; 0 or larger.
        memory_budget, precision: see :class:`stflow_fast.Sampler`.

    Raises:
        InputError: a value out of its range, with the field's name.
    """

    n_sample_steps: int | None = None
    prior: Prior | str | None = None
    seed: int = 0
    memory_budget: int | str = DEFAULT_MEMORY_BUDGET
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.n_sample_steps is not None:
            time_grid(self.n_sample_steps)
        if isinstance(self.prior, str):
            Prior(self.prior)
        check_seed(self.seed)
        parse_bytes(self.memory_budget)
        check_precision(self.precision)

    def drawer(self, model: Denoiser) -> Callable[[Slide], Sample]:
        """What samples one slide after another by ``model``, whose weights are folded once."""
        settings = self.n_sample_steps, self.prior, self.memory_budget
        sampler = Sampler(model, *settings, precision=self.precision)
        return lambda slide: sampler.prepare(slide).draw(seed=self.seed)

    def describe(self, model: Denoiser) -> dict[str, Any]:
        """What decides the draws of ``model``, with its own settings filled in (plain JSON types)."""
        steps, prior = resolve(model, self.n_sample_steps, self.prior)
        decided = {"seed": int(self.seed), "n_sample_steps": steps, "prior": prior.to_dict()}
        return {**decided, "precision": self.precision}


def load_model(run: str | Path, device: str = "auto") -> Denoiser:
    """The model of a run folder, of a ``save_pretrained`` folder, or of the Hugging Face Hub.

    Raises:
        InputError: no model there, a truncated one, a run that has not finished, or a device that is not there.
    """
    folder, place = Path(run), str(choose_device(device))
    if (folder / MODEL_FOLDER).is_dir():
        return Denoiser.from_pretrained(folder / MODEL_FOLDER, map_location=place)
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder}: has no {MODEL_FOLDER}/, its training did not finish; go on with train --resume")
    return Denoiser.from_pretrained(run, map_location=place)


def model_and_origin(run: str | Path | Denoiser, device: str) -> tuple[Denoiser, str]:
    """A model that is given, or that of :func:`load_model`, and where it is from."""
    return (run, "in memory") if isinstance(run, Denoiser) else (load_model(run, device), str(run))


def predict(
    run: str | Path | Denoiser,
    slides: str | Path | Slide | Iterable[str | Path | Slide],
    out: str | Path,
    *,
    sampling: SamplingConfig | None = None,
    output: OutputConfig | None = None,
    device: str = "auto",
    reading: ReadOptions | None = None,
    ignore_encoder: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    on_slide: Callable[[str, tuple[str, ...], int], None] | None = None,
) -> list[Path]:
    """Predict slides and write one ``{slide id}.h5ad`` each (or ``.zarr``); no expression is needed.

    X is the predicted expression [N, G] in the unit of the training (log1p counts), var_names the genes, obs_names the
    barcodes, obs what the input says of the spots, ``obsm["spatial"]`` their centres in level-0 pixels,
    ``uns["stflow_fast"]`` the model, seed, NFE, version and layout; see :func:`.outputs.prediction_table`.

    Args:
        run: a run or model folder, or a model.
        slides: one or several: paths of any format of :data:`stflow_fast.slides.FORMATS`, or Slides.
        out: folder of the results.
        sampling: how to draw.
        output: what is written of it, and how.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is.
        reading: how to read paths.
        ignore_encoder: predict from features of another encoder than the model's, too.
        overwrite: replace earlier predictions in ``out``; those of other slides, made otherwise, go when all of these
            are written.
        resume: keep those that this very call would make again, and predict the slides that are missing. Slides are
            known by their ids alone: what a file holds is not compared.
        on_slide: called with a slide's id, its notes, and how many slides there are, when its file is there.

    Returns:
        The files, in the order of ``slides``.

    Raises:
        InputError: a bad model, genes that it does not predict, an occupied ``out``, something else than a prediction
            where one would go, predictions of another model, seed, layout or way of reading on resume, or a full disk.
            Bad slides do not stop the good ones: they are reported together, a line each, when the others are written.
    """
    model, origin = model_and_origin(run, device)
    sampling, output = sampling or SamplingConfig(), output or OutputConfig()
    reading = reading or ReadOptions()
    wanted, failed = _by_name([slides] if isinstance(slides, str | Path | Slide) else slides, reading)
    about = {**output.describe(gene_names(model)), **made_by(model, sampling), "reading": _described(reading)}
    out = check_output(out, MANIFEST, reuse=overwrite or resume)
    told = {"model": origin, **about}  # where the model lay does not decide what it predicts
    manifest = _Manifest(out, told, *_earlier_predictions(out, about, output, resume))
    for name, slide in wanted.items():
        _check_place(output.path(out, name), slide)
    manifest.write()
    written = []
    draw = sampling.drawer(model)
    for name, slide in wanted.items():
        path, notes = output.path(out, name), ()
        of_slide = {**about, "reading": {}} if isinstance(slide, Slide) else about
        try:
            if not (resume and _is_made_by(path, of_slide)):
                loaded = slide if isinstance(slide, Slide) else slide.read()
                if not ignore_encoder and (misfit := encoder_misfit(loaded, model)):
                    raise InputError(misfit)
                made = _prediction(model, loaded, draw(loaded), output, {"model": origin, **of_slide})
                WRITERS[output.to](path, made)
                notes = loaded.notes
        except OutputError:
            raise
        except InputError as error:
            failed.append(with_path(_path_of(slide), error))
            continue
        written.append(path)
        manifest.add(name)
        if on_slide:
            on_slide(name, notes, len(wanted))
    if failed:
        raise batch_error(failed, len(written), out)
    _remove_earlier(manifest, about, output, [path for path in map(_path_of, wanted.values()) if path])
    return written


def _described(reading: ReadOptions) -> dict[str, str]:
    """What was said of how to read, of what decides a prediction; nothing where nothing was."""
    usual = ReadOptions()
    given = {field: getattr(reading, field) for field in DECIDES}
    return {field: str(value) for field, value in given.items() if value != getattr(usual, field)}


def _path_of(slide: SlideSource | Slide) -> Path | None:
    return slide.origin.path if isinstance(slide, Slide) else slide.path


def _check_place(path: Path, slide: SlideSource | Slide) -> None:
    """Raise InputError where the prediction of a slide would take the place of something else."""
    given = _path_of(slide)
    if given and is_same_file(given, path):
        raise InputError(f"{path}: is the slide itself, and its prediction would take its place; choose another --out")
    check_replaceable(path)


def _by_name(
    slides: Iterable[str | Path | Slide], reading: ReadOptions
) -> tuple[dict[str, SlideSource | Slide], list[str]]:
    """Slides by the name of their prediction, and what is wrong with other paths; two of one name are refused."""
    found: dict[str, SlideSource | Slide] = {}
    failed = []
    for given in slides:
        try:
            here = [given] if isinstance(given, Slide) else sources(given, reading)
        except InputError as error:
            failed.append(str(error))
            continue
        for slide in here:
            if slide.id in found:
                raise InputError(f"{slide.id}: is the name of several slides; rename one, each becomes one file")
            found[slide.id] = slide
    return found, failed


def gene_names(model: Denoiser) -> tuple[str, ...]:
    """What a model predicts, in the order of its output; numbered where it does not know."""
    return model.provenance.genes or tuple(f"gene_{i}" for i in range(model.config.n_genes))


def made_by(model: Denoiser, sampling: SamplingConfig) -> dict[str, Any]:
    """What decides the numbers of a prediction, beside the slide (plain types)."""
    return {
        "weights_sha256": fingerprint(model),
        "version": __version__,
        "selected_on": str(model.provenance.training.get("selected_on", "unknown")),
        **sampling.describe(model),
    }


def drawn_by(model: Denoiser, drawn: Sample) -> dict[str, Any]:
    """How a prediction was drawn, and what its numbers are (plain types)."""
    return {
        "nfe": drawn.nfe,
        "device": str(next(model.parameters()).device),
        "encoder": model.provenance.encoder,
        "normalize": model.provenance.normalize,
    }


@dataclass
class _Manifest:
    """``predictions.json``: which predictions are in a folder, and what they share. It is true after each slide.

    Attributes:
        folder: of the predictions.
        told: what made them (plain JSON types).
        slides: ids of those that were made so.
        earlier: ids of those that were made otherwise, and are there until the call that replaces them has ended well.
    """

    folder: Path
    told: dict[str, Any]
    slides: set[str]
    earlier: set[str]

    def write(self) -> None:
        ids = {"slides": sorted(self.slides), "earlier": sorted(self.earlier)}
        write_json(self.folder / MANIFEST, {**self.told, **ids})

    def add(self, name: str) -> None:
        if name not in self.slides:
            self.slides.add(name)
            self.earlier.discard(name)
            self.write()


def _earlier_predictions(
    out: Path, about: dict[str, Any], output: OutputConfig, resume: bool
) -> tuple[set[str], set[str]]:
    """The slides that predictions in ``out`` are of: made as ``about`` says, and otherwise; resuming is refused where
    the last call's were."""
    path = out / MANIFEST
    if not path.exists():
        return set(), set()
    before = read_json(path)
    if not (isinstance(before, dict) and isinstance(before.get("slides"), list)):
        raise InputError(f"{path}: does not describe predictions; choose another --out")
    other = next((field for field, value in about.items() if field not in before or before[field] != value), None)
    if other and resume:
        lacks = f"tells no {other}, an earlier version made it"
        what = f"{other} differs from this call" if other in before else lacks
        raise InputError(f"{path}: {what}; choose another --out, or --overwrite")
    slides, earlier = set(before["slides"]), set(before.get("earlier", ()))
    if other:
        return set(), slides | earlier
    return {name for name in slides if output.path(out, name).exists()}, earlier


def _remove_earlier(manifest: _Manifest, about: dict[str, Any], output: OutputConfig, given: list[Path]) -> None:
    """Take away what this result replaces, predictions of other settings or in the other form, but for files that are
    given as slides."""
    out = manifest.folder
    # A call that was killed may have replaced one without saying so.
    manifest.slides |= {name for name in manifest.earlier if _is_made_by(output.path(out, name), about)}
    current = {output.path(out, name) for name in manifest.slides}
    known = {out / f"{name}{suffix}" for name in manifest.slides | manifest.earlier for suffix in SUFFIXES.values()}
    for path in known - current:
        if read_about(path) is not None and not any(is_same_file(path, each) for each in given):
            remove_prediction(path)
    if manifest.earlier:
        manifest.earlier = set()
        manifest.write()


def _is_made_by(path: Path, about: dict[str, Any]) -> bool:
    """Whether a prediction stands there that was drawn as ``about`` says (one that is being overwritten was not)."""
    before = read_about(path)
    return before is not None and all(before.get(field) == value for field, value in about.items())


def _prediction(
    model: Denoiser, slide: Slide, drawn: Sample, output: OutputConfig, about: dict[str, Any]
) -> anndata.AnnData:
    """One predicted slide as it is written; see :func:`predict`."""
    panel = gene_names(model)
    columns = output.select(panel)
    expression = as_dtype(slide.id, drawn.expression.float().numpy()[:, columns], output.dtype)
    return prediction_table(slide, expression, np.array(panel)[columns].tolist(), {**about, **drawn_by(model, drawn)})


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

    Raises:
        InputError: a test slide that the model was trained on, a model without gene names, or what
            :func:`stflow_fast.slides.open_task`, Slide and sample refuse.
    """
    model, origin = model_and_origin(run, device)
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
    result = compare(train, test, np.concatenate(predicted), genes, normalize)
    result.update(
        {
            "selected_on": model.provenance.training.get("selected_on", "unknown"),
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
    truth = [slide.expression(genes, normalize) for slide in test]
    return Evaluation(result, test, truth, predicted, genes)

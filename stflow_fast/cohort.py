"""From a trained model to files and figures: predictions of many slides, and the evaluation of a fold."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import torch

from ._version import __version__
from .config import parse_bytes
from .devices import choose_device
from .errors import InputError, OutputError
from .evaluation import compare
from .files import atomic_path, check_output, read_json, write_json
from .flow import time_grid
from .model import Denoiser
from .priors import Prior, check_seed
from .runs import MODEL_FOLDER, RUN_FILE
from .sampling import DEFAULT_MEMORY_BUDGET, Sample, Sampler, check_precision, resolve
from .slides import HestTask, Slide, read_slide
from .windows import TEST

MANIFEST = "predictions.json"


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


def _model_and_origin(run: str | Path | Denoiser, device: str) -> tuple[Denoiser, str]:
    return (run, "in memory") if isinstance(run, Denoiser) else (load_model(run, device), str(run))


def predict(
    run: str | Path | Denoiser,
    slides: str | Path | Slide | Iterable[str | Path | Slide],
    out: str | Path,
    *,
    sampling: SamplingConfig | None = None,
    device: str = "auto",
    features_key: str = "features",
    overwrite: bool = False,
    resume: bool = False,
    on_slide: Callable[[str, tuple[str, ...]], None] | None = None,
) -> list[Path]:
    """Predict slides and write one ``{slide id}.h5ad`` each; no expression is needed.

    X is the predicted expression [N, G] float32 in the unit of the training (log1p counts), var_names the genes,
    obs_names the barcodes, ``obsm["spatial"]`` the spot centres in level-0 pixels, ``uns["stflow_fast"]`` the model,
    seed, NFE and version.

    Args:
        run: a run or model folder, or a model.
        slides: one or several: ``.h5ad`` (``obsm[features_key]``, ``obsm["spatial"]``), ``.h5`` embeddings, or Slides.
        out: folder of the results.
        sampling: how to draw.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is.
        features_key: of the ``.h5ad``.
        overwrite: replace earlier predictions in ``out``; those of other slides go when all of these are written.
        resume: keep those that this very call would make again, and predict the slides that are missing.
        on_slide: called with a slide's id and its reader's notes when its file is there.

    Returns:
        The files, in the order of ``slides``.

    Raises:
        InputError: a bad model, an occupied ``out``, predictions of another model or seed on resume, or a full disk.
            Bad slides do not stop the good ones: they are reported together when the others are written.
    """
    model, origin = _model_and_origin(run, device)
    sampling = sampling or SamplingConfig()
    wanted = _by_name([slides] if isinstance(slides, str | Path | Slide) else slides)
    about = {
        "weights_sha256": _fingerprint(model),
        "version": __version__,
        "selected_on": str(model.provenance.training.get("selected_on", "unknown")),
        **sampling.describe(model),
    }
    told = {"model": origin, **about}  # where the model lay does not decide what it predicts
    out = check_output(out, MANIFEST, reuse=overwrite or resume)
    known = _earlier_predictions(out, about, resume) | set(wanted)
    write_json(out / MANIFEST, {**told, "slides": sorted(known)})
    failed, written = [], []
    draw = sampling.drawer(model)
    for name, slide in wanted.items():
        path, notes = out / f"{name}.h5ad", ()
        try:
            if not (resume and _is_made_by(path, about)):
                loaded = slide if isinstance(slide, Slide) else read_slide(slide, features_key, expression=False)
                write_prediction(path, model, loaded, draw(loaded), told)
                notes = loaded.notes
        except OutputError:
            raise
        except InputError as error:
            failed.append(str(error))
            continue
        written.append(path)
        if on_slide:
            on_slide(name, notes)
    if failed:
        raise InputError("; ".join(failed) + (f" ({len(written)} other slides are in {out})" if written else ""))
    for name in known - set(wanted):
        if not _is_made_by(out / f"{name}.h5ad", about):  # of the result that this one replaces
            (out / f"{name}.h5ad").unlink(missing_ok=True)
    return written


def _by_name(slides: Iterable[str | Path | Slide]) -> dict[str, str | Path | Slide]:
    """Slides by the name of their prediction; two of one name are refused."""
    found: dict[str, str | Path | Slide] = {}
    for slide in slides:
        name = slide.id if isinstance(slide, Slide) else Path(slide).stem
        if name in found:
            raise InputError(f"{name}: is the name of several slides; rename one, each becomes one file")
        found[name] = slide
    return found


def _fingerprint(model: Denoiser) -> str:
    """SHA-256 of the parameters, in the order of their names."""
    digest = hashlib.sha256()
    for _, value in sorted(model.state_dict().items()):
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _earlier_predictions(out: Path, about: dict[str, Any], resume: bool) -> set[str]:
    """The slides that earlier predictions in ``out`` are of; resuming those of other settings is refused."""
    if not (out / MANIFEST).exists():
        return set()
    before = read_json(out / MANIFEST)
    if not (isinstance(before, dict) and isinstance(before.get("slides"), list)):
        raise InputError(f"{out / MANIFEST}: does not describe predictions; choose another --out")
    for field, value in about.items() if resume else ():
        if before.get(field) != value:
            raise InputError(f"{out / MANIFEST}: {field} differs from this call; choose another --out, or --overwrite")
    return set(before["slides"])


def _is_made_by(path: Path, about: dict[str, Any]) -> bool:
    """Whether a prediction stands there that was drawn as ``about`` says (one that is being overwritten was not)."""
    import anndata  # where it is used, as in slides/anndata_file.py

    try:
        with h5py.File(path, "r") as file:
            before = anndata.io.read_elem(file["uns/stflow_fast"])
    except (OSError, KeyError):
        return False
    return all(before.get(field) == value for field, value in about.items())


def write_prediction(path: Path, model: Denoiser, slide: Slide, drawn: Sample, about: dict[str, Any]) -> None:
    """Write one predicted slide as AnnData, atomically; see :func:`predict`.

    Raises:
        OutputError: the file cannot be written.
    """
    import anndata

    genes = model.provenance.genes or tuple(f"gene_{i}" for i in range(model.config.n_genes))
    table = anndata.AnnData(
        X=drawn.expression.float().numpy(),
        obs=pd.DataFrame(index=slide.barcodes.astype(str)),
        var=pd.DataFrame(index=list(genes)),
        obsm={"spatial": slide.coords},
        uns={
            "stflow_fast": {
                **about,
                "slide": slide.id,
                "nfe": drawn.nfe,
                "device": str(next(model.parameters()).device),
                "encoder": model.provenance.encoder,
                "normalize": model.provenance.normalize,
                "notes": "; ".join(slide.notes),
            }
        },
    )
    if slide.micron_per_pixel is not None:
        table.uns["stflow_fast"]["micron_per_pixel"] = slide.micron_per_pixel
    # In memory first: HDF5 on a disk that fills up does not fail, it crashes when the file is closed.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        anndata.io.write_elem(file, "/", table, dataset_kwargs={"compression": "gzip"})
        file.flush()
        image = file.id.get_file_image()
    with atomic_path(path) as temporary:
        temporary.write_bytes(image)


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
    sampling: SamplingConfig | None = None,
    device: str = "auto",
) -> Evaluation:
    """Score a model on the test slides of a HEST-bench task folder, beside the baselines.

    Args:
        run: a run or model folder, or a model.
        data: the task folder.
        fold: number of the split.
        embeddings: where the embeddings are, if not in the task folder.
        sampling: how to draw.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is.

    Raises:
        InputError: a test slide that the model was trained on, a model without gene names, or what HestTask, Slide
            and sample refuse.
    """
    model, origin = _model_and_origin(run, device)
    if not model.provenance.genes or not model.provenance.encoder:
        raise InputError(
            f"model {origin}: its config.json names no genes or no encoder; convert it with --genes and --encoder"
        )
    task = HestTask(data, model.provenance.encoder, embeddings)
    split = task.fold(fold)
    about = model.provenance.training
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

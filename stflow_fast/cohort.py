"""From a trained model to files and figures: predictions of many slides, and the evaluation of a fold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd

from ._version import __version__
from .errors import InputError
from .evaluation import compare
from .files import atomic_path, claim_output, write_json
from .flow import DEFAULT_MEMORY_BUDGET, Sample, sample
from .model import Denoiser
from .slides import HestTask, Slide, read_slide
from .training import MODEL_FOLDER, RUN_FILE

MANIFEST = "predictions.json"


@dataclass(frozen=True)
class SamplingConfig:
    """How predictions are drawn. ``None`` is what the model was trained with (else the published default).

    Attributes:
        n_sample_steps: times S of the flow's grid; S - 1 denoiser calls.
        prior: name of the source distribution.
        seed: with the slide's id, decides the noise.
        memory_budget: see :func:`stflow_fast.sample`.
    """

    n_sample_steps: int | None = None
    prior: str | None = None
    seed: int = 0
    memory_budget: int | str = DEFAULT_MEMORY_BUDGET

    def draw(self, model: Denoiser, slide: Slide) -> Sample:
        """Sample one slide."""
        return sample(model, slide, seed=self.seed, memory_budget=self.memory_budget, **self.resolved(model))

    def resolved(self, model: Denoiser) -> dict[str, Any]:
        """Steps and prior, with the model's own filled in."""
        trained = model.provenance.training.get("training", {})
        return {
            "n_sample_steps": self.n_sample_steps or trained.get("n_sample_steps", 5),
            "prior": self.prior or trained.get("prior", "zinb"),
        }


def load_model(run: str | Path) -> Denoiser:
    """The model of a run folder, of a ``save_pretrained`` folder, or of the Hugging Face Hub.

    Raises:
        InputError: no model there, a truncated one, or a run that has not finished.
    """
    folder = Path(run)
    if (folder / MODEL_FOLDER).is_dir():
        return Denoiser.from_pretrained(folder / MODEL_FOLDER)
    if (folder / RUN_FILE).exists():
        raise InputError(f"{folder}: has no {MODEL_FOLDER}/, its training did not finish; go on with train --resume")
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) != 2):
        raise InputError(f"{folder}: does not exist; give the folder of a run or of a model")
    return Denoiser.from_pretrained(run)


def predict(
    run: str | Path | Denoiser,
    slides: Iterable[str | Path | Slide],
    out: str | Path,
    *,
    sampling: SamplingConfig | None = None,
    features_key: str = "features",
    overwrite: bool = False,
    resume: bool = False,
    on_slide: Callable[[str], None] | None = None,
) -> list[Path]:
    """Predict slides and write one ``{slide id}.h5ad`` each; no expression is needed.

    X is the predicted expression [N, G] float32 in the unit of the training (log1p counts), var_names the genes,
    obs_names the barcodes, ``obsm["spatial"]`` the spot centres in level-0 pixels, ``uns["stflow_fast"]`` the model,
    seed, NFE and version.

    Args:
        run: a run or model folder, or a model.
        slides: ``.h5ad`` with ``obsm[features_key]`` and ``obsm["spatial"]``, or ``.h5`` embeddings; or Slides.
        out: folder of the results.
        sampling: how to draw.
        features_key: of the ``.h5ad``.
        overwrite: replace earlier predictions in ``out``.
        resume: keep them, and predict the slides that are missing.
        on_slide: called with a slide's id when it is done.

    Returns:
        The files, in the order of ``slides``.

    Raises:
        InputError: a bad model or an occupied ``out``. Bad slides do not stop the good ones: they are reported
            together when the others are written.
    """
    model = run if isinstance(run, Denoiser) else load_model(run)
    sampling = sampling or SamplingConfig()
    origin = "in memory" if isinstance(run, Denoiser) else str(run)
    slides = list(slides)
    names = [slide.id if isinstance(slide, Slide) else Path(slide).stem for slide in slides]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name}: is the name of {names.count(name)} slides; rename one, each becomes one file")
    out = claim_output(out, MANIFEST, reuse=overwrite or resume)
    manifest = {"model": origin, "version": __version__, "seed": sampling.seed, **sampling.resolved(model)}
    write_json(out / MANIFEST, manifest)
    failed, written = [], []
    for name, slide in zip(names, slides, strict=True):
        path = out / f"{name}.h5ad"
        if not (resume and path.exists()):
            try:
                loaded = slide if isinstance(slide, Slide) else read_slide(Path(slide), features_key)
                write_prediction(path, model, loaded, sampling.draw(model, loaded), {**manifest, "slide": name})
            except InputError as error:
                failed.append(str(error))
                continue
        written.append(path)
        if on_slide:
            on_slide(name)
    if failed:
        raise InputError("; ".join(failed) + (f" ({len(written)} other slides are in {out})" if written else ""))
    return written


def write_prediction(path: Path, model: Denoiser, slide: Slide, drawn: Sample, about: dict[str, Any]) -> None:
    """Write one predicted slide as AnnData, atomically; see :func:`predict`."""
    genes = model.provenance.genes or tuple(f"gene_{i}" for i in range(model.config.n_genes))
    provenance = model.provenance
    table = anndata.AnnData(
        X=drawn.expression.float().numpy(),
        obs=pd.DataFrame(index=slide.barcodes.astype(str)),
        var=pd.DataFrame(index=list(genes)),
        obsm={"spatial": slide.coords},
        uns={
            "stflow_fast": {
                **about,
                "nfe": drawn.nfe,
                "encoder": provenance.encoder,
                "normalize": provenance.normalize,
                "selected_on": str(provenance.training.get("selected_on", "unknown")),
                "notes": "; ".join(slide.notes),
            }
        },
    )
    if slide.micron_per_pixel is not None:
        table.uns["stflow_fast"]["micron_per_pixel"] = slide.micron_per_pixel
    with atomic_path(path) as temporary:
        table.write_h5ad(temporary, compression="gzip")


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
) -> Evaluation:
    """Score a model on the test slides of a HEST-bench task folder, beside the baselines.

    Args:
        run: a run or model folder, or a model.
        data: the task folder.
        fold: number of the split.
        embeddings: where the embeddings are, if not in the task folder.
        sampling: how to draw.

    Raises:
        InputError: a test slide that the model was trained on, a model without gene names, or what HestTask, Slide
            and sample refuse.
    """
    model = run if isinstance(run, Denoiser) else load_model(run)
    if not model.provenance.genes or not model.provenance.encoder:
        raise InputError(f"{run}: its config.json names no genes or no encoder; convert it with --genes and --encoder")
    task = HestTask(data, model.provenance.encoder, embeddings)
    split = task.fold(fold)
    seen = sorted(set(split.test) & set(model.provenance.training.get("train", ())))
    if seen:
        raise InputError(
            f"fold {fold}: the model was trained on its test slides {', '.join(seen)}; choose its own fold"
        )
    train, test = [task.slide(name) for name in split.train], [task.slide(name) for name in split.test]
    evaluation = evaluate_slides(model, train, test, sampling)
    evaluation.result.update({"run": str(run), "data": str(data), "fold": fold})
    return evaluation


def evaluate_slides(
    model: Denoiser, train: list[Slide], test: list[Slide], sampling: SamplingConfig | None = None
) -> Evaluation:
    """As :func:`evaluate`, from slides: the baselines are fitted on ``train``, all are scored on ``test``."""
    sampling = sampling or SamplingConfig()
    genes, normalize = model.provenance.genes, model.provenance.normalize
    started = time.perf_counter()
    drawn = [sampling.draw(model, slide) for slide in test]
    seconds = time.perf_counter() - started
    predicted = [one.expression.float().numpy() for one in drawn]
    result = compare(train, test, np.concatenate(predicted), genes, normalize)
    result.update(
        {
            "selected_on": model.provenance.training.get("selected_on", "unknown"),
            "encoder": model.provenance.encoder,
            "normalize": normalize,
            "seed": sampling.seed,
            **sampling.resolved(model),
            "nfe": drawn[0].nfe,
            "sampling_seconds": round(seconds, 3),
            "version": __version__,
        }
    )
    truth = [slide.expression(genes, normalize) for slide in test]
    return Evaluation(result, test, truth, predicted, genes)

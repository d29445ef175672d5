"""Predictions of many slides as files: what is to do, in which order and by which worker, and what a failure does."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError, SlidesFailed, batch_error
from ..files import check_output, is_same_file, read_json, remove_parts, write_json
from ..inspection import Finding, finding_of
from ..model import Denoiser
from ..outputs import SUFFIXES, OutputConfig, check_replaceable, read_about, remove_prediction
from ..sampling import check_precision
from ..slides import ReadOptions, Slide, SlideSource
from .crew import beside_each_other
from .inputs import Given, described, given_slides, path_of
from .local import Process, overlapped, places_of
from .page import write_page
from .run_config import WHOLE, RunConfig
from .settings import SamplingConfig, gene_names, made_by, model_and_origin
from .state import FAILED, SlideLine, journal, read_lines
from .tables import write_tables
from .worker import MAPS, Settings, Task, Worker, digest

MANIFEST = "predictions.json"


def predict(run: str | Path | Denoiser, slides: Any, out: str | Path, **options: Any) -> list[Path]:
    """As :func:`predict_iter`, to the end.

    Args:
        options: those of :func:`predict_iter`, and ``on_slide``: called with each line and how many slides there are.

    Returns:
        The files, in the order of the slides; with those that an earlier call made.

    Raises:
        SlidesFailed: some slides could not be predicted, when all others are written; a line each.
        InputError: as :func:`predict_iter`.
    """
    on_slide: Callable[[SlideLine, int], None] | None = options.pop("on_slide", None)
    work = _Run(run, slides, Path(out), **options)
    lines: dict[str, SlideLine] = {}
    for line in work.lines():
        lines[line.slide] = line
        if on_slide:
            on_slide(line, work.total)
    failed = [line.reason for line in lines.values() if not line.is_done]
    done = (lines[name] for name in work.given.slides if name in lines and lines[name].is_done)
    written = [path for line in done if (path := line.path(work.out))]
    if failed:
        raise SlidesFailed(failed, len(written), work.out)
    return written


def predict_iter(
    run: str | Path | Denoiser,
    slides: str | Path | Slide | Iterable[str | Path | Slide],
    out: str | Path,
    *,
    sampling: SamplingConfig | None = None,
    output: OutputConfig | None = None,
    config: RunConfig | None = None,
    device: str = "auto",
    reading: ReadOptions | None = None,
    ignore_encoder: bool = False,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[SlideLine]:
    """Predict slides and write one ``{slide id}.h5ad`` each (or ``.zarr``); no expression is needed. Yields a line of
    each slide as it comes, of those that were done before too; tables and a page are drawn at the end.

    X is the predicted expression [N, G] in the unit of the training (log1p counts), var_names the genes, obs_names the
    barcodes, obs what the input says of the spots, ``obsm["spatial"]`` their centres in level-0 pixels,
    ``uns["stflow_fast"]`` the model, seed, NFE, version and layout; see :func:`stflow_fast.outputs.prediction_table`.
    What a slide's prediction is depends on the slide, the model, the seed and these settings alone.

    Args:
        run: a run or model folder, or a model.
        slides: one or several: Slides, or paths: of any format of :data:`stflow_fast.slides.FORMATS`, of folders with
            such, or of CSV lists; see :func:`.inputs.given_slides`.
        out: folder of the results.
        sampling: how to draw.
        output: what is written of it, and how.
        config: which of the slides, and by what.
        device: see :func:`stflow_fast.devices.choose_device`; a model that is given stays where it is. On a Ray cluster
            "cuda" for a GPU for each worker, "cpu" for a core, "auto" for GPUs where it has any.
        reading: how to read paths.
        ignore_encoder: predict from features of another encoder than the model's, too.
        overwrite: replace earlier predictions in ``out``; those of other slides, made otherwise, go when all of these
            are written.
        resume: keep those that this very call would make again, and predict the slides that are missing. Slides are
            known by their ids alone: what a file holds is not compared.

    Raises:
        InputError: a bad model, genes that it does not predict, an occupied ``out``, something else than a prediction
            where one would go, predictions of another model, seed, layout or way of reading on resume.
        OutputError: a full disk, or a process that predicts into ``out`` at this moment.
    """
    work = _Run(
        run,
        slides,
        Path(out),
        sampling=sampling,
        output=output,
        config=config,
        device=device,
        reading=reading,
        ignore_encoder=ignore_encoder,
        overwrite=overwrite,
        resume=resume,
    )
    return work.lines()


class _Run:
    """A call of :func:`predict_iter`, whose arguments it checks."""

    def __init__(
        self,
        run: str | Path | Denoiser,
        slides: Any,
        out: Path,
        sampling: SamplingConfig | None = None,
        output: OutputConfig | None = None,
        config: RunConfig | None = None,
        device: str = "auto",
        reading: ReadOptions | None = None,
        ignore_encoder: bool = False,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.config, self.resume, reading = config or RunConfig(), resume, reading or ReadOptions()
        self.device = device
        self.model, origin = model_and_origin(run, "cpu" if self.config.engine == "ray" else device)
        output, sampling = output or OutputConfig(), sampling or SamplingConfig()
        if self.config.engine == "local":
            check_precision(sampling.precision, self.model)
        output.layers(sampling.draws)
        panel = gene_names(self.model)
        maps = self.config.check_maps(panel if output.genes is None else output.genes)
        self.settings = Settings(out, origin, sampling, output, ignore_encoder, maps)
        self.given = chosen(given_slides(slides, reading, self.config.nested), self.config)
        if self.given.refused and not self.given.slides and self.config.shard == WHOLE:
            raise batch_error([reason for _, reason in self.given.refused.values()], 0, out)
        self._check_workers()
        self.about = {**output.describe(panel), **made_by(self.model, sampling), "reading": described(reading)}
        shares = self.config.shard != WHOLE
        self.out = check_output(out, MANIFEST, reuse=overwrite or resume or shares)
        self.told = {"model": origin, **self.about}  # where the model lay does not decide what it predicts
        self._keeps = resume or (shares and not overwrite)
        self.earlier = self._earlier()
        for name, slide in self.given.slides.items():
            _check_place(output.path(self.out, name), slide)
        self.total = len(self.given.slides) + len(self.given.refused)

    def _check_workers(self) -> None:
        """Raise InputError for processes that there cannot be."""
        workers, gpus = self.config.workers, self.config.gpus
        if self.config.engine != "local" or ((workers or 1) == 1 and gpus is None):
            return
        name = "workers" if gpus is None else "gpus"
        if any(isinstance(each, Slide) for each in self.given.slides.values()):
            raise InputError(f"{name}: slides in memory are predicted in this process; leave it out")
        if gpus is None and next(self.model.parameters()).is_cuda:
            raise InputError("workers: are of a CPU (--device cpu); a GPU has one")

    def lines(self) -> Iterator[SlideLine]:
        """See :func:`predict_iter`."""
        if not (self.out / MANIFEST).exists():  # by which a folder is known for one of predictions
            self._write_manifest()
        with journal(self.out, self.config.shard) as kept, contextlib.ExitStack() as at_the_end:
            self.earlier = self._earlier()  # another run may have been here since
            self._write_manifest()
            before = read_lines(self.out)
            attempts = {name: line.attempts for name, line in before.items()}
            there = {name for name in self.given.slides if self._is_there(before.get(name))}
            yield from (before[name] for name in self.given.slides if name in there)
            refused = (
                SlideLine(name, path, FAILED, reason, attempts=attempts.get(name, 0) + 1)
                for name, (path, reason) in self.given.refused.items()
            )
            tasks = [
                Task(name, slide, self.given.reading[name], attempts.get(name, 0) + 1)
                for name, slide in self.given.slides.items()
                if name not in there
            ]
            failed = bool(self.given.refused)
            at_the_end.callback(self._summarize)
            with self._without_parts(tasks), contextlib.closing(self._predicted(tasks)) as predicted:
                for line in itertools.chain(refused, predicted):
                    failed |= not line.is_done
                    kept.add(line)
                    yield line
            # Of shards, another may still want to replace its own.
            if self.earlier and not failed and self.config.shard == WHOLE:
                self._remove_earlier()

    def _summarize(self) -> None:
        """Also where the run has ended before its time."""
        with contextlib.suppress(OutputError):  # which then ended it
            summarize(self.out)

    def _earlier(self) -> set[str]:
        return _earlier(self.out, self.about, self._keeps)

    @contextlib.contextmanager
    def _without_parts(self, tasks: list[Task]) -> Iterator[None]:
        """Before and afterwards, what killed processes have left of these slides, which nobody else writes, goes."""
        names = {task.id for task in tasks}
        of_maps = {f"{name}.{number}" for name in names for number in range(len(self.config.maps))}
        with contextlib.ExitStack() as afterwards:
            for folder, stems in ((self.out, names), (self.out / MAPS, of_maps)):
                remove_parts(folder, stems)
                afterwards.callback(remove_parts, folder, stems)
            yield

    def _write_manifest(self) -> None:
        write_json(self.out / MANIFEST, {**self.told, "earlier": sorted(self.earlier)})

    def _is_there(self, line: SlideLine | None) -> bool:
        """Whether this call would make the prediction again that a line of an earlier one is of."""
        if not self.resume or line is None or not line.is_done:
            return False
        if not line.maps.keys() >= set(self.config.maps):
            return False
        return line.made == self._digest(self.given.reading[line.slide]) and line.is_written(self.out)

    def _digest(self, reading: dict[str, str]) -> str:
        return digest({**self.about, "reading": reading})

    def _predicted(self, tasks: list[Task]) -> Generator[SlideLine, None, None]:
        """The lines of slides as they come."""
        if self.config.engine == "ray":
            from .ray_engine import on_cluster

            where = self.device, self.config.workers, self.config.address
            yield from on_cluster(self.model, self.settings, tasks, *where)
            return
        device = next(self.model.parameters()).device
        places = places_of(device, len(tasks), self.config.workers, self.config.gpus)
        if not places or not all(isinstance(task.slide, SlideSource) for task in tasks):
            yield from overlapped(Worker(self.model, self.settings), tasks)
            return
        with tempfile.TemporaryDirectory() as folder:
            # Each process reads it from there, whatever it was made of.
            self.model.save_pretrained(folder)
            processes = [Process(place, folder, self.settings) for place in places[: len(tasks)]]
            yield from beside_each_other(processes, tasks)

    def _remove_earlier(self) -> None:
        """Take away what this result replaces, predictions of other settings or in the other form, but for files that
        are given as slides."""
        lines = read_lines(self.out)
        made = set(map(self._digest, (*self.given.reading.values(), self.about["reading"], {})))
        current = {line.path(self.out) for line in lines.values() if line.is_done and line.made in made}
        given = [path for path in map(path_of, self.given.slides.values()) if path]
        for name in {*self.earlier, *lines}:
            for path in {self.out / f"{name}{suffix}" for suffix in SUFFIXES.values()} - current:
                if read_about(path) is not None and not any(is_same_file(path, each) for each in given):
                    remove_prediction(path)
        self.earlier = set()
        self._write_manifest()


def chosen(given: Given, config: RunConfig) -> Given:
    """Those of the shard, up to the limit."""
    index, count = config.shard
    return given.part(slice(index - 1, None, count)).part(slice(config.limit))


def _check_place(path: Path, slide: SlideSource | Slide) -> None:
    """Raise InputError where the prediction of a slide would take the place of something else."""
    given = path_of(slide)
    if given and is_same_file(given, path):
        raise InputError(f"{path}: is the slide itself, and its prediction would take its place; choose another --out")
    check_replaceable(path)


def _earlier(out: Path, about: dict[str, Any], resume: bool) -> set[str]:
    """The slides that predictions in ``out`` are of, made otherwise than ``about`` says; resuming is refused where the
    last call's were."""
    path = out / MANIFEST
    if not path.exists():
        return set()
    before = read_json(path)
    if not (isinstance(before, dict) and isinstance(before.get("earlier", []), list) and "weights_sha256" in before):
        raise InputError(f"{path}: does not describe predictions; choose another --out")
    other = next((field for field, value in about.items() if field not in before or before[field] != value), None)
    earlier = set(before.get("earlier", ()))
    if not other:
        return earlier
    if resume:
        lacks = f"tells no {other}, an earlier version made it"
        what = f"{other} differs from this call" if other in before else lacks
        raise InputError(f"{path}: {what}; choose another --out, or --overwrite")
    made = {name for name, line in read_lines(out).items() if line.is_done}
    return earlier | made | set(before.get("slides", ()))


def summarize(folder: str | Path) -> list[SlideLine]:
    """Draw tables and page of a folder of predictions anew, from the lines of all shards.

    Raises:
        InputError: no folder of predictions.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise InputError(f"{folder}: holds no {MANIFEST}, so it is no folder of predictions; give predict's --out")
    lines = [line for line in read_lines(folder).values() if not line.is_done or line.is_written(folder)]
    write_tables(folder, lines)
    write_page(folder, lines, read_json(folder / MANIFEST))
    return lines


def would_do(
    run: str | Path | Denoiser,
    slides: Any,
    reading: ReadOptions | None = None,
    config: RunConfig | None = None,
    ignore_encoder: bool = False,
    on_path: Callable[[str, int], None] | None = None,
) -> list[Finding]:
    """What a call would predict, and why something would not: of each slide what :func:`stflow_fast.inspect` says."""
    model, _ = model_and_origin(run, "cpu")
    config = config or RunConfig()
    given = chosen(given_slides(slides, reading or ReadOptions(), config.nested), config)
    total = len(given.slides) + len(given.refused)
    found = []
    for slide in given.slides.values():
        found.append(finding_of(slide, model, ignore_encoder))
        if on_path:
            on_path(found[-1].path, total)
    return [*found, *(Finding(path, name, problem=reason) for name, (path, reason) in given.refused.items())]

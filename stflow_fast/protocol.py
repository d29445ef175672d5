"""The field's benchmarks by one command: every task, fold, seed and way of choosing the epoch, and one table of all.

A run is trained and scored once: what is on the disk already is not made again, so a call that was interrupted goes on.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ._version import __version__
from .calibration import calibrate
from .cohort import SamplingConfig, evaluate, load_model
from .errors import InputError
from .evaluation import score
from .files import atomic_path, read_json, write_json
from .runs import RUN_FILE
from .slides import HestTask, StImageTask, open_task
from .slides.stimage import ORGANS
from .training import SELECTIONS, fit, load_fold
from .windows import TrainingConfig

RESULTS_FILE, PAGE_FILE, SCORES_FILE = "results.json", "results.md", "scores.json"

HARDEST = "HCC"
"""The paper averages ten tasks; the leaderboard of HEST-bench leaves this one out."""

VARIANTS = {"smoothed": SamplingConfig(smooth=0.25), "fast": SamplingConfig(n_sample_steps=2, prior="zero")}
"""Ways to sample a model beside the published one."""

KEPT = (
    *("pearson_mean", "spearman_mean", "mse_mean", "r2_mean", "n_constant_genes", "alpha"),
    *("certainty", "certainty_of_neighborhoods", "structure", "structure_of_draws"),
)
"""Of what ``evaluate`` says of a predictor."""

CERTAINTY_HEAD = ("model", "CRPS", "of random training spots", "in 50 %", "in 90 %", "neighbourhoods in 90 %", "spread")
CERTAINTY_NOTE = (
    "Draws by the observation models, means over runs. In 50 %, 90 %: share of the truth within such intervals of the "
    "draws, where it ties with draws by its share; neighbourhoods: of the means over each spot and its neighbours. "
    "Spread: of the draws, over the error of their mean."
)


@dataclass(frozen=True)
class Task:
    """A task folder, or an organ of STImage-1K4M."""

    name: str
    data: str
    folds: tuple[int, ...]
    organ: str | None = None


@dataclass(frozen=True)
class Plan:
    """What is trained and scored.

    Attributes:
        tasks: which.
        encoder: name of the embeddings' folder.
        seeds: of the training; where ``seed_is_fold`` also the number of the split.
        selections: what the epoch is chosen on, see :func:`stflow_fast.training.load_fold`.
        embeddings: where the embeddings are, if not in the task folders.
        genes: the gene list.
        certainty: fit an observation model to each run too.
        training: further settings of TrainingConfig.
        denoiser: fields of DenoiserConfig.

    Raises:
        InputError: an unknown selection, or nothing to do.
    """

    tasks: tuple[Task, ...]
    encoder: str
    seeds: tuple[int, ...] = (0, 1, 2)
    selections: tuple[str, ...] = ("none", "validation", "test")
    embeddings: str | None = None
    genes: str = "var_50genes.json"
    certainty: bool = False
    training: Mapping[str, Any] | None = None
    denoiser: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.selections if name not in SELECTIONS]
        if unknown:
            raise InputError(f"selections: must be of {', '.join(SELECTIONS)}, not {unknown[0]!r}")
        for field in ("tasks", "seeds", "selections"):
            if not getattr(self, field):
                raise InputError(f"{field}: names none; give at least one")

    def cases(self) -> Iterator[Case]:
        """One after another, so that a table has all of a task soon."""
        for task in self.tasks:
            for selection, fold, seed in itertools.product(self.selections, task.folds, self.seeds):
                if task.organ is None or fold == seed:  # STImage-Bench: a seed has a split of its own
                    yield Case(task, selection, fold, seed)


@dataclass(frozen=True)
class Case:
    """One run."""

    task: Task
    selection: str
    fold: int
    seed: int

    @property
    def path(self) -> str:
        return f"{self.task.name}/{self.selection}/fold{self.fold}_seed{self.seed}"


def hest_tasks(
    root: str | Path, encoder: str, embeddings: str | None = None, names: Sequence[str] = ()
) -> tuple[Task, ...]:
    """The tasks of a HEST-bench folder: those of its folders that have ``splits/``, or itself if it has.

    Args:
        root: the folder.
        encoder, embeddings: see :class:`Plan`.
        names: of the tasks to take; all when empty.

    Raises:
        InputError: no task there, or none of a name.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: is not a folder; give that of HEST-bench, or of one of its tasks")
    found = [root] if (root / "splits").is_dir() else sorted(each.parent for each in root.glob("*/splits"))
    by_name = {folder.resolve().name: folder for folder in found}
    if not by_name:
        raise InputError(f"{root}: has no task; there are no folder with splits/")
    missing = [name for name in names if name not in by_name]
    if missing:
        raise InputError(f"{root}: has no task {', '.join(missing)}; there are {', '.join(by_name)}")
    tasks = []
    for name in names or by_name:
        folds = tuple(HestTask(by_name[name], encoder, embeddings).folds())
        if not folds:
            raise InputError(f"{by_name[name] / 'splits'}: has no train_0.csv; without splits there is nothing to run")
        tasks.append(Task(name, str(by_name[name]), folds))
    return tuple(tasks)


def stimage_tasks(root: str | Path, seeds: Sequence[int], names: Sequence[str] = ()) -> tuple[Task, ...]:
    """The organs of STImage-Bench; a seed has a split of its own.

    Raises:
        InputError: none of a name.
    """
    unknown = [name for name in names if name not in ORGANS]
    if unknown:
        raise InputError(f"tasks: must be of {', '.join(ORGANS)}, not {unknown[0]!r}")
    return tuple(Task(name, str(root), tuple(seeds), name) for name in (names or ORGANS))


def run_protocol(
    plan: Plan,
    out: str | Path,
    patients: Mapping[str, str] | None = None,
    on_case: Callable[[Case, int, int], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Train and score what is not there yet; write ``results.json`` and ``results.md``.

    Args:
        plan: what.
        out: folder of the runs and the results.
        patients: of each slide; of ``slides.csv`` in a task folder where None. Without either, leakage is not checked,
            and that is said.
        on_case: called before each run with it, its number and how many there are.
        on_epoch: called with each epoch's record.

    Returns:
        ``rows`` of :func:`rows_of`, ``leakage``, and the settings (plain JSON types).

    Raises:
        InputError: what training and evaluation refuse, with the run's name; what is done by then stays.
    """
    out, cases, scores = Path(out), list(plan.cases()), []
    leakage = {task.name: leakage_of(task, plan, patients) for task in plan.tasks}
    for number, case in enumerate(cases):
        if on_case:
            on_case(case, number, len(cases))
        scores.append(_scores(plan, case, out / case.path, on_epoch))
        _write(out, plan, scores, leakage, len(cases))
    return read_json(out / RESULTS_FILE)


def _scores(plan: Plan, case: Case, folder: Path, on_epoch: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """Of one run, from the disk if they are there."""
    settings = {"case": _told(case), "genes": plan.genes, "encoder": plan.encoder, "certainty": plan.certainty}
    settings |= {"training": dict(plan.training or {}), "denoiser": dict(plan.denoiser or {}), "version": __version__}
    path = folder / SCORES_FILE
    if path.exists() and (known := read_json(path)).get("settings") == settings:
        return known
    config = TrainingConfig(**{**(plan.training or {}), "seed": case.seed})
    data = load_fold(
        case.task.data,
        plan.encoder,
        case.fold,
        plan.genes,
        embeddings=plan.embeddings,
        select_on=case.selection,
        organ=case.task.organ,
        config=config,
    )
    resume = (folder / RUN_FILE).exists()
    run = fit(data, folder, dict(plan.denoiser or {}), config, resume=resume, on_epoch=on_epoch)
    trained = sum(record["seconds"] for record in run.records)
    if plan.certainty:
        calibrate(folder, embeddings=plan.embeddings)
    found = {"settings": settings, "train_seconds": round(trained, 1), **_evaluated(plan, case, folder)}
    write_json(path, found)
    return found


def _told(case: Case) -> dict[str, Any]:
    return {"task": case.task.name, "selection": case.selection, "fold": case.fold, "seed": case.seed}


def _evaluated(plan: Plan, case: Case, folder: Path) -> dict[str, Any]:
    """Scores of every way to sample the model of a run, and of the baselines."""
    model = load_model(folder)
    evaluation = evaluate(model, case.task.data, case.fold, embeddings=plan.embeddings)
    result, truth = evaluation.result, np.concatenate(evaluation.truth)
    of_model = {"": {**_kept(result), "seconds": result["sampling_seconds"], "nfe": result["nfe"]}}
    for name, sampling in VARIANTS.items():
        started = time.perf_counter()
        drawn = list(map(sampling.drawer(model), evaluation.slides))
        seconds = round(time.perf_counter() - started, 3)
        made = np.concatenate([one.expression.float().numpy() for one in drawn])
        of_model[name] = {**_kept(score(truth, made, evaluation.genes)), "seconds": seconds, "nfe": drawn[0].nfe}
    baselines = {name: _kept(scores) for name, scores in result["baselines"].items()}
    told = {name: result[name] for name in ("selected_on", "n_spots", "observation") if name in result}
    return {**told, "model": of_model, "baselines": baselines}


def _kept(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: scores[name] for name in KEPT if name in scores}


def rows_of(scores: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every predictor of every task: mean over folds of its Pearson, then mean and standard deviation over seeds.

    Returns:
        ``{"predictor", "task", "pearson": mean, "std", "folds": {fold: mean over seeds}, "n_seeds", "seconds"}`` each,
        the last of sampling the test slides of a run, mean over runs, None of a baseline.
    """
    found: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    for one in scores:
        case = one["settings"]["case"]
        selection = case["selection"]
        named = {", ".join(filter(None, (f"STFlow, {selection}", name))): each for name, each in one["model"].items()}
        for name, each in {**named, **one["baselines"]}.items():
            if each["pearson_mean"] is not None:
                by_seed = found.setdefault((name, case["task"]), {})
                by_seed.setdefault(case["seed"], {})[case["fold"]] = each["pearson_mean"]
                if "seconds" in each:
                    seconds.setdefault((name, case["task"]), []).append(each["seconds"])
    return [
        {**_row(*place, by_seed), "seconds": statistics.mean(seconds[place]) if place in seconds else None}
        for place, by_seed in found.items()
    ]


def _row(name: str, task: str, by_seed: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    means = [statistics.mean(folds.values()) for folds in by_seed.values()]
    numbers = sorted({fold for folds in by_seed.values() for fold in folds})
    per_fold = {fold: statistics.mean(folds[fold] for folds in by_seed.values() if fold in folds) for fold in numbers}
    std = statistics.stdev(means) if len(means) > 1 else 0.0
    spread = {"std": std, "folds": per_fold, "n_seeds": len(means)}
    return {"predictor": name, "task": task, "pearson": statistics.mean(means), **spread}


def leakage_of(task: Task, plan: Plan, patients: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Patients that stand on both sides of a fold, where it is known whose a slide is.

    Returns:
        ``{"checked": bool, "folds": {number: [patients on both sides]}, "unknown": [slides of nobody]}``.
    """
    known = patients if patients is not None else _patients_beside(Path(task.data))
    if known is None:
        return {"checked": False, "folds": {}, "unknown": []}
    opened: HestTask | StImageTask = open_task(task.data, plan.encoder, plan.embeddings, None, task.organ)
    folds, unknown = {}, set()
    for number in task.folds:
        fold = opened.fold(number)
        sides = [{known[name] for name in side if name in known} for side in ((*fold.train, *fold.val), fold.test)]
        unknown |= {name for name in (*fold.train, *fold.val, *fold.test) if name not in known}
        folds[str(number)] = sorted(sides[0] & sides[1])
    return {"checked": True, "folds": folds, "unknown": sorted(unknown)}


def read_patients(path: str | Path) -> dict[str, str]:
    """Slides and their patients, of a CSV with columns ``sample_id`` (or ``id``, as HEST's own table) and ``patient``.

    Raises:
        InputError: no such table, or without these columns.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), list(reader.fieldnames or ())
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as a table ({error})") from error
    name = next((column for column in ("sample_id", "id") if column in columns), None)
    if name is None or "patient" not in columns:
        raise InputError(f"{path}: wants columns sample_id (or id) and patient; it has {', '.join(columns) or 'none'}")
    return {row[name]: row["patient"] for row in rows if row[name] and row["patient"]}


def _patients_beside(folder: Path) -> dict[str, str] | None:
    path = folder / "slides.csv"
    try:
        return read_patients(path) or None
    except InputError:
        return None


def _write(
    out: Path, plan: Plan, scores: Sequence[Mapping[str, Any]], leakage: Mapping[str, Any], n_cases: int
) -> None:
    rows = rows_of(scores)
    found = {
        "version": __version__,
        "encoder": plan.encoder,
        "genes": plan.genes,
        "seeds": list(plan.seeds),
        "tasks": [asdict(replace(task, data=Path(task.data).name)) for task in plan.tasks],
        "done": len(scores),
        "of": n_cases,
        "leakage": dict(leakage),
        "rows": rows,
        "averages": averages_of(rows),
        "scores": list(scores),
    }
    write_json(out / RESULTS_FILE, found)
    with atomic_path(out / PAGE_FILE) as temporary:
        temporary.write_text(page(found), encoding="utf-8")


def averages_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each predictor over the tasks that all predictors have: ``{"all", "n"}``, and ``{"without_HCC"}`` where HCC is
    among them."""
    tasks = sorted({row["task"] for row in rows})
    found = {}
    for name in dict.fromkeys(row["predictor"] for row in rows):
        own = {row["task"]: row["pearson"] for row in rows if row["predictor"] == name}
        if set(own) != set(tasks):
            continue
        found[name] = {"all": statistics.mean(own.values()), "n": len(own)}
        others = [value for task, value in own.items() if task != HARDEST]
        if HARDEST in own and others:
            found[name][f"without_{HARDEST}"] = statistics.mean(others)
    return found


def page(found: Mapping[str, Any]) -> str:
    """A result as Markdown: a row for each predictor, a column for each task (for each fold, where it is one task)."""
    parts = ["# Mean Pearson over genes", _markdown(*cells_of(found)), *notes_of(found)]
    certain = certainty_cells_of(found)
    if certain:
        parts += ["## Certainty", _markdown(CERTAINTY_HEAD, certain), CERTAINTY_NOTE]
    return "\n\n".join(parts) + "\n"


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def certainty_cells_of(found: Mapping[str, Any]) -> list[list[str]]:
    """The lines below :data:`CERTAINTY_HEAD` of a result, as text: none where no run was calibrated."""
    of_models: dict[str, list[Mapping[str, Any]]] = {}
    for one in found["scores"]:
        if "certainty" in one["model"][""]:
            case = one["settings"]["case"]
            of_models.setdefault(f"{case['task']}, STFlow, {case['selection']}", []).append(one)
    return [[name, *_certainty_cells(runs)] for name, runs in of_models.items()]


def _certainty_cells(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    of_spots, regions = ([one["model"][""][key] for one in runs] for key in ("certainty", "certainty_of_neighborhoods"))
    random = [one["baselines"]["train_mean"]["certainty"] for one in runs]
    wanted = (
        *((of_spots, "crps_mean"), (random, "crps_mean"), (of_spots, "coverage_50"), (of_spots, "coverage_90")),
        *((regions, "coverage_90"), (of_spots, "spread_ratio")),
    )
    values = [[each[key] for each in group if each[key] is not None] for group, key in wanted]
    return [f"{statistics.mean(each):.3f}" if each else "" for each in values]


def cells_of(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head and the lines of the table of a result, as text."""
    rows, tasks = found["rows"], [task["name"] for task in found["tasks"]]
    names = list(dict.fromkeys(row["predictor"] for row in rows))
    by_place = {(row["predictor"], row["task"]): row for row in rows}
    if len(tasks) == 1:
        folds = [str(fold) for fold in found["tasks"][0]["folds"]]
        lines = [
            [name, *_fold_cells(by_place[name, tasks[0]], folds), _seconds([by_place[name, tasks[0]]])]
            for name in names
        ]
        return ["predictor", *(f"fold {fold}" for fold in folds), "mean (std over seeds)", "s"], lines
    lines = []
    for name in names:
        cells = [_cell(by_place[name, task]) if (name, task) in by_place else "" for task in tasks]
        average = found["averages"].get(name, {})
        means = [average.get("all"), average.get(f"without_{HARDEST}")]
        rows_here = [by_place[name, task] for task in tasks if (name, task) in by_place]
        lines.append([name, *cells, *("" if mean is None else f"{mean:.3f}" for mean in means), _seconds(rows_here)])
    return ["predictor", *tasks, f"average of {len(tasks)}", f"without {HARDEST}", "s"], lines


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row["seconds"] for row in rows if row["seconds"] is not None]
    return f"{statistics.mean(known):.2f}" if known else ""


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['pearson']:.3f} ({row['std']:.3f})" if row["n_seeds"] > 1 else f"{row['pearson']:.3f}"


def _fold_cells(row: Mapping[str, Any], folds: Sequence[str]) -> list[str]:
    known = {str(fold): value for fold, value in row["folds"].items()}
    return [*(f"{known[fold]:.3f}" if fold in known else "" for fold in folds), _cell(row)]


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know, a paragraph each."""
    seeds = ", ".join(map(str, found["seeds"]))
    notes = [
        f"Encoder {found['encoder']}, genes {found['genes']}, seeds {seeds}; {found['done']} of {found['of']} runs; "
        f"stflow-fast {found['version']}. Mean over folds, then mean (standard deviation) over seeds. 'none': no epoch "
        "chosen, weights averaged; 'validation': chosen on what is held out of training; 'test': chosen on the test "
        "fold, as published, which flatters. 'smoothed': a quarter of the neighbours mixed in; 'fast': one call from "
        "zeros. s: seconds to sample the test slides of a run."
    ]
    for task, told in found["leakage"].items():
        if not told["checked"]:
            notes.append(f"{task}: nothing says whose a slide is, so leakage is not checked; give --patients FILE.")
            continue
        both = {fold: names for fold, names in told["folds"].items() if names}
        if both:
            where = "; ".join(f"fold {fold}: {', '.join(names)}" for fold, names in both.items())
            notes.append(f"{task}: patients on both sides of a split: {where}.")
        if told["unknown"]:
            notes.append(f"{task}: nobody is named for {', '.join(told['unknown'])}.")
    return notes

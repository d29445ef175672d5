"""What is trained and scored: the tasks of a benchmark, and the runs of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..slides import HestTask
from ..slides.stimage_task import ORGANS
from ..training import SELECTIONS


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

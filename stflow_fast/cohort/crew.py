"""Workers of their own memory, beside each other: which slides each gets, and what it means that one has died."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from ..errors import OutputError
from .inputs import path_of
from .state import SlideLine
from .worker import Task, failed_line

AHEAD = 2
"""Slides that a worker has at a time: one is read while the other is computed."""

MOST_DEATHS = 2
"""Of workers over one slide; then it is the slide's fault."""


class Member(abc.ABC):
    """A worker, and the slides that it has; ``alone``: one slide at a time, for one may kill it."""

    def __init__(self) -> None:
        self.tasks, self.alone = deque[Task](), False

    @abc.abstractmethod
    def again(self: M) -> M:
        """Another one in its place."""

    @staticmethod
    @abc.abstractmethod
    def wait(members: Sequence[M]) -> list[M]:
        """Those that have something to be received, or have died, once there is one."""

    @abc.abstractmethod
    def send(self, task: Task) -> None:
        """A slide, which may find it dead."""

    @abc.abstractmethod
    def receive(self) -> SlideLine | OutputError | None:
        """A slide's line, or what would go wrong with every slide; None where it has died."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Whatever it is doing, and also where it has died."""

    @property
    @abc.abstractmethod
    def end(self) -> str:
        """How it died."""


M = TypeVar("M", bound=Member)


def beside_each_other(members: Sequence[M], tasks: Iterable[Task]) -> Iterator[SlideLine]:
    """The lines of slides as they come. A worker that dies is replaced, and the slides that it had are tried again,
    alone; a slide that workers die over twice has failed. All are stopped at the end.

    Raises:
        OutputError: what would go wrong with every slide.
    """
    coming, suspects, deaths = deque(tasks), deque[Task](), Counter[str]()
    running = list(members)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(lambda: [member.stop() for member in running])
        for member in running:
            _feed(member, coming, suspects)
        while working := [member for member in running if member.tasks]:
            for member in type(working[0]).wait(working):
                said = member.receive()
                if isinstance(said, OutputError):
                    raise said
                if said is not None:
                    member.tasks = deque(task for task in member.tasks if task.id != said.slide)
                    yield said
                else:
                    yield from _bury(member, deaths, suspects)
                    running[running.index(member)] = member = member.again()
                _feed(member, coming, suspects)


def _feed(member: Member, coming: deque[Task], suspects: deque[Task]) -> None:
    """As many slides as it may have."""
    if member.tasks and (member.alone or suspects):
        return
    member.alone = bool(suspects)
    if member.alone:
        _give(member, suspects.popleft())
    while not member.alone and coming and len(member.tasks) < AHEAD:
        _give(member, coming.popleft())


def _give(member: Member, task: Task) -> None:
    member.tasks.append(task)
    member.send(task)


def _bury(member: Member, deaths: Counter[str], suspects: deque[Task]) -> Iterator[SlideLine]:
    """What becomes of the slides of a worker that has died."""
    tasks = member.tasks
    if len(tasks) == 1:
        deaths[tasks[0].id] += 1
    for task in tasks:
        if deaths[task.id] >= MOST_DEATHS:
            said = path_of(task.slide) or task.id
            yield failed_line(task, f"{said}: the process that predicted it died ({member.end})")
        else:
            suspects.append(dataclasses.replace(task, attempts=task.attempts + 1))
    tasks.clear()
    member.stop()

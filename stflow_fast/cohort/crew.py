"""Workers of their own memory, beside each other: which slides each gets, and what it means that one has died."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from ..errors import InputError
from .inputs import path_of
from .state import SlideLine
from .worker import Task, failed_line

AHEAD = 2
"""Slides that a worker has at a time: one is read while the other is computed."""

MOST_DEATHS = 2
"""Of workers over one slide; then it is the slide's fault."""


class Word(enum.Enum):
    """What a worker says beside the lines of slides."""

    READY = "it can be given slides"
    DEAD = "it has died"


class Member(abc.ABC):
    """A worker, and the slides that it has; ``alone``: one slide at a time, for one may kill it."""

    def __init__(self) -> None:
        self.tasks, self.ready, self.alone = deque[Task](), False, False

    @abc.abstractmethod
    def again(self: M) -> M:
        """Another one in its place."""

    @classmethod
    @abc.abstractmethod
    def wait(cls: type[M], members: Sequence[M]) -> list[M]:
        """Those that have something to be received, once there is one."""

    @abc.abstractmethod
    def send(self, task: Task) -> None:
        """A slide, which may find it dead."""

    @abc.abstractmethod
    def receive(self) -> SlideLine | InputError | Word:
        """A slide's line; or what would go wrong with every slide, or it is ready, or has died."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Whatever it is doing, and also where it has died."""

    @property
    @abc.abstractmethod
    def end(self) -> str:
        """How it died."""


M = TypeVar("M", bound=Member)


def beside_each_other(members: Sequence[M], tasks: Iterable[Task]) -> Iterator[SlideLine]:
    """The lines of slides as they come; a worker gets slides once it is ready, however late. One that dies is replaced,
    and the slides that it had are tried again, alone; a slide that workers die over twice has failed. All are stopped
    at the end.

    Raises:
        InputError: what would go wrong with every slide, or a worker that died before it was ready.
    """
    coming, suspects, deaths = deque(tasks), deque[Task](), Counter[str]()
    running = list(members)
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(lambda: [member.stop() for member in running])
        while coming or suspects or any(member.tasks for member in running):
            for member in type(running[0]).wait([each for each in running if each.tasks or not each.ready]):
                said = member.receive()
                if isinstance(said, InputError):
                    raise said
                if isinstance(said, SlideLine):
                    member.tasks = deque(task for task in member.tasks if task.id != said.slide)
                    yield said
                elif said is Word.READY:
                    member.ready = True
                else:
                    yield from _bury(member, deaths, suspects)
                    running[running.index(member)] = member.again()
                for each in running:
                    _feed(each, coming, suspects)


def _feed(member: Member, coming: deque[Task], suspects: deque[Task]) -> None:
    """As many slides as it may have."""
    if not member.ready or (member.tasks and (member.alone or suspects)):
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
    member.stop()
    if not member.ready:
        raise InputError(f"a process that predicts died before its first slide ({member.end}); see what it printed")
    if len(member.tasks) == 1:
        deaths[member.tasks[0].id] += 1
    for task in member.tasks:
        if deaths[task.id] >= MOST_DEATHS:
            said = path_of(task.slide) or task.id
            yield failed_line(task, f"{said}: the process that predicted it died ({member.end}); try it by itself")
        else:
            suspects.append(dataclasses.replace(task, attempts=task.attempts + 1))
    member.tasks.clear()

"""Runs a section: its processes at once, each in a group of its own, until they end or its limit is up; a line each.

Whatever becomes of a process (a sticky CUDA error, a hang, an end by the system) costs its section alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .plan import MINUTES, STARTING, Section

DONE, TIME_UP = "done", "the time was up"
GRACE = 5.0
"""Seconds that processes have to write what they know, before they are killed."""

POLL, WATCHED = 0.05, 3.0
"""Seconds between looks at processes, and between looks at the GPU."""

SAID = 300
"""Characters of a line that are kept."""

WORST = "worst error over limit:"
"""So begins what the GPU tests say of rounding (tests/conftest.py)."""


PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))


@dataclasses.dataclass
class Process:
    name: str
    running: subprocess.Popen[bytes]
    out: Path
    err: Path
    begun: float
    ended: float | None = None

    def has_ended(self) -> bool:
        if self.ended is None and self.running.poll() is not None:
            self.ended = time.monotonic()
        return self.ended is not None

    def signal(self, number: signal.Signals) -> None:
        """To its group: children go with it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.running.pid, number)


def run(
    section: Section, environment: dict[str, str], seconds: float, log: Path, watch: Callable[[], str]
) -> list[dict[str, Any]]:
    """Fields of a line for each of its processes, within ``seconds``; what they said goes to the end of ``log``, and
    what ``watch`` said last, while they ran, into their lines."""
    processes: list[Process] = []
    lines: list[dict[str, Any]] = []
    watched = ""
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, command in section.commands.items():
                if program := shutil.which(command[0], path=PATH):
                    said = Path(folder) / str(len(processes))
                    settings = {**os.environ, **environment, **section.environment, "PYTHONUNBUFFERED": "1"}
                    processes.append(_start(name, (program, *_timed(command[1:], seconds)), settings, said))
                else:
                    lines.append({"part": name, "outcome": f"cannot run: {command[0]} is not installed"})
            while not _have_ended(processes, min(deadline, time.monotonic() + WATCHED)) and time.monotonic() < deadline:
                watched = watch() or watched
            late = [process for process in processes if not process.has_ended()]
        finally:  # also where this program is interrupted
            _stop(processes)
        lines += [_told(section, process, process in late, seconds, log) for process in processes]
    usual = {"section": section.name, "said": "", "worst": [], "seconds": 0.0, "clocks": watched}
    return [{**usual, **line} for line in lines]


def _timed(arguments: tuple[str, ...], seconds: float) -> list[str]:
    """With the minutes that there are for it."""
    minutes = f"{max(1.0, seconds - STARTING) / 60:.2f}"
    return [minutes if argument == MINUTES else argument for argument in arguments]


def _start(name: str, command: tuple[str, ...], environment: dict[str, str], said: Path) -> Process:
    """Its words go to files: a pipe that a grandchild holds would never end. A group of its own, but no session: what
    ends the caller's ends it too."""
    paths = said.with_suffix(".out"), said.with_suffix(".err")
    with paths[0].open("w") as out, paths[1].open("w") as err:
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        running = subprocess.Popen(command, env=environment, preexec_fn=os.setpgrp, **pipes)
    return Process(name, running, *paths, time.monotonic())


def _have_ended(processes: list[Process], deadline: float) -> bool:
    """All of them, until then."""
    while not (ended := all([process.has_ended() for process in processes])) and time.monotonic() < deadline:
        time.sleep(POLL)
    return ended


def _stop(processes: list[Process]) -> None:
    """What still runs may write what it knows, then all groups are ended."""
    for process in processes:
        if not process.has_ended():
            process.signal(signal.SIGINT)
    _have_ended(processes, time.monotonic() + GRACE)
    for process in processes:
        process.signal(signal.SIGKILL)
    _have_ended(processes, time.monotonic() + GRACE)  # the driver may hold one for ever


def _told(section: Section, process: Process, late: bool, seconds: float, log: Path) -> dict[str, Any]:
    out, err = (path.read_text(errors="replace") for path in (process.out, process.err))
    command: Any = process.running.args
    with log.open("a") as file:
        file.write(f"==== {section.name} {process.name}: {' '.join(command)}\n{out}{err}\n")
    outcome = _outcome(section, None if late else process.running.returncode, seconds)
    said = _last(out) if outcome == DONE else _last(err) or _last(out)
    worst = [line.removeprefix(WORST).strip() for line in out.splitlines() if line.startswith(WORST)]
    took = (process.ended or time.monotonic()) - process.begun
    return {"part": process.name, "outcome": outcome, "said": said, "worst": worst, "seconds": round(took, 1)}


def _outcome(section: Section, code: int | None, seconds: float) -> str:
    """Of an exit code; of none, it had no end. What lacks figures, and had less than its time, lacks them for that."""
    if code == 0:
        return DONE
    if seconds < section.seconds and code in (None, 1):
        return TIME_UP
    if code is None:
        return f"no end within {seconds:.0f} s"
    if code > 0:
        return f"exit {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + (", as the system does where memory is out" if name == "SIGKILL" else "")


def _last(text: str) -> str:
    """Of its lines that say something; without what moves a cursor and colours."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    return next((line.strip()[:SAID] for line in reversed(lines) if re.search(r"\w", line)), "")

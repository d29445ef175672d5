"""Runs a section: its processes at once, each in a group of its own, until they end or its limit is up; a line each.

Whatever becomes of a process (a sticky CUDA error, a hang, an end by the system) costs its section alone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from .plan import Section

DONE, TIME_UP = "done", "the time was up"
GRACE = 5.0
"""Seconds that a process has to write what it knows, before it is killed."""

SAID = 300
"""Characters of a line that are kept."""

WORST = "worst error over limit:"
"""So begins what the GPU tests say of rounding (tests/conftest.py)."""


class Process(NamedTuple):
    name: str
    running: subprocess.Popen
    out: Path
    err: Path
    begun: float


def run(section: Section, environment: dict[str, str], seconds: float, log: Path) -> list[dict[str, Any]]:
    """Fields of a line for each of its processes, within ``seconds``; what they said goes to the end of ``log``."""
    processes, lines = [], []
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, command in section.commands.items():
                if shutil.which(command[0]) is None:
                    lines.append({"part": name, "outcome": f"cannot run: {command[0]} is not installed"})
                else:
                    said = Path(folder) / str(len(processes))
                    processes.append(_start(name, command, {**environment, **section.environment}, said))
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.running.wait(max(0.0, deadline - time.monotonic()))
        finally:  # also where this program is interrupted
            lines += [_end(section, process, seconds, log) for process in processes]
    return [{"section": section.name, "said": "", "worst": [], "seconds": 0.0, **line} for line in lines]


def _start(name: str, command: tuple[str, ...], environment: dict[str, str], said: Path) -> Process:
    """In files: a pipe that a grandchild holds would never end."""
    settings = {**os.environ, **environment, "PYTHONUNBUFFERED": "1"}
    paths = said.with_suffix(".out"), said.with_suffix(".err")
    with paths[0].open("w") as out, paths[1].open("w") as err:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err}
        running = subprocess.Popen(command, env=settings, start_new_session=True, **pipes)
    return Process(name, running, *paths, time.monotonic())


def _end(section: Section, process: Process, seconds: float, log: Path) -> dict[str, Any]:
    """What became of it, ended if it still runs, and its children in any case."""
    late = process.running.poll() is None
    took = time.monotonic() - process.begun
    if late:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.running.wait(GRACE)
    _signal(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it for ever
        process.running.wait(GRACE)
    out, err = (path.read_text(errors="replace") for path in (process.out, process.err))
    with log.open("a") as file:
        file.write(f"==== {section.name} {process.name}: {' '.join(process.running.args)}\n{out}{err}\n")
    outcome = _late(section, seconds) if late else _outcome(process.running.returncode)
    said = _last(out) if outcome == DONE else _last(err) or _last(out)
    worst = [line.removeprefix(WORST).strip() for line in out.splitlines() if line.startswith(WORST)]
    return {"part": process.name, "outcome": outcome, "said": said, "worst": worst, "seconds": round(took, 1)}


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.running.pid, number)


def _late(section: Section, seconds: float) -> str:
    return TIME_UP if seconds < section.seconds else f"no end within {seconds:.0f} s"


def _outcome(code: int) -> str:
    if code == 0:
        return DONE
    if code > 0:
        return f"exit {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + (", as the system does where memory is out" if name == "SIGKILL" else "")


def _last(text: str) -> str:
    """Of its lines that say something; without what moves a cursor and colours."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    return next((line.strip()[:SAID] for line in reversed(lines) if re.search(r"\w", line)), "")

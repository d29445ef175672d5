"""Every figure that matters from a GPU, in the order of its worth, within some minutes; see benchmarks/gpu/README.md.

    python -m benchmarks gpu --out DIR [--minutes 7] [--only NAME] [--again]
    python -m benchmarks gpu --out DIR --rehearse     the same plan on one tiny slide, interpreted on the CPU

What is measured goes to DIR/<device>.jsonl, what became of each section to DIR/<device>-sections.jsonl, as it comes,
and the page DIR/<device>.md is drawn from both after each section. Another call goes on where one ended: sections that
were done are left out, those never begun come first. The exit code is 0 where all is done, 1 where a section is not
(one with a red check is not), 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stflow_fast.kernels.versions import why_not_interpreted

from stflow_fast.errors import InputError, OutputError
from stflow_fast.files import atomic_path

from ..command import REHEARSAL, appending
from ..pages.lines import newest, read
from ..suite.measure import commit, file_name, versions
from . import BEGUN, page
from .cached import CACHE, SHARED
from .plan import Section, plan
from .sections import DONE, TIME_UP, run

INTERPRETED = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}

LEAST_SECONDS = 40
"""No section begins with less: torch is imported in some of them, and CUDA started."""

ALWAYS = "kernels compiled"
"""In every call: another machine's folder is empty."""


def nvidia_smi(query: str) -> str:
    """What it says of the first GPU; nothing where it is absent or hangs."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.partition("\n")[0].strip()


def clocks() -> str:
    """Of the GPU, and what it draws."""
    return nvidia_smi("clocks.sm,temperature.gpu,power.draw")


class Records:
    """The lines of sections that a folder holds, and those that come; the page of them and the whole plan."""

    def __init__(self, out: Path, device: str, sections: list[Section]) -> None:
        self.parts = parts_of(sections)
        self.path = out / f"{file_name(device)}-sections.jsonl"
        self.figures, self.page = out / f"{file_name(device)}.jsonl", out / f"{file_name(device)}.md"
        self.log = out / f"{file_name(device)}.log"
        self.lines = _whole_lines(self.path)
        self.common = {"device": device, "driver": nvidia_smi("driver_version"), "versions": versions()}
        self.common["commit"] = commit()

    def add(self, lines: list[dict[str, Any]]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with appending(self.path) as write:
            for line in lines:
                self.lines.append({**line, "date": now, **self.common})
                write(self.lines[-1])

    def newest(self) -> dict[page.Part, dict[str, Any]]:
        """By section and part, in the order of their first lines."""
        return {(line["section"], line["part"]): line for line in self.lines}

    def left(self, sections: list[Section], again: bool) -> list[Section]:
        """What this call is to do: all but what is done, and first of that what was never begun."""
        if again:
            return sections
        known = {key: line["outcome"] == DONE for key, line in self.newest().items() if line["outcome"] != TIME_UP}
        found = []
        for section in sections:
            parts = {
                name: command
                for name, command in section.commands.items()
                if section.name == ALWAYS or not known.get((section.name, name))
            }
            found += [section._replace(commands=parts)] if parts else []

        def begun(section: Section) -> bool:
            return section.name != ALWAYS and all((section.name, name) in known for name in section.commands)

        return sorted(found, key=begun)

    def draw(self) -> str:
        figures = newest(read(self.figures)) if self.figures.exists() else []
        text = page.drawn(self.common, self.newest(), self.parts, figures)
        with atomic_path(self.page) as temporary:
            temporary.write_text(text)
        return text

    def try_to_draw(self) -> str:
        """No page is worth the sections that are still to come; the lines are there."""
        try:
            return self.draw()
        except Exception:
            traceback.print_exc()
            return ""


def parts_of(sections: list[Section]) -> list[page.Part]:
    return [(section.name, part) for section in sections for part in section.commands]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What an interruption cut off is no line: its section is run again."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def environment(rehearse: bool) -> dict[str, str]:
    """Of every process: where compiled kernels lie, or that they are interpreted; where golden files travelled to."""
    shared = {"STFLOW_SHARED": str(SHARED)} if SHARED.exists() else {}
    return {**(INTERPRETED if rehearse else {"TRITON_CACHE_DIR": str(CACHE)}), **shared}


def measure(records: Records, sections: list[Section], arguments: argparse.Namespace) -> None:
    """What is left of the sections, until all is done or the time is up."""
    deadline = BEGUN + 60 * arguments.minutes
    for section in records.left(sections, arguments.again):
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"no time left for {section.name} and what follows", flush=True)
            return
        print(f"{left:5.0f} s left: {section.name}", flush=True)
        lines = run(section, environment(arguments.rehearse), min(section.seconds, left), records.log, clocks)
        records.add(lines)
        for line in lines:
            print(f"        {line['part']} {line['outcome']}, {line['seconds']} s: {line['said']}", flush=True)
        records.try_to_draw()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0, help="for all; then the page is drawn")
    parser.add_argument("--only", action="append", help="a section by its name; may be given several times")
    parser.add_argument("--again", action="store_true", help="also what was done")
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


def main() -> int:
    arguments = parsed()
    device = REHEARSAL if arguments.rehearse else nvidia_smi("name")
    sections = plan(arguments.out, arguments.rehearse)
    names = [section.name for section in sections]
    only = {ALWAYS, *(arguments.only or names)}
    wanted = [section for section in sections if section.name in only]
    try:
        if not device:
            raise InputError("nvidia-smi names no GPU; --rehearse runs the same plan on the CPU")
        if unknown := set(arguments.only or ()).difference(names):
            raise InputError(f"--only: there is no section {unknown.pop()!r}; choose from {'; '.join(names)}")
        records = Records(arguments.out, device, sections)
        records.draw()  # what cannot be read, or written, is told before anything is measured
    except (InputError, OutputError) as error:
        print(f"benchmarks gpu: {error}", file=sys.stderr)
        return 2
    if arguments.rehearse and (lacks := why_not_interpreted()):
        print(f"benchmarks gpu: kernels are not rehearsed, the rest is. {lacks}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure(records, wanted, arguments)
    except KeyboardInterrupt:
        print("interrupted; what was measured is kept", flush=True)
    told, _, _ = records.try_to_draw().partition(page.FIGURES)
    print(f"{told}{records.page}", flush=True)
    return int(page.lacking(records.newest(), parts_of(wanted)))


if __name__ == "__main__":
    sys.exit(main())

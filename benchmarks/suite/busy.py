"""Other busy processes, beside which something is timed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

COUNT = """
import os, signal, sys, threading

def end_with_who_started_us():
    sys.stdin.buffer.read()
    os._exit(0)

signal.signal(signal.SIGINT, signal.SIG_IGN)
os.nice(int(sys.argv[1]))
threading.Thread(target=end_with_who_started_us, daemon=True).start()
print(flush=True)
while True:
    pass
"""
"""A loop that needs a core and no memory. It ends with its standard input, which the system closes when the process
that holds the other end is gone, however it ended. Ctrl-C is for that process alone. Both are in one session, since
Linux may weigh niceness within a session only.
"""


@contextlib.contextmanager
def busy_processes(number: int, niceness: int = 0) -> Iterator[None]:
    """Inside, so many processes count, each as ``nice`` as that; when it is entered, all have begun.

    Raises:
        ChildProcessError: one of them was ended meanwhile by somebody else, and what was timed was not beside all.
    """
    command = [sys.executable, "-I", "-S", "-c", COUNT, str(niceness)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(number):
            process = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
        if any(process.poll() is not None for process in started):
            raise ChildProcessError("a busy process was ended while something was timed beside it")


def beside(busy: int, niceness: int) -> str:
    """What a time was measured beside."""
    which = f" of nice {niceness}" if niceness else ""
    return f"beside {busy} busy {'process' if busy == 1 else 'processes'}{which}"

"""What every benchmark measures with: clocks, peaks of memory, precision, errors, and where a figure comes from."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import stflow_fast

NETWORK_TOLERANCE = {"bf16": 5e-2, "tf32": 2e-2, "ieee": 1e-3}
"""Of a network's samples; the published code in float32 loses digits on the axes of nearly round neighbourhoods."""

GRADIENT_TOLERANCE = NETWORK_TOLERANCE | {"bf16": 0.11}
"""Of its gradients, for which plain torch in bf16 is 0.056 off on the check's slide, and the kernels 0.055: twice."""

STATUS = Path("/proc/self/status")
UNKNOWN = "unknown"
WITH_CHANGES = " with changes"
"""Behind a commit whose code is not what was measured."""

CODE = (":/*.py", ":/*.csv", ":(top,exclude)tests", ":(top,exclude)benchmarks/pages")
"""Git's names of what makes a figure: not what checks the code, or shows figures."""

EXIT_SECONDS = 5
"""For a process that has answered to end by itself."""

L2_FLUSH_BYTES = 2**28
"""More than the L2 cache of any GPU."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().to(expected.device).double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    """All of them in one vector, by name; without dropout, whose masks are each implementation's own."""
    model.eval()
    named = dict(sorted(model.named_parameters()))
    found = torch.autograd.grad(loss(), tuple(named.values()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def adam_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    model.train()

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def clocked(function: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The result, and wall-clock seconds until the device is done."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begun = time.perf_counter()
    result = function()
    synchronize()
    return result, time.perf_counter() - begun


def times_of(milliseconds: list[float]) -> list[float]:
    """Median, 20th and 80th percentile."""
    return [float(value) for value in np.quantile(milliseconds, [0.5, 0.2, 0.8])]


def event_ms(function: Callable[[], Any]) -> float:
    """Milliseconds between CUDA events around a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _is_of_gpu(event: Any) -> bool:
    kind = torch.autograd.DeviceType  # type: ignore[attr-defined]  # public, but torch does not list it
    return bool(event.device_type == kind.CUDA)


MOST_COSTLY = 12
"""Kernels that a profile names."""


def device_profile(function: Callable[[], Any]) -> dict[str, Any]:
    """Fields of a line: what the GPU did in one call, by its own clock, in all and by kernel; empty where its profiler
    does not run, which must not cost the times that were taken before."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            function()
            torch.cuda.synchronize()
        found = [event for event in profiled.key_averages() if _is_of_gpu(event)]
    except Exception:
        return {}
    costly = sorted(found, key=lambda event: event.self_device_time_total, reverse=True)
    kernels = [[event.key[:80], event.count, event.self_device_time_total / 1e3] for event in costly[:MOST_COSTLY]]
    total = sum(event.self_device_time_total for event in found) / 1e3
    return {"device_ms": total, "device_kernels": kernels} if found else {}


def flush_l2(device: torch.device) -> None:
    torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device).fill_(1)


def peak(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes allocated at the highest of one call, above what was allocated before. CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextlib.contextmanager
def device_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields what tells afterwards the most memory that the device itself said was in use meanwhile, by anybody, above
    what it said at the beginning; None where it does not answer. It is asked every millisecond."""
    used = _memory_in_use(device)
    if used is None:
        yield lambda: None
        return
    seen, done = [used()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(used())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: max(seen) - seen[0]
    finally:
        done.set()
        watcher.join()
        seen.append(used())


def _memory_in_use(device: torch.device) -> Callable[[], int] | None:
    """What asks the driver for the bytes; None where it does not answer, or pynvml is not installed, as where the
    package came without its dependencies (``make gpu``)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetMemoryInfo(handle).used


def lacked_memory(error: BaseException) -> bool:
    """Whether it says that memory is out, on a GPU or on the host."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in said


def resident_bytes(field: str) -> int:
    """``VmRSS`` (now), ``VmHWM`` (peak) or another size of this process; 0 without /proc. Not getrusage: its peak is
    inherited from the process that started us."""
    if not STATUS.exists():
        return 0
    return int(re.findall(rf"{field}:\s+(\d+) kB", STATUS.read_text())[0]) * 1024


def resident_peak(function: Callable[[], Any]) -> int:
    """Bytes resident at the highest of one call, above what was resident before. Linux; in a process of its own (see
    :func:`in_own_process`), where what was freed before is given back first: the call must not find it at hand."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    function()
    return max(0, resident_bytes("VmHWM") - before)


@contextlib.contextmanager
def limited(memory: int) -> Iterator[None]:
    """Allocations of this process beyond so many more bytes fail, instead of the machine. Linux."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    # A file's size is 64 bits with a sign, and so is a limit.
    wanted = min(resident_bytes("VmData") + memory, 2**63 - 1)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # On Ctrl-C the process that waits for the answer says so.
    with contextlib.suppress(KeyboardInterrupt):
        pipe.send(function(*arguments))


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns in a new process; None where that process died, as the kernel's out-of-memory
    killer makes it.

    Forked from a server that has imported torch and done nothing else, which takes a second once. In it, whatever
    large is freed goes back to the system at once, so that the next peak is seen.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    try:
        process.start()
        theirs.close()
        answer = ours.recv()
        process.join(EXIT_SECONDS)  # what was compiled there has semaphores to hand back
        return answer
    except EOFError:
        return None
    finally:
        if before is None:
            del os.environ["MALLOC_MMAP_THRESHOLD_"]
        else:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before
        process.kill()
        process.join()
        ours.close()


def free_memory(device: torch.device) -> int:
    """Bytes that are free now, of the device or of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, IndexError):
        return int(re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matrix_products(precision: str) -> Iterator[None]:
    """How float32 multiplies."""
    torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        name = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[0]
    return f"{name}, {os.cpu_count()} cores"


def file_name(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def commit() -> str:
    """What the environment says; else of the checkout that this file is tracked in, and whether its code has changed
    since, the launch table with it. Results may have changed: they do while they are written."""
    if named := os.environ.get("COMMIT"):  # where files were copied over another checkout
        return named
    here = Path(__file__)

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    if not shutil.which("git") or not git("ls-files", here.name):
        return UNKNOWN
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return git("rev-parse", "--short=12", "HEAD") + (WITH_CHANGES if changed else "")


def same_code(before: str) -> bool:
    """Whether a line of commit ``before`` was measured by the code that is checked out, with no changes since."""
    now = commit()
    if not all(re.fullmatch(r"[0-9a-f]+", name) for name in (before, now)):  # unknown, or with changes
        return False
    if now == before or not shutil.which("git"):
        return now == before
    command = ["git", "diff", "--quiet", before, now, "--", *CODE]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=False).returncode == 0


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return {**found, "stflow_fast": stflow_fast.__version__}


def provenance(device: torch.device) -> dict[str, Any]:
    """What every figure of a run has in common."""
    return {
        "device": device_name(device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

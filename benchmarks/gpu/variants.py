"""Compiles what the plan launches, without a GPU: launches of its jobs go through Triton's own binder to the compiler.

python -m benchmarks.gpu.variants --arch 90 [--share 0/4] [--wheel DIR]

fills the cache of TRITON_CACHE_DIR. The last line of what is printed is JSON: ``variants`` that are launched, of which
``kernels``, the ``share`` of them that this process took (every fourth, from the first on), ``compiled``, which were in
no cache, and the ``key`` of Triton, which is part of every entry's name. With ``--wheel`` it is that of an unpacked
wheel of the same version: of another Python.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from stflow_fast.kernels import autotune, autotune_cases, launch, modules, neighbors
from triton.backends.compiler import GPUTarget
from triton.runtime import cache, driver

from stflow_fast.ops import backend

from ..suite.cases import Case, Plan
from ..suite.jobs import NetworkJob, job_of, providers_of
from ..suite.workload import N_GENES
from .plan import ALL_FIGURES, TUNED, TUNED_COLUMNS, Figures

SPOTS = 72
"""No kernel is compiled for a number of spots."""


class AbsentGPU:
    """What Triton asks its driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class Variants:
    """Those that were launched, and which of them this process compiles."""

    def __init__(self, index: int, processes: int) -> None:
        self.index, self.processes = index, processes
        self.seen: dict[tuple[str, str], bool] = {}
        self.compiled = 0

    def mine(self, kernel: triton.JITFunction, key: str) -> bool:
        """Every so manieth, in the order of their first launch, which is the same in all processes."""
        return self.seen.setdefault((kernel.__name__, key), len(self.seen) % self.processes == self.index)

    def count(self, *, cache_hit: bool, **_: Any) -> None:
        """Triton's listener."""
        self.compiled += not cache_hit


Launched = Callable[[triton.JITFunction, Any], None]
"""Gets a kernel and what was compiled, which is None of another process's."""


@contextlib.contextmanager
def absent_gpu(arch: int, variants: Variants, launched: Launched = lambda *_: None) -> Iterator[None]:
    """Tensors of the CPU pass for those of a GPU, and a launch ends when its kernel is compiled: nothing is computed.
    Triton's driver stays the absent one: for a process of its own."""
    compile_kernel = triton.JITFunction._do_compile

    def launcher(kernel: triton.JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_only(*arguments: Any, **options: Any) -> None:
            launched(kernel, kernel.warmup(*arguments, grid=grid, **options))
            if kernel is neighbors.nearest_kernel:
                dict(zip(kernel.arg_names, arguments, strict=False))["settled_ptr"].fill_(1)

        return compile_only

    def compile_mine(kernel: triton.JITFunction, key: str, *rest: Any, **options: Any) -> Any:
        return compile_kernel(kernel, key, *rest, **options) if variants.mine(kernel, key) else None

    driver.set_active(AbsentGPU(arch))
    with contextlib.ExitStack() as patches:
        for module in modules():
            if hasattr(module, "check_device"):
                patches.enter_context(mock.patch.object(module, "check_device"))
            if hasattr(module, "architecture"):
                patches.enter_context(mock.patch.object(module, "architecture", return_value=arch))
        patches.enter_context(mock.patch.object(neighbors, "_check"))
        patches.enter_context(mock.patch.object(backend, "why_not_triton", return_value=None))
        # No hook of Triton's: before it calls one, it writes constants as JSON, and a NamedTuple is none.
        patches.enter_context(mock.patch.object(triton.JITFunction, "_do_compile", compile_mine))
        patches.enter_context(mock.patch.object(triton.JITFunction, "__getitem__", launcher))
        yield


def launch_figures(figures: Figures) -> None:
    """Every job of ours as the suite calls it: the check's result, and what is timed."""
    plan = Plan(torch.device("cpu"), 2**40)
    names = [name for name in figures.providers.split(",") if name.startswith("triton")]
    for workload, dtype, name in itertools.product(figures.workload.split(","), figures.dtype.split(","), names):
        if name in providers_of(workload):
            job = job_of(plan, Case(workload, "visium", SPOTS, 8, N_GENES, dtype), name)
            job.prepare(SPOTS, "visium")
            job.call(0)
            if isinstance(job, NetworkJob):  # of the others it is the reference's
                job.result()


def launch_tuned() -> None:
    """All tiles that autotune tries."""
    numbers = autotune_cases.Numbers(SPOTS, torch.device("cpu"))
    for precision, kernels in TUNED.items():
        for case in autotune_cases.cases(kernels.split(","), [precision], [TUNED_COLUMNS]):
            row = launch.find_row(launch.TABLE, case.kernel, 90, precision, case.columns)
            with autotune.multiplying(precision):
                run = autotune_cases.RUNS[case.kernel](case, numbers)
                for tried in autotune.candidates(case, row.launch):
                    with launch.use_launch(case.kernel, tried):
                        run()


def triton_key(wheel: Path | None) -> str:
    """Of this Triton, or of an unpacked wheel: its own function, which reads the files beside its own."""
    if wheel is None:
        return str(cache.triton_key())
    with mock.patch.object(cache, "__file__", str(wheel / "triton" / "runtime" / "cache.py")):
        return str(cache.triton_key.__wrapped__())


def digest(key: str) -> str:
    """Short enough for a manifest."""
    return hashlib.sha256(key.encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--share", default="0/1", help="which of how many processes this is")
    parser.add_argument("--wheel", type=Path, help="an unpacked wheel of this very version of Triton")
    arguments = parser.parse_args()
    variants = Variants(*map(int, arguments.share.split("/")))
    key = triton_key(arguments.wheel)
    triton.knobs.compilation.listener = variants.count
    with absent_gpu(arguments.arch, variants), mock.patch.object(cache, "triton_key", return_value=key):
        for _, figures in ALL_FIGURES.values():
            launch_figures(figures)
        launch_tuned()
    said = {"variants": len(variants.seen), "kernels": sorted({name for name, _ in variants.seen})}
    said |= {"share": sum(variants.seen.values()), "compiled": variants.compiled, "key": digest(key)}
    print(json.dumps(said))


if __name__ == "__main__":
    main()

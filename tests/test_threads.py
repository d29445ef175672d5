"""Threads that take blocks in turn: what they compute, what they leave behind, and what ends them."""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from stflow_fast.config import DenoiserConfig
from stflow_fast.model import Denoiser
from stflow_fast.sampling import Sampler
from stflow_fast.threads import ahead, blocks_of, in_turn, spread, thread_count

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stflow-fast")]


def test_every_block_is_taken_once_by_threads_of_one_intra_op_thread() -> None:
    taken, names, together = [], set(), threading.Barrier(3)

    def task(block: int) -> None:
        if block < 3:
            together.wait(timeout=30)  # three threads at once, or this fails
        taken.append(block)
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1

    in_turn(task, range(20), CPU)
    assert sorted(taken) == list(range(20))
    assert len(names) == 3


def test_nothing_is_left_behind() -> None:
    in_turn(lambda block: None, range(9), CPU)
    assert torch.get_num_threads() == 3
    assert not ours()
    with spread(CPU):
        assert torch.get_num_threads() == 1
        assert thread_count() == 3
        in_turn(lambda block: None, range(9), CPU)
        assert len(ours()) == 2
    assert not ours()
    assert torch.get_num_threads() == thread_count() == 3
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    with spread(CPU):
        other.start()
        other.join()
    assert seen == [3]  # a thread of the caller's that begins meanwhile is not held to one


def test_one_thread_stays_in_the_callers() -> None:
    torch.set_num_threads(1)
    names = set()
    in_turn(lambda block: names.add(threading.current_thread().name), range(5), CPU)
    assert names == {threading.current_thread().name}


def test_what_a_task_calls_stays_in_its_thread() -> None:
    def task(block: int) -> None:
        here, inner = threading.get_ident(), []
        in_turn(lambda _: inner.append(threading.get_ident()), range(4), CPU)
        assert inner == [here] * 4

    in_turn(task, range(6), CPU)


def test_results_are_received_in_order() -> None:
    received = []

    def task(block: int) -> int:
        time.sleep(0.02 if block % 3 == 0 else 0.0)
        return block

    in_turn(task, range(12), CPU, received.append)
    assert received == list(range(12))


@pytest.mark.parametrize("where", ["caller", "helper"])
def test_an_error_is_raised_in_the_caller_and_stops_the_others(where: str) -> None:
    begun, main = [], threading.get_ident()

    def task(block: int) -> None:
        begun.append(block)
        time.sleep(0.01)
        if (threading.get_ident() == main) == (where == "caller"):
            raise ValueError(f"block {block}")

    with pytest.raises(ValueError, match="block"):
        in_turn(task, range(1000), CPU)
    assert len(begun) < 20
    assert not ours()
    assert torch.get_num_threads() == 3


def test_the_callers_circumstances_hold_in_every_thread() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    variable.set("set")
    seen, together = [], threading.Barrier(3)

    def task(block: int) -> None:
        together.wait(timeout=30)
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.append((variable.get(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(), product.dtype))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        in_turn(task, range(3), CPU)
    with torch.inference_mode():
        in_turn(task, range(3), CPU)
    in_turn(task, range(3), CPU)
    assert seen[:3] == [("set", False, False, torch.bfloat16)] * 3
    assert seen[3:6] == [("set", False, True, torch.float32)] * 3
    assert seen[6:] == [("set", True, False, torch.float32)] * 3


def model_and_slide() -> tuple[Denoiser, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = DenoiserConfig(n_genes=7, feature_dim=9, hidden_dim=32, pairwise_hidden_dim=32, n_layers=2)
    return Denoiser(config).eval(), torch.randn(2500, 9), 1000 * torch.rand(2500, 2)


def step(model: Denoiser, features: torch.Tensor, coords: torch.Tensor) -> list[torch.Tensor]:
    """Prediction and gradients of a training step with dropout, as :func:`stflow_fast.fit` runs it."""
    model.train().zero_grad()
    with spread(CPU):
        graph = model.build_graph(coords)
        image = model.image_transform(graph.to_rows(features))
        x_t = torch.linspace(0, 1, 2500 * 7).view(2500, 7)
        predicted = model.denoise(graph, x_t, image, torch.tensor([0.3]), slide_seed=torch.tensor([5]))
        predicted.square().mean().backward()
    return [predicted.detach(), *(p.grad.clone() for p in model.parameters())]


def test_the_number_of_threads_changes_no_bit() -> None:
    model, features, coords = model_and_slide()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sample = Sampler(model).prepare((features, coords)).draw(seed=3).expression
        found.append([sample, *step(model, features, coords)])
        model.eval()
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_counter_of_operations_sees_all_of_them() -> None:
    """A dispatch mode belongs to its thread, so under one nothing is handed to others."""
    model, features, coords = model_and_slide()
    counts = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        prepared = Sampler(model).prepare((features, coords))
        with Counter() as counter:
            prepared.draw()
        counts.append(counter.products)
    assert counts[0] == counts[1] > 0


class Counter(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


def test_hooks_on_saved_tensors_see_all_of_them() -> None:
    """They belong to their thread as well; checkpointing is made of them."""
    model, features, coords = model_and_slide()
    features, coords = features[:1100], coords[:1100]  # of two blocks
    gradients = []
    for checkpointed in (False, True):
        x = torch.full((1, 1100, 7), 0.3, requires_grad=True)

        def loss(x: torch.Tensor) -> torch.Tensor:
            return model.inference(x, features[None], coords[None], torch.tensor([0.4])).square().sum()

        value = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False) if checkpointed else loss(x)
        gradients.append(torch.autograd.grad(value, x)[0])
    torch.testing.assert_close(*gradients)


def test_a_thread_that_cannot_start_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("stflow-fast") and started:
            raise RuntimeError("can't start new thread")
        started.extend([thread] if thread.name.startswith("stflow-fast") else [])
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        in_turn(lambda block: None, range(9), CPU)
    assert torch.get_num_threads() == 3
    assert not ours()


def start_forked(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run a function in a forked process; returns what waits for its result."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=lambda: results.put(function()))
    child.start()

    def result() -> Any:
        child.join(timeout=60)
        if child.is_alive():
            child.kill()
            pytest.fail("the forked process hangs")
        assert child.exitcode == 0
        return results.get()

    return result


def taken_in_turn() -> list[int]:
    taken = []
    in_turn(taken.append, range(9), CPU)
    return sorted(taken)


def sum_of_a_sample(threads: int) -> float:
    model, features, coords = model_and_slide()
    torch.set_num_threads(threads)
    return Sampler(model).prepare((features, coords)).draw(seed=3).expression.sum().item()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_process_forked_amid_the_work_has_no_threads_to_wait_for() -> None:
    with spread(CPU):
        in_turn(lambda block: None, range(9), CPU)
        result = start_forked(taken_in_turn)
    assert result() == list(range(9))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists threads as Linux does")
def test_a_fork_finds_no_thread_that_is_still_leaving() -> None:
    """Such a thread holds locks of the libraries that it computed with, and the forked process waits for them."""
    for _ in range(30):
        before = set(os.listdir("/proc/self/task"))
        in_turn(lambda block: torch.ones(40, 40) @ torch.ones(40, 40), range(9), CPU)
        list(ahead(lambda block: torch.ones(40, 40) @ torch.ones(40, 40), range(3), CPU))
        start_forked(lambda: None)
        assert set(os.listdir("/proc/self/task")) <= before


@needs_fork
def test_a_forked_process_samples_too() -> None:
    """As a worker of a DataLoader is one, after its parent has sampled."""
    expected = sum_of_a_sample(threads=3)
    assert start_forked(lambda: sum_of_a_sample(threads=2))() == expected


class Samples(torch.utils.data.Dataset):
    """Draws of one slide, made by whoever asks for them."""

    def __init__(self, threads: int | None) -> None:
        self.threads, (self.model, *self.slide) = threads, model_and_slide()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, seed: int) -> torch.Tensor:
        if self.threads:
            torch.set_num_threads(self.threads)  # a worker has one
        return Sampler(self.model).prepare(tuple(self.slide)).draw(seed=seed).expression


@pytest.mark.parametrize("threads", [None, 2])
def test_workers_of_a_loader_sample(threads: int | None) -> None:
    samples = Samples(None)
    expected = [samples[seed] for seed in range(2)]
    loader = torch.utils.data.DataLoader(Samples(threads), batch_size=None, num_workers=2, timeout=60)
    assert all(map(torch.equal, loader, expected))


def test_an_interrupt_ends_a_sample() -> None:
    """Ctrl-C in a script: KeyboardInterrupt in the main thread, soon, with nothing left running."""
    script = textwrap.dedent(
        """
        import threading, torch
        from stflow_fast import Denoiser, DenoiserConfig, Sampler
        torch.set_num_threads(3)
        model = Denoiser(DenoiserConfig(n_genes=50, feature_dim=8)).eval()
        prepared = Sampler(model).prepare((torch.randn(4000, 8), 1000 * torch.rand(4000, 2)))
        print("begins", flush=True)
        try:
            while True:
                prepared.draw()
        except KeyboardInterrupt:
            print("interrupted", threading.active_count(), torch.get_num_threads(), flush=True)
        """
    )
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout.readline() == "begins\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()  # else it would sample for ever where the test fails
    assert (said, process.returncode) == ("interrupted 1 3\n", 0)


def test_what_is_made_ahead_comes_in_order_while_the_last_is_used() -> None:
    begun, wanted = [], threading.Event()

    def task(block: int) -> tuple[int, int]:
        begun.append(block)
        if block == 1:
            wanted.set()
        return block, torch.get_num_threads()

    with spread(CPU):
        found = ahead(task, range(5), CPU)
        first = next(found)
        assert wanted.wait(timeout=30)  # the second is made while the caller has the first
        assert [first, *found] == [(block, 1) for block in range(5)]
        assert torch.get_num_threads() == 1
    assert begun == list(range(5))
    assert torch.get_num_threads() == 3
    assert not ours()


@pytest.mark.parametrize("n", [0, 1])
def test_few_are_made_by_the_caller(n: int) -> None:
    assert list(ahead(lambda block: threading.current_thread().name, range(n), CPU)) == ["MainThread"] * n


def test_one_thread_makes_nothing_ahead() -> None:
    torch.set_num_threads(1)
    assert set(ahead(lambda block: threading.current_thread().name, range(4), CPU)) == {"MainThread"}


def test_an_error_ahead_comes_where_its_block_is_wanted() -> None:
    def task(block: int) -> int:
        if block == 2:
            raise ValueError("the second")
        return block

    found = ahead(task, range(5), CPU)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the second"):
        next(found)
    assert not ours()


def test_what_is_left_before_its_end_ends_its_thread() -> None:
    found = ahead(lambda block: block, range(5), CPU)
    next(found)
    assert ours()
    found.close()
    assert not ours()


def test_blocks_cover_the_rows() -> None:
    assert blocks_of(0, 4) == []
    assert blocks_of(9, 4) == [slice(0, 4), slice(4, 8), slice(8, 9)]

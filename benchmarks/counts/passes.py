"""What a sample and a training step move, pass by pass: every launch with its bytes, counted without a GPU.

python -m benchmarks passes

The default model runs on the CPU as it would on a GPU, in bfloat16, but for its kernels, which are noted and not run.
The tables go to benchmarks/results/roofline.md, between its own two marks; times are bytes over the rates that an H200
reached.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton.runtime.interpreter
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stflow_fast import Denoiser, DenoiserConfig, Sampler, ops
from stflow_fast.graph import SpotGraph
from stflow_fast.markdown import table
from stflow_fast.sampling import PreparedSlide

from ..pages import RESULTS
from ..suite.measure import commit
from ..suite.workload import N_GENES

MARK = "<!-- tables by python -m benchmarks passes -->"

OF_SAMPLES, OF_STEPS = (200, 400), (2_500, 3_000)
"""Spots of two runs; what differs is their spots', and the rest the weights'. With few spots a training step is largest
where the gradients of weights are."""

SIZES = (10_000, 100_000, 1_000_000)

EDGE_KERNEL = "edge_attention_fwd_kernel"
MADE = f"{EDGE_KERNEL}, messages made"

LAUNCH_MS = 2.5e-3
BYTES_PER_MS = 4.2e9
FLOPS_PER_MS = 0.77e12
EDGE_MS = {EDGE_KERNEL: 6.4e-6, MADE: 8.3e-6}
"""Of an H200 (``nvidia-h200.jsonl``, ``gpu_notes.md``): from one short kernel of a CUDA graph to the next, bytes that
are copied, bf16 products, and the edge kernel for a spot (102 ms of 16 launches on a million with kept messages; 1.69
for 1.31 ms where it makes them), which neither bytes nor products bound."""


class Pass(NamedTuple):
    """One launch: what it is called, bytes that it reads and writes, and operations of a product."""

    name: str
    bytes: float
    flops: float = 0.0

    def milliseconds(self, spots: int) -> float:
        """Of a pass whose numbers are of one spot."""
        if self.name in EDGE_MS:
            return LAUNCH_MS + EDGE_MS[self.name] * spots
        return LAUNCH_MS + spots * max(self.bytes / BYTES_PER_MS, self.flops / FLOPS_PER_MS)


MEMORY_ALONE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach")
GATHERS = ("index", "index_select")
READ_AND_WRITTEN = {"gene_head_kernel": ("total",)}


class Passes(TorchDispatchMode):
    """Notes what would be launched while it is entered, and the memory that is live.

    Attributes:
        found: the passes in turn.
        waits: how often the host waited for a number of the device.
        peak_bytes: most that was live of what was made meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it is torch's
        self.found: list[Pass] = []
        self.waits, self.peak_bytes = 0, 0
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "stflow_fast":  # whose kernels, and what is between them, are the passes
            with self:
                return function._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        made = function(*args, **kwargs)
        self._watch(made)
        self._note(function, (args, kwargs), made)
        return made

    def launched(self, kernel: triton.runtime.interpreter.InterpretedFunction, *arguments: Any, **_: Any) -> None:
        """In place of a kernel's run: what it reads and writes, each once; rows of neighbours come from a cache."""
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        again = [value for name, value in given.items() if name in READ_AND_WRITTEN.get(kernel.fn.__name__, ())]
        name = kernel.fn.__name__
        name = MADE if name == EDGE_KERNEL and not given["S"].kept else name
        self.found.append(Pass(name, sum(map(_bytes, _tensors([*arguments, *again])))))

    def _watch(self, made: Any) -> None:
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            self._live.setdefault(StorageWeakRef(storage), storage.nbytes())
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self._live.values()))

    def _note(self, function: Any, given: Any, made: Any) -> None:
        name = function.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            self.waits += 1
        elif not (function.is_view or name in MEMORY_ALONE):
            read, written = _tensors(given), _tensors(made)
            if name in GATHERS:  # of what is gathered, as much as is written
                read = [*read[1:], *written]
            products = [tensor for tensor in read if tensor.ndim == 2] if name in ("linear", "addmm", "mm") else []
            flops = 2 * written[0].numel() * products[0].shape[1] if products else 0
            self.found.append(Pass(name, sum(map(_bytes, [*read, *written])), flops))


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Once, where it is expanded."""
    spread = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return functools.reduce(int.__mul__, spread, tensor.element_size()) if tensor.numel() else 0


@contextlib.contextmanager
def counting() -> Iterator[Passes]:
    """Notes passes of this thread; kernels compute nothing, their results are whatever was in the memory."""
    passes = Passes()
    interpreted = triton.runtime.interpreter.InterpretedFunction
    with mock.patch.object(interpreted, "run", lambda kernel, *args, **rest: passes.launched(kernel, *args)), passes:
        yield passes


def prepared(spots: int, kept: int, **config: Any) -> PreparedSlide:
    """A slide of the default model with random weights, in bfloat16; ``kept`` of its layers keep messages."""
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(**{"n_genes": N_GENES, "feature_dim": 8, **config}))
    sampler = Sampler(model, precision="bf16")
    with sampler.running():
        edges, k = sampler.states.layers[0].attention.edges, model.config.n_neighbors
        sampler.memory_budget = kept * ops.message_bytes(spots, k, edges)
    coords = spots**0.5 * torch.rand(spots, 2, dtype=torch.float64)

    def by_tree(
        coords: Tensor, k: int, slide_ptr: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> SpotGraph:
        return SpotGraph.build(coords, k, slide_ptr, dtype)

    with mock.patch.object(ops, "build_graph", by_tree), counting():
        prepared: PreparedSlide = sampler.prepare((torch.randn(spots, 8), coords))
        return prepared


def passes_of_draw(slide: PreparedSlide) -> Passes:
    """Those of a sample; memory is counted without its source, which is the caller's."""
    x_0 = torch.rand(slide.graph.n_spots, slide.sampler.model.config.n_genes)
    with mock.patch("stflow_fast.sampling.sampler.to_host", lambda *made: made):
        with counting():
            slide.draw(x_0)  # casts the weights
        with counting() as passes:
            slide.draw(x_0)
    passes.peak_bytes -= _bytes(x_0)
    return passes


def held_bytes(slide: PreparedSlide) -> int:
    """Of what is made once per slide."""
    messages = [layer.messages for layer in slide.states.layers if layer.messages is not None]
    tensors = [value for value in vars(slide.graph).values() if isinstance(value, Tensor)]
    return sum(map(_bytes, [*tensors, *messages, slide.image]))


def passes_of_step(spots: int, n_genes: int) -> Passes:
    """Those of a training step with dropout, forward and backward, under autocast."""
    torch.manual_seed(0)
    model = Denoiser(DenoiserConfig(n_genes=n_genes, feature_dim=8, dropout=0.2, attn_dropout=0.2)).train()
    graph = SpotGraph.build(spots**0.5 * torch.rand(spots, 2), model.config.n_neighbors, dtype=torch.float32)
    features, x_t, x_1 = (torch.rand(spots, width) for width in (8, n_genes, n_genes))
    with counting() as passes:
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model.denoise(graph, x_t, model.image_transform(features), torch.tensor([0.5]))
        ((predicted - x_1) ** 2).mean().backward()
    return passes


class Counted(NamedTuple):
    """A sample or a training step of the default model, its bytes those of one spot.

    Attributes:
        passes: in turn.
        held: of what is made once per slide.
        live: most that is live beside it.
    """

    passes: list[Pass]
    held: float
    live: float

    @property
    def over_spots(self) -> list[Pass]:
        """Without those over weights alone."""
        return [each for each in self.passes if each.bytes > 0]

    def layer_call(self) -> list[Pass]:
        """Those of the second layer, from what its product reads to its gene head."""
        names = [each.name for each in self.passes]
        first, second, third = [i for i, name in enumerate(names) if name == "joined_norm_fwd_kernel"][:3]
        assert second - first == third - second
        return self.passes[second:third]

    def milliseconds(self, spots: int) -> float:
        return sum(each.milliseconds(spots) for each in self.passes)


def counted_sample(kept: int, **config: Any) -> Counted:
    """With the messages of ``kept`` layers kept; ``config`` of a model other than the default."""
    with ops.use_backend("triton"):
        slides = [prepared(spots, kept, **config) for spots in OF_SAMPLES]
        found, held = list(map(passes_of_draw, slides)), list(map(held_bytes, slides))
    return _of_spots(found, held, OF_SAMPLES)


def counted_step(n_genes: int = N_GENES) -> Counted:
    """A training step."""
    with ops.use_backend("triton"):
        return _of_spots([passes_of_step(spots, n_genes) for spots in OF_STEPS], [0, 0], OF_STEPS)


def _of_spots(found: list[Passes], held: list[int], spots: tuple[int, int]) -> Counted:
    def of_spot(pair: Iterable[float]) -> float:
        few, more = pair
        return (more - few) / (spots[1] - spots[0])

    passes = [
        Pass(one.name, of_spot((one.bytes, other.bytes)), of_spot((one.flops, other.flops)))
        for one, other in zip(*(each.found for each in found), strict=True)
    ]
    return Counted(passes, of_spot(held), of_spot(each.peak_bytes for each in found))


IN_A_LAYER = (
    "LayerNorm of the tokens, beside the expression",
    "product of the terms",
    "attention over the neighbours",
    "W_output: first product",
    "its gate and LayerNorm",
    "its last product",
    "added to the tokens",
    "MLP: first product",
    "its gate and LayerNorm",
    "its last product",
    "added to the tokens",
    "gene head: first product",
    "gelu, LayerNorm, last product, sum over layers",
)


def layer_table(passes: list[Pass]) -> str:
    """Of a layer-call."""
    body = [
        [what, f"`{each.name}`", f"{each.bytes:,.0f}", f"{each.flops / 1e3:,.0f}" * (each.flops > 0), _of_million(each)]
        for what, each in zip(IN_A_LAYER, passes, strict=True)
    ]
    others = [each for each in passes if each.name not in EDGE_MS]
    total = sum(each.bytes for each in others)
    body.append([f"{len(passes)} launches; all but the edge kernel", "", f"{total:,.0f}", "", _of_million(*others)])
    return table(["pass", "launch", "bytes a spot", "kFLOP a spot", "ms of 1,000,000 spots"], body)


def _of_million(*passes: Pass) -> str:
    return f"{sum(each.milliseconds(1_000_000) for each in passes):.2f}"


def sample_table(samples: dict[int, Counted]) -> str:
    """``samples`` by the number of layers that keep messages."""
    body = []
    for (kept, sample), spots in itertools.product(samples.items(), SIZES):
        size = spots * (sample.held + sample.live)
        predicted = sample.milliseconds(spots)
        body.append([f"{spots:,}", str(kept), str(len(sample.passes)), f"{predicted:.3g}", f"{size / 1e9:.2f}"])
    return table(["spots", "layers kept", "launches", "ms, predicted", "GB"], body)


def step_line(step: Counted) -> str:
    return (
        f"A training step with dropout: {len(step.passes):,} launches, {len(step.over_spots)} of them over the spots; "
        f"{sum(each.bytes for each in step.passes) / 1e3:,.0f} kB a spot, {step.live / 1e3:.1f} kB live."
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel's file is loaded
    samples = {kept: counted_sample(kept) for kept in (4, 3)}
    page = RESULTS / "roofline.md"
    before, _, after = page.read_text().split(MARK)
    tables = [
        f"By commit {commit()}; default model, {N_GENES} genes, bfloat16.",
        layer_table(samples[4].layer_call()),
        sample_table(samples),
        step_line(counted_step()),
    ]
    page.write_text(MARK.join([before, "\n\n" + "\n\n".join(tables) + "\n\n", after]))

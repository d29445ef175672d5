"""Everything that denoises a slide in the benchmarks, ours and its opponents, behind one interface: PROVIDERS.

All have the default model's widths and random weights of one seed. Callers time ``prepare`` (what is made once per
slide) apart from ``denoise``, ``sample`` and ``loss``, and ask ``why_not`` before they build anything large.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stflow_fast import DenoiserConfig, Sampler, ops
from stflow_fast.flow import EulerSolver, time_grid
from stflow_fast.graph import SpotGraph
from stflow_fast.ops.backend import cpp_compiler, use_backend, use_compile

from ..opponents.dense_attention import DenseAttention, dense_edges
from ..opponents.dot_product import Attend, DotProductDenoiser, dense_softmax, flash_attention, neighbor_attention
from ..opponents.message_passing import MessagePassingAttention, edge_list
from .networks import edge_bytes, our_network, published_network, triton_lacks
from .slides import BenchmarkSlide
from .workload import SAMPLE_STEPS

KEEP_ALL, KEEP_NONE, KEEP_DEFAULT = 2**62, 0, None
"""Bytes for edge messages kept from one flow step to the next; the default is the program's."""


OVER_BUDGET = ", over the budget"
"""In the notes of what would need too much, behind how much that is."""


def over_budget(needed: int, memory_budget: int) -> str | None:
    """One line where so many bytes are too many, or None."""
    if needed <= memory_budget:
        return None
    return f"it needs {needed / 2**30:,.1f} GiB{OVER_BUDGET} of {memory_budget / 2**30:,.1f} GiB"


def distance_bytes(n: int) -> int:
    """Of the published search for neighbours: the distances, a masked copy and its mask."""
    return 9 * n * n


class Provider(abc.ABC):
    """One way of denoising a slide. Expression goes in and comes out in the order of the slide's spots.

    The model is in evaluation mode until a caller changes that. Precision (autocast, TF32) is the caller's too.
    """

    same_function = True
    """Whether it computes the published function of K neighbours, so that the float64 reference can judge it."""

    compiles = False
    """Whether its first call compiles something."""

    compiled_by_size = False
    """Whether another number of spots is compiled anew."""

    sample_steps = SAMPLE_STEPS
    """Times of the grid of :meth:`sample`; to be changed before :meth:`prepare`."""

    model: Any
    """The network, a module with the published names."""

    def __init__(self, config: DenoiserConfig) -> None:
        """On the CPU in float32; see :meth:`to`."""
        self.config = config

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Provider:
        self.model.to(device, dtype)
        return self

    @property
    def weight(self) -> Tensor:
        """A parameter, for its device and dtype."""
        weight: Tensor = self.model.image_transform.weight
        return weight

    @abc.abstractmethod
    def prepare(self, slide: BenchmarkSlide) -> None:
        """Do what may be done once per slide. For :meth:`loss` the slide should be on the device already."""

    @abc.abstractmethod
    def denoise(self, x_t: Tensor, t: float) -> Tensor:
        """One call of the denoiser, without gradients: [N, G] -> [N, G]."""

    @abc.abstractmethod
    def loss(self, x_t: Tensor, x_1: Tensor, t: float) -> Tensor:
        """Mean squared error of the prediction from ``x_t`` against ``x_1``, both [N, G], to go backward from."""

    def sample(self, x_0: Tensor) -> Tensor:
        """The published sampling loop, by default 5 times and so 4 calls: [N, G] -> [N, G]."""
        return EulerSolver(time_grid(self.sample_steps)).solve(self.denoise, x_0)

    def why_not(self, device: torch.device | str, n: int, memory_budget: int) -> str | None:
        """One line that says why a call of the denoiser on ``n`` spots cannot run there, or None."""
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            return f"the device is {device.type}; it runs on cpu or cuda"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        return self._lacks(device, n) or over_budget(self.quadratic_bytes(n), memory_budget)

    def why_not_training(self, device: torch.device | str) -> str | None:
        """The same of :meth:`loss` and its backward, beside what :meth:`why_not` says."""
        return None

    def why_not_one_call(self) -> str | None:
        """The same of :meth:`denoise`: what it would not show."""
        return None

    def quadratic_bytes(self, n: int) -> int:
        """Peak of one float32 call above its inputs where it grows with the square of ``n``; else 0."""
        return 0

    def _lacks(self, device: torch.device, n: int) -> str | None:
        return None


class Baseline(Provider):
    """An opponent: embeds a slide's patches and makes its edges once."""

    def prepare(self, slide: BenchmarkSlide) -> None:
        self.slide = slide
        self.order: Tensor | None = None
        with torch.no_grad():
            self.edges = self._make_edges(slide.coords)
            self.image = self._rows(self._embed())

    def denoise(self, x_t: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            return self._spots(self._predict(self._rows(x_t), self.image, t))

    def sample(self, x_0: Tensor) -> Tensor:
        """In rows from its first step to its last."""
        solver = EulerSolver(time_grid(self.sample_steps))
        with torch.no_grad():
            return self._spots(solver.solve(lambda x_t, t: self._predict(x_t, self.image, t), self._rows(x_0)))

    def loss(self, x_t: Tensor, x_1: Tensor, t: float) -> Tensor:
        return F.mse_loss(self._predict(self._rows(x_t), self._rows(self._embed()), t), self._rows(x_1))

    @abc.abstractmethod
    def _make_edges(self, coords: Tensor) -> tuple[object, ...]:
        """What the layers read of the slide's positions. Where rows are in space order, ``self.order`` says so."""

    def _predict(self, x: Tensor, image: Tensor, t: float) -> Tensor:
        """[N, G] and [N, d] -> [N, G], all of them rows."""
        time = self.model.fourier_proj(torch.full((1,), t, dtype=torch.float64, device=x.device))
        return self._run(x, image + time)

    def _run(self, x: Tensor, tokens: Tensor) -> Tensor:
        out: Tensor = self.model.backbone.run_layers(x, tokens, *self.edges)
        return out

    def _embed(self) -> Tensor:
        embedded: Tensor = self.model.image_transform(self.slide.features.to(self.weight))
        return embedded

    def _rows(self, values: Tensor) -> Tensor:
        return values if self.order is None else values[self.order]

    def _spots(self, rows: Tensor) -> Tensor:
        return rows if self.order is None else torch.empty_like(rows).index_copy_(0, self.order, rows)

    def _graph(self, coords: Tensor) -> SpotGraph:
        """The graph that ours reads too; the rows are its from now on."""
        graph = ops.build_graph(coords, self.config.n_neighbors, None, self.weight.dtype, self.weight.device)
        self.order = graph.order
        return graph


class EagerSTFlow(Provider):
    """The published algorithm: patches are embedded and neighbours searched in every call."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.model = published_network(config)

    def prepare(self, slide: BenchmarkSlide) -> None:
        self.features, self.coords = slide.features.to(self.weight), slide.coords.to(self.weight)

    def denoise(self, x_t: Tensor, t: float) -> Tensor:
        with torch.no_grad():
            return self._published_call(x_t, t)

    def loss(self, x_t: Tensor, x_1: Tensor, t: float) -> Tensor:
        return F.mse_loss(self._published_call(x_t, t), x_1)

    def quadratic_bytes(self, n: int) -> int:
        """The distances; then the edges."""
        return int(max(distance_bytes(n), edge_bytes(self.config) * self.config.n_neighbors * n))

    def _lacks(self, device: torch.device, n: int) -> str | None:
        k = self.config.n_neighbors  # with fewer others, its spots are neighbours of themselves
        return f"the published code wants more than {k} spots" if n <= k else None

    def _published_call(self, x_t: Tensor, t: float) -> Tensor:
        time = torch.full((1,), t, dtype=torch.float64, device=x_t.device)
        inputs = (x_t.unsqueeze(0), self.features.unsqueeze(0), self.coords.unsqueeze(0), time)
        found: Tensor = self.model.inference(*inputs)[0]
        return found


class DenseProvider(Baseline):
    """The published network with all other spots as neighbours, which the reference computes with K = N - 1."""

    same_function = False

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.model = published_network(config, attention=DenseAttention)

    def quadratic_bytes(self, n: int) -> int:
        return edge_bytes(self.config) * n * n

    def _lacks(self, device: torch.device, n: int) -> str | None:
        return "a single spot has nobody to attend to" if n < 2 else None

    def _make_edges(self, coords: Tensor) -> tuple[Tensor, ...]:
        return (dense_edges(coords.to(self.weight)),)


class MessagePassing(Baseline):
    """The published network over an edge list. As graph libraries have it, a layer makes its edges' messages in every
    call: some 30 % of one."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__(config)
        self.model = published_network(config, attention=MessagePassingAttention)

    def _make_edges(self, coords: Tensor) -> tuple[Tensor, ...]:
        return edge_list(self._graph(coords))


class DotProduct(Baseline):
    """The network of dot products, over all spots by ``attend``."""

    same_function = False

    def __init__(self, config: DenoiserConfig, attend: Attend | None = None) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        self.attend = attend
        self.model = DotProductDenoiser(config).eval()

    def quadratic_bytes(self, n: int) -> int:
        """Scores and their softmax, where they are materialised."""
        return 8 * self.config.n_heads * n * n if self.attend is dense_softmax else 0

    def _make_edges(self, coords: Tensor) -> tuple[object, ...]:
        return (self.attend,)

    def _run(self, x: Tensor, tokens: Tensor) -> Tensor:
        out: Tensor = self.model(x, tokens, *self.edges)
        return out


class FlexAttention(DotProduct):
    """The network of dot products, over the K neighbours by FlexAttention."""

    compiles = compiled_by_size = True

    def why_not_training(self, device: torch.device | str) -> str | None:
        return "on the CPU, FlexAttention has no backward" if torch.device(device).type == "cpu" else None

    def _make_edges(self, coords: Tensor) -> tuple[object, ...]:
        return (neighbor_attention(self._graph(coords)),)

    def _lacks(self, device: torch.device, n: int) -> str | None:
        if device.type == "cuda":
            narrow = self.config.hidden_dim // self.config.n_heads < 16
            return "on a GPU, FlexAttention wants heads of at least 16 columns" if narrow else None
        if cpp_compiler() is None:
            return "there is no C++ compiler (g++ or clang++), without which FlexAttention materialises N x N"
        return None if torch.cpu._is_avx2_supported() else "on the CPU, FlexAttention needs AVX2"


class Ours(Provider):
    """stflow_fast with one of its backends."""

    def __init__(
        self, config: DenoiserConfig, backend: str, compiled: bool, memory_budget: int | None, cuda_graph: bool
    ) -> None:
        super().__init__(config)
        self.model = our_network(config)
        self.backend, self.compiled, self.cuda_graph = backend, compiled, cuda_graph
        self.compiles = compiled or backend == "triton"
        kept = {} if memory_budget is None else {"memory_budget": memory_budget}
        self.sampling: dict[str, Any] = {"cuda_graph": cuda_graph, **kept}

    def prepare(self, slide: BenchmarkSlide) -> None:
        self.slide = slide
        with self._running():
            sampler = Sampler(self.model, self.sample_steps, **self.sampling)
            self.prepared = sampler.prepare((slide.features, slide.coords))

    def denoise(self, x_t: Tensor, t: float) -> Tensor:
        with self._running():
            denoised: Tensor = self.prepared.denoise(x_t, t)
        return denoised

    def sample(self, x_0: Tensor) -> Tensor:
        with self._running():
            drawn: Tensor = self.prepared.draw(x_0).expression
        return drawn

    def why_not_training(self, device: torch.device | str) -> str | None:
        return "training is never compiled" if self.compiled else None

    def loss(self, x_t: Tensor, x_1: Tensor, t: float) -> Tensor:
        graph, to_rows = self.prepared.graph, self.prepared.graph.to_rows
        with self._running():
            image = self.model.image_transform(self.slide.features.to(self.weight))
            time = self.model.fourier_proj(torch.tensor([t], dtype=torch.float64))
            states = self.model.backbone.layer_states()
            return F.mse_loss(self.model.denoise_at(graph, to_rows(x_t), to_rows(image), time, states), to_rows(x_1))

    def why_not_one_call(self) -> str | None:
        return "a CUDA graph is of a whole sample" if self.cuda_graph else None

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        with use_backend(self.backend), use_compile("on" if self.compiled else "off"):
            yield

    def _lacks(self, device: torch.device, n: int) -> str | None:
        if self.cuda_graph and device.type != "cuda":
            return f"the device is {device.type}, and a CUDA graph needs a GPU"
        if self.backend == "triton":
            return triton_lacks(self.config, device)
        if not self.compiled:
            return None
        if device.type != "cpu":
            return f"the device is {device.type}; it compiles for the CPU"
        if n < ops.COMPILED_BLOCK:
            return f"slides below {ops.COMPILED_BLOCK} spots are not compiled"
        return None if cpp_compiler() else "there is no C++ compiler (g++ or clang++)"


def _ours(
    backend: str, compiled: bool = False, keep: int | None = KEEP_DEFAULT, cuda_graph: bool = False
) -> Callable[[DenoiserConfig], Provider]:
    return functools.partial(Ours, backend=backend, compiled=compiled, memory_budget=keep, cuda_graph=cuda_graph)


PROVIDERS: dict[str, Callable[[DenoiserConfig], Provider]] = {
    "eager_stflow": EagerSTFlow,
    "dense_attention": DenseProvider,
    "dense_softmax": functools.partial(DotProduct, attend=dense_softmax),
    "flash_attention": functools.partial(DotProduct, attend=flash_attention),
    "flex_attention": FlexAttention,
    "message_passing": MessagePassing,
    "reference": _ours("reference"),
    "reference_kept_edges": _ours("reference", keep=KEEP_ALL),
    "reference_compiled": _ours("reference", compiled=True),
    "triton": _ours("triton", keep=KEEP_NONE),
    "triton_kept_edges": _ours("triton", keep=KEEP_ALL),
    "triton_graph": _ours("triton", cuda_graph=True),
}
"""Name -> factory. Ours keep the messages of edges over the flow steps within the program's default budget, those
named for it all of them, and ``triton`` none. ``triton`` and ``triton_kept_edges`` launch kernel after kernel;
``triton_graph`` is what the program does on a GPU: it captures the loop of a sample when it is called for the second
time, and replays it from then on."""


def class_of(name: str) -> type[Provider] | None:
    """Of a name of :data:`PROVIDERS`, without what its factory sets; None of another."""
    factory: Any = PROVIDERS.get(name)
    found: type[Provider] | None = getattr(factory, "func", factory)
    return found

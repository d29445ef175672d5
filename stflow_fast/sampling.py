"""Sampling the expression of whole slides: what is made once per model, once per slide, and once per draw."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import ops
from .errors import InputError
from .flow import DEFAULT_SAMPLE_STEPS, EulerSolver, time_grid
from .graph import SpotGraph
from .model import Denoiser
from .priors import Prior, check_seed, slide_seed
from .slides import Slide

DEFAULT_MEMORY_BUDGET = 2 * 2**30
"""Bytes that sampling may spend on keeping edge messages from one flow step to the next."""

FEATURE_CHUNK = 16_384
"""Spots whose features are on the model's device at once."""


@dataclass(frozen=True)
class Sample:
    """What :func:`sample` returns.

    Attributes:
        expression: [N, G] the sampled x_1, spots in the caller's order, on the CPU.
        nfe: denoiser calls made.
        trajectory: [nfe, N, G] the target predicted by each call, if asked for.
    """

    expression: Tensor
    nfe: int
    trajectory: Tensor | None = None


def parse_bytes(size: int | str) -> int:
    """``"4GiB"``, ``"500 MB"`` or a number of bytes.

    Raises:
        InputError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(size))
    if not found:
        raise InputError(f"memory_budget: must be a size such as 4GiB or 500MB, not {size!r}")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


class Sampler:
    """A model ready to sample slides: its folded weights are made once.

    The weights must not change while the sampler is in use. Every call runs the model in evaluation mode and leaves it
    in the mode it was in.
    """

    def __init__(
        self,
        model: Denoiser,
        n_sample_steps: int | None = None,
        prior: Prior | str | None = None,
        memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
        cuda_graph: bool = True,
    ) -> None:
        """
        Args:
            model: the network.
            n_sample_steps: times S of the grid, at least 2; NFE is S - 1. When None, as the model was trained, or 5.
            prior: a Prior or its name. When None or of that name, as the model was trained, or ZINB as published.
            memory_budget: bytes that each slide may spend on keeping edge messages from one flow step to the next, or
                text such as "4GiB".
            cuda_graph: on a GPU, capture one denoiser call of a slide and replay it; False for debugging.

        Raises:
            InputError: a setting out of range.
        """
        self.model = model
        self.n_sample_steps, self.prior = resolve(model, n_sample_steps, prior)
        self.solver = EulerSolver(time_grid(self.n_sample_steps))
        self.memory_budget = parse_bytes(memory_budget)
        self.cuda_graph = cuda_graph
        # Time stays float64 until the embedding rounds it, as in the published loop. On the CPU: not every device has
        # float64.
        times = torch.tensor(self.solver.grid[:-1], dtype=torch.float64)
        with _evaluating(model):
            self.states = model.backbone.layer_states()
            self.times = dict(zip(self.solver.grid[:-1], model.fourier_proj(times).split(1), strict=True))

    def prepare(self, slide: Slide | tuple[Tensor | np.ndarray, Tensor | np.ndarray]) -> PreparedSlide:
        """Make what all draws of a slide share: neighbours, geometry, ``image_transform``, edge messages.

        Args:
            slide: a Slide, or features [N, F] and coordinates [N, 2] (a slide with the empty id). Features on the host
                stay there and are streamed to the device.

        Raises:
            InputError: features of another size than the model's, NaN or infinite features or coordinates, shapes
                that disagree.
        """
        return PreparedSlide(self, *_inputs(slide))


class PreparedSlide:
    """A slide ready for any number of draws; made by :meth:`Sampler.prepare`."""

    def __init__(self, sampler: Sampler, features: Tensor, coords: Tensor, slide_id: str) -> None:
        _check(sampler.model, features, coords, slide_id)
        self.sampler, self.slide_id = sampler, slide_id
        model = sampler.model
        with _evaluating(model):
            self.graph = graph = model.build_graph(coords)
            image = _embed(model, graph, features)
            states = model.backbone.keep_messages(sampler.states, graph, sampler.memory_budget)

        def call(x_t: Tensor, time: Tensor) -> Tensor:  # no method: a cycle would keep the memory of a slide
            return model.denoise_at(graph, x_t, image, time, states)

        self._call = _Captured(call) if image.is_cuda and sampler.cuda_graph and graph.n_spots else call

    def draw(self, x_0: Tensor | None = None, seed: int = 0, trajectory: bool = False) -> Sample:
        """One sample (the published loop: ``n_sample_steps - 1`` calls).

        Args:
            x_0: [N, G] source sample in the order of the spots; drawn from the sampler's prior when None.
            seed: with the slide's id, decides x_0.
            trajectory: return every call's prediction too.

        Raises:
            InputError: x_0 of another shape, or NaN or infinite; a negative seed.
        """
        graph, solver = self.graph, self.sampler.solver
        kept = []

        def predict(x_t: Tensor, t: float) -> Tensor:
            x_1 = self._call(x_t, self.sampler.times[t])
            if trajectory:
                kept.append(graph.to_spots(x_1).cpu())
            return x_1

        with _evaluating(self.sampler.model):
            rows = solver.solve(predict, self._source(x_0, seed))
            expression = kept[-1] if trajectory else graph.to_spots(rows).cpu()
        return Sample(expression, solver.nfe, torch.stack(kept) if trajectory else None)

    def _source(self, x_0: Tensor | None, seed: int) -> Tensor:
        """Rows of the graph [N, G] of :meth:`draw`'s x_0, on the model's device."""
        model, graph = self.sampler.model, self.graph
        check_seed(seed)
        if x_0 is None:
            drawn = self.sampler.prior.draw(graph.n_spots, model.config.n_genes, slide_seed(seed, self.slide_id))
            x_0 = torch.from_numpy(drawn)
        _check_source(x_0, (graph.n_spots, model.config.n_genes), self.slide_id)
        return graph.to_rows(x_0.to(model.image_transform.weight))


class _Captured:
    """A function of tensors as a CUDA graph: the first call runs it and captures it, later ones replay.

    Called under another backend or precision, it captures anew.

    A call of the denoiser on 10,000 spots is some hundred launches of a few microseconds each; a replay is one. One
    call is captured, not the loop of the solver: so three of four calls of a slide's only draw are replays, one graph
    serves every number of steps and their trajectory, and one prediction [N, G] is held, not one of every step. What
    stays outside are the few launches of an Euler step.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._circumstances: tuple[object, ...] = ()
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        circumstances = ops.circumstances(inputs[0].device)
        if self._graph is None or circumstances != self._circumstances:
            self._graph = None  # if this capture fails, nobody may replay the last
            with _without_autocast_cache():
                output = self._run_and_capture(inputs)
            self._circumstances = circumstances
            return output
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._output.clone()  # the next replay overwrites it

    def _run_and_capture(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The first run is on a stream of its own, as capture wants it: kernels are compiled and libraries set up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self._function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        output.record_stream(torch.cuda.current_stream())
        self._inputs, graph = tuple(map(torch.clone, inputs)), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._output = self._function(*self._inputs)
        self._graph = graph
        return output


def sample(
    model: Denoiser,
    slide: Slide | tuple[Tensor | np.ndarray, Tensor | np.ndarray],
    x_0: Tensor | None = None,
    n_sample_steps: int | None = None,
    prior: Prior | str | None = None,
    seed: int = 0,
    trajectory: bool = False,
    memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
) -> Sample:
    """Sample the expression of a whole slide in one pass: a :class:`Sampler` for one draw of one slide.

    Edge messages are kept between steps as far as ``memory_budget`` allows; the result does not depend on it beyond
    rounding.

    Args:
        model, n_sample_steps, prior, memory_budget: see :class:`Sampler`.
        slide: see :meth:`Sampler.prepare`.
        x_0, seed, trajectory: see :meth:`PreparedSlide.draw`.

    Raises:
        InputError: features of another size than the model's, NaN or infinite features or coordinates, shapes that
            disagree, or a setting out of range.
    """
    check_seed(seed)
    return Sampler(model, n_sample_steps, prior, memory_budget).prepare(slide).draw(x_0, seed, trajectory)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Autocast keeps weights that it has cast until it is left; a graph captured with them would then read memory that
    was freed. Without the cache the casts are part of the graph."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextlib.contextmanager
def _evaluating(model: Denoiser) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with the model's GPU as the current one: streams, events and graphs
    are made on that."""
    was_training, weight = model.training, model.image_transform.weight
    model.eval()
    try:
        with torch.no_grad(), torch.cuda.device(weight.device) if weight.is_cuda else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)


def resolve(model: Denoiser, n_sample_steps: int | None, prior: Prior | str | None) -> tuple[int, Prior]:
    """Steps and prior; what is None is what the model was trained with, or else the published default."""
    trained = model.provenance.training.get("training", {})
    if n_sample_steps is None:
        n_sample_steps = trained.get("n_sample_steps", DEFAULT_SAMPLE_STEPS)
    of_training = Prior.of_training(trained)
    if prior is None or prior == of_training.name:
        prior = of_training
    return n_sample_steps, Prior(prior) if isinstance(prior, str) else prior


def _inputs(slide: Slide | tuple[Tensor | np.ndarray, Tensor | np.ndarray]) -> tuple[Tensor, Tensor, str]:
    if isinstance(slide, Slide):
        return torch.from_numpy(slide.features), torch.from_numpy(slide.coords), slide.id
    features, coords = map(torch.as_tensor, slide)
    return features, coords, ""


def _check(model: Denoiser, features: Tensor, coords: Tensor, slide_id: str) -> None:
    where = f"slide {slide_id}: " if slide_id else ""
    config = model.config
    if features.ndim != 2 or features.shape[1] != config.feature_dim:
        size = features.shape[-1] if features.ndim else 0
        raise InputError(
            f"{where}features: {size} numbers per spot, but the model reads {config.feature_dim}; "
            "use embeddings of the encoder it was trained with"
        )
    n = len(features)
    if tuple(coords.shape) != (n, 2):
        raise InputError(f"{where}coords: must have shape [{n}, 2], not {list(coords.shape)}")
    broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in features.split(FEATURE_CHUNK))
    if broken:
        raise InputError(f"{where}features: {broken} of {n} spots are NaN or infinite; remove them or embed them again")


def _check_source(x_0: Tensor, shape: tuple[int, int], slide_id: str) -> None:
    where = f"slide {slide_id}: " if slide_id else ""
    if tuple(x_0.shape) != shape:
        raise InputError(f"{where}x_0: must have shape {list(shape)}, not {list(x_0.shape)}")
    if not x_0.isfinite().all():
        raise InputError(f"{where}x_0: has values that are NaN or infinite")


def _embed(model: Denoiser, graph: SpotGraph, features: Tensor) -> Tensor:
    """``image_transform`` of the rows of the graph [N, d], some of them on the device at a time.

    To a GPU they go through two pinned buffers in turn, so that one is filled while the other is copied.
    """
    weight = model.image_transform.weight
    image = torch.empty(graph.n_spots, model.config.hidden_dim, dtype=weight.dtype, device=weight.device)
    order = graph.order.to(features.device)
    streamed = weight.is_cuda and not features.is_cuda
    size = (min(FEATURE_CHUNK, graph.n_spots), features.shape[1])
    buffers = [torch.empty(size, dtype=features.dtype, pin_memory=True) for _ in range(2)] if streamed else []
    copied = [torch.cuda.Event() for _ in buffers]
    for index, start in enumerate(range(0, graph.n_spots, FEATURE_CHUNK)):
        chunk = slice(start, start + FEATURE_CHUNK)
        rows = order[chunk]
        if streamed:
            copied[index % 2].synchronize()
            staged = torch.index_select(features, 0, rows, out=buffers[index % 2][: len(rows)])
            part = staged.to(weight.device, non_blocking=True)
            copied[index % 2].record()
        else:
            part = features[rows]
        image[chunk] = model.image_transform(part.to(weight))
    return image

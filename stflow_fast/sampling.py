"""Sampling the expression of whole slides: what is made once per model, once per slide, and once per draw."""

from __future__ import annotations

import contextlib
import numbers
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .arrays import as_tensor
from .config import parse_bytes
from .errors import InputError
from .flow import DEFAULT_SAMPLE_STEPS, EulerSolver, Predict, time_grid
from .folding import EncoderState
from .graph import SpotGraph
from .model import Denoiser
from .priors import PRIORS, SOURCES, Prior, Source, check_seed, slide_seed
from .priors.observation import ObservationModel
from .slides import Slide, StoredRows
from .threads import blocks_of, in_turn, spread

DEFAULT_MEMORY_BUDGET = "5GiB"
"""What sampling may spend on keeping edge messages from one flow step to the next: those of the largest public slide,
605,471 spots, by the default model. Measured in benchmarks/results/cpu_notes.md, "time per spot"."""

PRECISIONS = {"float32": None, "tf32": None, "bf16": torch.bfloat16}
"""Of products; parameters, statistics, softmax and positions stay float32."""

FEATURE_CHUNK = 16_384
"""Spots whose features are on the model's device at once."""

EXPRESSION_BYTES = 2**26
"""Of a block of spots, as wide as the genes, of a sample that is drawn by blocks."""


@dataclass(frozen=True)
class Sample:
    """What :func:`sample` returns.

    Attributes:
        expression: [N, G] the sampled x_1, spots in the caller's order, on the CPU, in pinned memory where a GPU
            sampled it; with ``draws`` the mean of so many samples.
        nfe: denoiser calls made.
        trajectory: [nfe, N, G] the target predicted by each call, if asked for.
        std: [N, G] standard deviation of x_1 by the model's observation model, with ``draws``.
        draws: [draws, N, G] of x_1 by the model's observation model, if asked for.
    """

    expression: Tensor
    nfe: int
    trajectory: Tensor | None = None
    std: Tensor | None = None
    draws: Tensor | None = None


@dataclass(frozen=True)
class BlockSample:
    """What :meth:`PreparedSlide.draw_blocks` returns: a sample whose expression is made as it is read.

    Attributes:
        shape: (N, G).
        nfe: denoiser calls made.
    """

    shape: tuple[int, int]
    nfe: int
    _read: Tensor  # [N, R] what the expression is made of
    _leave: Callable[[Tensor], Tensor]

    @property
    def expression(self) -> Tensor:
        """[N, G] on the CPU."""
        return torch.cat([part for _, part in self.blocks()]) if self.shape[0] else torch.empty(self.shape)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of spots in the caller's order, and their expression [n, G] on the CPU. Each begins at a multiple of
        :data:`.ops.ROW_BLOCK`. Any thread may read them."""
        for rows in _expression_blocks(self.shape):
            yield rows, *_to_host(self._leave(self._read[rows]))


class Sampler:
    """A model ready to sample slides: its folded weights are made once.

    The weights must not change while the sampler is in use. Every call runs the model in evaluation mode and leaves it
    in the mode it was in.
    """

    def __init__(
        self,
        model: Denoiser,
        n_sample_steps: int | None = None,
        prior: Source | str | None = None,
        memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
        cuda_graph: bool = True,
        precision: str | None = None,
        smooth: float = 0.0,
    ) -> None:
        """
        Args:
            model: the network.
            n_sample_steps: times S of the grid, at least 2; NFE is S - 1. When None, as the model was trained, or 5.
            prior: what x_0 is drawn from, or its name. When None or of that name, as the model was trained, or ZINB
                as published.
            memory_budget: bytes that each slide may spend on keeping edge messages from one flow step to the next, or
                text such as "4GiB".
            cuda_graph: on a GPU, capture the refinement loop of a slide at its second draw, and replay it from then on.
                A capture needs the memory of a draw once more, and frees cuBLAS's workspaces of the whole process:
                False where there is too little, beside CUDA graphs of your own, or for debugging.
            precision: "float32", "tf32" or "bf16", of the matrix products; when None that of the caller's autocast,
                float32 without one. tf32 is of NVIDIA GPUs: while the sampler runs, it is torch's setting for all
                threads. bf16 pays on a GPU and on processors that multiply it (avx512_bf16, amx); what it changes is
                in ``benchmarks/results/cpu_notes.md``.
            smooth: share of the mean over a spot's neighbours that is mixed into its sample, 0 to 1.

        Raises:
            InputError: a setting out of range.
        """
        check_smooth(smooth)
        self.model, self.smooth = model, smooth
        self.n_sample_steps, self.prior = resolve(model, n_sample_steps, prior)
        self.solver = EulerSolver(time_grid(self.n_sample_steps))
        self.memory_budget = parse_bytes(memory_budget)
        if precision is not None:
            check_precision(precision, model)
        self.precision = precision
        # Time stays float64 until the embedding rounds it, as in the published loop. On the CPU: not every device has
        # float64.
        times = torch.tensor(self.solver.grid[:-1], dtype=torch.float64)
        with self.running():
            self.states = model.backbone.layer_states()
            self.times = dict(zip(self.solver.grid[:-1], model.fourier_proj(times).split(1), strict=True))
            # One for all slides: what is freed on a stream is free for that stream alone.
            self.stream = torch.cuda.Stream() if cuda_graph and model.image_transform.weight.is_cuda else None
        self._cast: dict[tuple[object, ...], EncoderState] = {}

    def cast_states(self) -> EncoderState:
        """The folded weights as the present autocast casts them, made by the first draw under it. They stay: a capture
        casts none, and CUDA graphs read them."""
        circumstances = ops.circumstances(self.model.image_transform.weight.device)
        if circumstances not in self._cast:
            self._cast[circumstances] = self.states.of_autocast()
        return self._cast[circumstances]

    def embed_time(self, t: float) -> Tensor:
        """[1, d]; those of the grid are made already."""
        known = self.times.get(t)
        return self.model.fourier_proj(torch.tensor([t], dtype=torch.float64)) if known is None else known

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model evaluating, in the sampler's precision."""
        chosen = contextlib.nullcontext()
        if self.precision is not None:
            dtype = PRECISIONS[self.precision]
            chosen = torch.autocast(self.model.image_transform.weight.device.type, dtype, enabled=dtype is not None)
        with _evaluating(self.model), chosen, self.products():
            yield

    def products(self) -> contextlib.AbstractContextManager[None]:
        """float32 products as the sampler's precision wants them."""
        return _TF32 if self.precision == "tf32" else contextlib.nullcontext()

    def prepare(self, slide: Slide | tuple[Tensor | np.ndarray, Tensor | np.ndarray]) -> PreparedSlide:
        """Make what all draws of a slide share: neighbours, geometry, ``image_transform``, edge messages.

        Args:
            slide: a Slide, or features [N, F] and coordinates [N, 2] (a slide with the empty id). Features on the host
                stay there and are streamed to the device; those on a disk (:class:`.slides.StoredRows`) are read once,
                by blocks, and never all in memory.

        Raises:
            InputError: features of another size than the model's, NaN or infinite features or coordinates, shapes
                that disagree.
        """
        return PreparedSlide(self, *_inputs(self.model, slide))


class PreparedSlide:
    """A slide ready for any number of draws; made by :meth:`Sampler.prepare`.

    Attributes:
        coords: [N, 2] of its N spots, as they were given.
        graph: of the spots.
        image: [N, d] ``image_transform`` of the features, rows of the graph.
        states: of each layer, with the edge messages that are kept.
    """

    def __init__(self, sampler: Sampler, features: Features, coords: Tensor, slide_id: str) -> None:
        self.sampler, self.slide_id, self.coords = sampler, slide_id, coords
        model, solver = sampler.model, sampler.solver
        with sampler.running():
            self.graph = graph = model.build_graph(coords)
            self.image = _embed(model, graph, features, _where(slide_id))
            self.states = model.backbone.keep_messages(sampler.states, graph, sampler.memory_budget)
        # A disk's are read again at every draw.
        self._features = features if sampler.prior.reads_features else None
        make_call = _plain_call if self.states.heads is None else _folded_call
        messages = [layer.messages for layer in self.states.layers]
        self._call = call = make_call(sampler, graph, self.image, lambda: sampler.cast_states().with_messages(messages))

        def loop(terms: Tensor) -> Tensor:  # no method: a cycle would keep the memory of a slide
            read = solver.solve(call.target, terms, last=call.read, overwrite=True)
            return call.leave(graph.to_spots(smoothed(graph, read, sampler.smooth)))

        self._loop = _Captured(loop, sampler.stream) if sampler.stream is not None and graph.n_spots else loop

    def denoise(self, x_t: Tensor, t: float) -> Tensor:
        """One call of the denoiser: the prediction of x_1 [N, G] from x_t [N, G] at flow time t in [0, 1], spots in the
        caller's order, on the model's device.

        Raises:
            InputError: x_t of another shape, t out of range.
        """
        model = self.sampler.model
        if not 0 <= t <= 1:
            raise InputError(f"t: must be in [0, 1], not {t}")
        x_t = _expression("x_t", x_t, (self.graph.n_spots, model.config.n_genes), self.slide_id)
        with self.sampler.running():
            return self._predicted(x_t.to(model.image_transform.weight), t)

    def draw(self, x_0: Tensor | None = None, seed: int = 0, trajectory: bool = False) -> Sample:
        """One sample (the published loop: ``n_sample_steps - 1`` calls).

        Args:
            x_0: [N, G] source sample in the order of the spots; drawn from the sampler's prior when None.
            seed: with the slide's id, decides x_0.
            trajectory: return every call's prediction too, none of them smoothed; such a draw replays no CUDA graph.

        Raises:
            InputError: x_0 of another shape, or NaN or infinite; a negative seed.
        """
        with self.sampler.running():
            source = self._source(x_0, seed)
            # A GPU's answer comes with the sample: nothing waits for it.
            finite = [source.isfinite().all()] if source.is_cuda else []
            self._refuse_unless(source.is_cuda or _is_finite(source))
            kept: list[Tensor] = []
            if trajectory:
                x_1 = self._trajectory(self._on_device(source), kept)
            else:
                x_1 = self._loop(self.graph.to_rows(self._call.enter(self._on_device(source))))
            x_1, *finite = _to_host(x_1, *finite)
            self._refuse_unless(all(finite))
            return Sample(x_1, self.sampler.solver.nfe, torch.stack(kept) if kept else None)

    def _on_device(self, x: Tensor) -> Tensor:
        weight = self.sampler.model.image_transform.weight
        return x.to(weight, non_blocking=weight.is_cuda)

    def _refuse_unless(self, finite: bool) -> None:
        if not finite:
            raise InputError(f"{_where(self.slide_id)}x_0: has values that are NaN or infinite")

    def draw_blocks(self, seed: int = 0, draws: int = 1) -> BlockSample:
        """One sample, that of :meth:`draw` (its very bits on the CPU), in memory that does not depend on the genes:
        where they are more than the gene heads read of a spot, n_layers * hidden_dim, the source is drawn by blocks,
        and the last product is made by blocks as the sample is read. Such a draw replays no CUDA graph.

        With ``draws`` the mean of the samples of as many seeds, from ``seed`` on.

        Heads with a ReLU behind them (``non_negative``) are not linear: of such a model [N, G] is kept, and several
        times while it is drawn.

        Args:
            seed: with the slide's id, decides the source.

        Raises:
            InputError: a negative seed.
        """
        call, shape = self._call, (self.graph.n_spots, self.sampler.model.config.n_genes)
        weight = self.sampler.model.image_transform.weight
        check_seed(seed)
        check_seed(seed + check_draws(draws) - 1)
        with self.sampler.running():
            read = self.graph.to_spots(smoothed(self.graph, self._mean_read(shape, seed, draws), self.sampler.smooth))
            autocast = ops.present_precision(weight.device.type)
            if weight.is_cuda:  # another thread may read it, on another stream
                torch.cuda.current_stream().synchronize()
        expression_of, products = call.leave, self.sampler.products  # not the call, which holds the slide's memory

        def leave(read: Tensor) -> Tensor:
            with torch.no_grad(), autocast(), products():
                return expression_of(read)

        return BlockSample(shape, draws * self.sampler.solver.nfe, read, leave)

    def _mean_read(self, shape: tuple[int, int], seed: int, draws: int) -> Tensor:
        """[N, R] what the mean of samples is made of, rows of the graph: heads that are read so are linear, and others
        are read behind them."""
        call, mean = self._call, None
        for number in range(draws):
            terms = self._drawn_terms(shape, seed + number)
            read = self.sampler.solver.solve(call.target, terms, last=call.read, overwrite=True)
            mean = read if mean is None else mean.lerp_(read, 1 / (number + 1))
        return mean

    def _drawn_terms(self, shape: tuple[int, int], seed: int) -> Tensor:
        """[N, P] all that the network reads of the source that ``seed`` decides, rows of the graph."""
        check_seed(seed)
        weight = self.sampler.model.image_transform.weight
        draw = self.sampler.prior.spots(shape[1], slide_seed(seed, self.slide_id), self._features)
        terms = ops.Gathered(shape[0])
        for rows in _expression_blocks(shape) or [slice(0, 0)]:
            x_0 = torch.from_numpy(draw(rows.stop - rows.start))
            terms.put(rows, [self._call.enter(x_0.to(weight))])
        return self.graph.to_rows(*terms.tensors)

    def _predicted(self, x_t: Tensor, t: float) -> Tensor:
        """x_t [N, G] to the x_1 [N, G] that one call predicts."""
        return self._call.leave(self.graph.to_spots(self._call.read(self.graph.to_rows(self._call.enter(x_t)), t)))

    def _trajectory(self, source: Tensor, kept: list[Tensor]) -> Tensor:
        """The sample from x_0 [N, G], by single calls, whose predictions go into ``kept``."""

        def predict(x_t: Tensor, t: float) -> Tensor:
            x_1 = self._predicted(x_t, t)
            kept.extend(_to_host(x_1))
            return x_1

        x_1 = self.graph.to_rows(self.sampler.solver.solve(predict, source))
        return self.graph.to_spots(smoothed(self.graph, x_1, self.sampler.smooth))

    def _source(self, x_0: Tensor | None, seed: int) -> Tensor:
        """:meth:`draw`'s x_0 [N, G], where it is; for a GPU, in memory that it copies from."""
        model, graph = self.sampler.model, self.graph
        check_seed(seed)
        if x_0 is None:
            size, of_slide = (graph.n_spots, model.config.n_genes), slide_seed(seed, self.slide_id)
            x_0 = torch.from_numpy(self.sampler.prior.draw(*size, of_slide, self._features))
        x_0 = _expression("x_0", x_0, (graph.n_spots, model.config.n_genes), self.slide_id)
        weight = model.image_transform.weight
        x_0 = x_0.to(weight.dtype)
        return x_0.pin_memory() if weight.is_cuda and not x_0.is_cuda else x_0


class _Call(NamedTuple):
    """A denoiser call in parts: those as wide as the genes treat every spot alone, and a loop of calls needs neither
    between its first and its last. Spots are in the caller's order outside."""

    enter: Callable[[Tensor], Tensor]  # x_t [n, G] of some spots to all that the network reads of it, [n, P]
    target: Predict  # that of all spots [N, P], rows of the graph, and t to that of the x_1 that is predicted
    read: Predict  # that of all spots, and t, to what this x_1 is made of, [N, R], rows of the graph
    leave: Callable[[Tensor], Tensor]  # this, of some spots, to their x_1 [n, G]


States = Callable[[], EncoderState]
"""The states of a slide, as the present autocast casts them."""


def _plain_call(sampler: Sampler, graph: SpotGraph, image: Tensor, states: States) -> _Call:
    """The network reads and predicts the expression itself."""

    def target(x_t: Tensor, t: float) -> Tensor:
        return sampler.model.denoise_at(graph, x_t, image, sampler.embed_time(t), states())

    return _Call(_as_it_is, target, target, _as_it_is)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _folded_call(sampler: Sampler, graph: SpotGraph, image: Tensor, states: States) -> _Call:
    """Products as wide as the genes are made before the loop and behind it, and what is ordered is as wide as the
    network."""
    backbone, dtype = sampler.model.backbone, image.dtype

    def read(terms: Tensor, t: float) -> Tensor:
        return backbone.run_folded(graph, terms, image + sampler.embed_time(t), states())

    return _Call(
        lambda x_t: backbone.gene_terms(x_t, states()),
        lambda terms, t: F.linear(read(terms, t), *states().heads.to_first),
        read,
        lambda read: backbone.mean_of_heads(read, sampler.cast_states()).to(dtype),
    )


class _Captured:
    """The refinement loop of a slide as a CUDA graph: the first call runs it, the second captures it, and from then on
    it is replayed. A call under another backend or precision, or after one that failed, is a first call again.

    The whole loop, because a denoiser call on 10,000 spots is some hundred launches of a few microseconds each, with
    those of an Euler step behind it, and a replay of all of them is one. From the second call on, because a capture
    wants a run before it, on its stream, that compiles the kernels and sets up the libraries: what they allocate and
    load while they do so cannot be captured. The first draw is that run, and slides that are drawn once, as those of a
    cohort are, pay neither for a capture nor for a graph's memory.
    """

    def __init__(self, loop: Callable[[Tensor], Tensor], stream: torch.cuda.Stream) -> None:
        """
        Args:
            loop: what the network reads of x_0, [N, .] on the current GPU, to the sample [N, G], without ever waiting
                for the GPU; it overwrites what it reads.
            stream: of that GPU; where the loop first runs, and is captured.
        """
        self._loop, self._stream = loop, stream
        self._known: tuple[object, ...] | None = None
        self._replay: _Replay | None = None

    def __call__(self, terms: Tensor) -> Tensor:
        """What the loop reads to the sample [N, G], which is good until the next call: a replay overwrites it."""
        circumstances = ops.circumstances(terms.device)
        known, self._known = self._known, None  # until this call has succeeded
        if circumstances != known:
            self._replay = None
            x_1 = self._run(terms)
        else:
            if self._replay is None:
                self._replay = self._capture(terms)
            x_1 = self._replay(terms)
        self._known = circumstances
        return x_1

    def _run(self, terms: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                x_1 = self._loop(terms)
        finally:  # what a failed loop has launched still reads memory of the current stream
            current.wait_stream(self._stream)
        x_1.record_stream(current)
        return x_1

    def _capture(self, terms: Tensor) -> _Replay:
        graph = torch.cuda.CUDAGraph()
        with (
            _without_autocast_cache(),
            _workspaces_of_its_own(),
            torch.cuda.stream(torch.cuda.current_stream()),  # restored also where a capture fails as it ends
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            x_1 = self._loop(terms)
        return _Replay(graph, terms, x_1)


class _Replay(NamedTuple):
    """A captured loop, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    terms: Tensor
    x_1: Tensor

    def __call__(self, terms: Tensor) -> Tensor:
        self.terms.copy_(terms)  # nothing, of those that were captured with
        self.graph.replay()
        return self.x_1


def sample(
    model: Denoiser,
    slide: Slide | tuple[Tensor | np.ndarray, Tensor | np.ndarray],
    x_0: Tensor | None = None,
    n_sample_steps: int | None = None,
    prior: Source | str | None = None,
    seed: int = 0,
    trajectory: bool = False,
    memory_budget: int | str = DEFAULT_MEMORY_BUDGET,
    precision: str | None = None,
    smooth: float = 0.0,
    draws: int | None = None,
) -> Sample:
    """Sample the expression of a whole slide in one pass: a :class:`Sampler` for one draw of one slide.

    Edge messages are kept between steps as far as ``memory_budget`` allows; the result does not depend on it beyond
    rounding.

    Args:
        model, n_sample_steps, prior, memory_budget, precision, smooth: see :class:`Sampler`.
        slide: see :meth:`Sampler.prepare`.
        x_0, seed, trajectory: see :meth:`PreparedSlide.draw`.
        draws: of the model's observation model (:mod:`.priors.observation`), for what the network cannot know: the
            expression is then the mean of samples of as many seeds, from ``seed`` on, and ``draws`` are of x_1 around
            it. Samples of the network itself hardly differ, and tell nothing about certainty.

    Raises:
        InputError: features of another size than the model's, NaN or infinite features or coordinates, shapes that
            disagree, a setting out of range; draws of a model without observation model, or beside x_0 or trajectory.
    """
    check_seed(seed)
    # A single draw replays nothing.
    how = {"cuda_graph": False, "precision": precision, "smooth": smooth}
    sampler = Sampler(model, n_sample_steps, prior, memory_budget, **how)
    if draws is None:
        return sampler.prepare(slide).draw(x_0, seed, trajectory)
    if x_0 is not None or trajectory:
        raise InputError("draws: are of the model's own source, and have no trajectory; leave x_0 and trajectory out")
    law = observation_of(model)
    prepared = sampler.prepare(slide)
    mean = prepared.draw_blocks(seed, draws)
    expression = mean.expression
    around = expression.float().numpy()
    places = prepared.coords.double().cpu().numpy()
    std, drawn = law.std(around), law.drawer(seed, prepared.slide_id, draws, places)(around)
    return Sample(expression, mean.nfe, None, torch.from_numpy(std), torch.from_numpy(drawn))


def observation_of(model: Denoiser) -> ObservationModel:
    """That of the model.

    Raises:
        InputError: it has none.
    """
    if model.observation is None:
        raise InputError(
            "draws: the model has no observation model, and its own samples say nothing about certainty; fit one with "
            "stflow-fast calibrate RUN, or leave draws out"
        )
    return model.observation


class _Tf32:
    """torch's setting, which is one for all threads: tf32 until the last thread that wants it has left."""

    def __init__(self) -> None:
        self._changing, self._inside, self._before = threading.Lock(), 0, ""

    def __enter__(self) -> None:
        matmul = torch.backends.cuda.matmul
        with self._changing:
            if self._inside == 0:
                self._before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._changing:
            self._inside -= 1
            if self._inside == 0:
                torch.backends.cuda.matmul.fp32_precision = self._before


_TF32 = _Tf32()


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
def _workspaces_of_its_own() -> Iterator[None]:
    """cuBLAS works in memory that torch keeps for each stream, and frees when a graph captured on the stream is
    destroyed, also under other graphs that use it (pytorch issue 193402). So a capture finds none: what it then gets
    lies in the graph's own memory. Nor does it leave any to a stream's next user, who may outlive the graph."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def _evaluating(model: Denoiser) -> Iterator[None]:
    """Without gradients, in evaluation mode, and with the model's GPU as the current one: streams, events and graphs
    are made on that. On the CPU with threads that take blocks in turn. Not in inference mode: what stays for later
    draws would be theirs only in that mode.

    The encoder is the one module that computes otherwise in training: to set the mode of all 121 takes 0.6 ms.
    """
    weight, encoder = model.image_transform.weight, model.backbone
    trained = encoder.training
    if trained:
        encoder.training = False
    try:
        on_device = torch.cuda.device(weight.device) if weight.is_cuda else spread(weight.device)
        with torch.inference_mode(False), torch.no_grad(), on_device:
            yield
    finally:
        if trained:
            encoder.training = True


def check_draws(draws: int) -> int:
    """Raise InputError unless it is a whole number above 0."""
    if not isinstance(draws, numbers.Integral) or draws < 1:
        raise InputError(f"draws: must be a whole number of at least 1, not {draws!r}")
    return int(draws)


def check_smooth(smooth: float) -> None:
    """Raise InputError unless it is a share."""
    if not 0 <= smooth <= 1:
        raise InputError(f"smooth: must be a share from 0 to 1, not {smooth!r}")


def smoothed(graph: SpotGraph, read: Tensor, share: float) -> Tensor:
    """What a sample is made of, rows of the graph, with ``share`` of the neighbours' mixed in."""
    return graph.smoothed(read, share) if share else read


def check_precision(precision: str, model: Denoiser | None = None) -> None:
    """Raise InputError unless it is one of :data:`PRECISIONS`, and of the model."""
    if precision not in PRECISIONS:
        raise InputError(f"precision: must be {' or '.join(PRECISIONS)}, not {precision!r}")
    if model is None or precision == "float32":
        return
    weight = model.image_transform.weight
    if weight.dtype != torch.float32:
        raise InputError(f"precision: {precision} is of a float32 model, not one of {weight.dtype}")
    if precision == "tf32" and not weight.is_cuda:
        raise InputError(f"precision: tf32 is of NVIDIA GPUs, and the model is on the {weight.device.type}")


def resolve(model: Denoiser, n_sample_steps: int | None, prior: Source | str | None) -> tuple[int, Source]:
    """Steps and prior; what is None is what the model was trained with, or else the published default.

    Raises:
        InputError: the name of a source that is fitted, and the model has none of that name.
    """
    trained = model.provenance.training.get("training", {})
    if n_sample_steps is None:
        n_sample_steps = trained.get("n_sample_steps", DEFAULT_SAMPLE_STEPS)
    if model.source is not None and prior in (None, model.source.name):
        return n_sample_steps, model.source
    if isinstance(prior, str) and prior in SOURCES and prior not in PRIORS:
        raise InputError(
            f"prior: the model has no source {prior!r}; train it with --set prior={prior}, or take another"
        )
    of_training = Prior() if model.source is not None else Prior.of_training(trained)
    if prior is None or prior == of_training.name:
        prior = of_training
    return n_sample_steps, Prior(prior) if isinstance(prior, str) else prior


Features = Tensor | StoredRows
"""[N, F]: slices of rows can be taken of them."""


def _inputs(model: Denoiser, slide: Slide | tuple[Any, Any]) -> tuple[Features, Tensor, str]:
    """Features [N, F] and coordinates [N, 2] of any make, and the slide's id. What is NaN is not looked for: features
    are read once, by who embeds them, and the graph looks at coordinates."""
    if isinstance(slide, Slide):
        if slide.features is None:
            raise InputError(f"slide {slide.id}: has no patch features; give a file of them too (--embeddings)")
        features, coords, slide_id = slide.features, slide.coords, slide.id
    elif isinstance(slide, (tuple, list)) and len(slide) == 2:
        (features, coords), slide_id = slide, ""
    else:
        found = f"{len(slide)} of them" if isinstance(slide, (tuple, list)) else type(slide).__name__
        raise InputError(f"slide: must be a Slide, or two arrays, features [N, F] and coordinates [N, 2], not {found}")
    where = _where(slide_id)
    wanted, mend = model.config.feature_dim, "use embeddings of the encoder that the model was trained with"
    if isinstance(features, StoredRows):
        if features.columns != wanted:
            raise InputError(f"{where}features: must have shape [N, {wanted}], not {list(features.shape)}; {mend}")
    else:
        features = as_tensor(f"{where}features", features, ("N", wanted), mend)
    n = len(features)
    return features, as_tensor(f"{where}coords", coords, (n, 2), f"features are of {n} spots"), slide_id


def _expression(name: str, x: Any, shape: tuple[int, int], slide_id: str) -> Tensor:
    """[N, G] of any make. Contiguous: products of it have the same bits, however it came."""
    return as_tensor(f"{_where(slide_id)}{name}", x, shape).contiguous()


def _expression_blocks(shape: tuple[int, int]) -> list[slice]:
    """Blocks of spots of an expression [N, G]: as many whole blocks of rows as :data:`EXPRESSION_BYTES` hold, at least
    one, so that each row is in the product that it would be in among all spots."""
    n, width = shape
    return blocks_of(n, max(1, EXPRESSION_BYTES // (4 * width * ops.ROW_BLOCK)) * ops.ROW_BLOCK)


def _where(slide_id: str) -> str:
    return f"slide {slide_id}: " if slide_id else ""


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """What is on the CPU itself; from a GPU in pinned memory, to which the driver copies at once, and which the next
    draw finds again where its result is not kept."""
    if not tensors[0].is_cuda:
        return [x.cpu() for x in tensors]
    staged = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in tensors]
    torch.cuda.current_stream(tensors[0].device).record_event().synchronize()
    return staged


def _is_finite(x: Tensor) -> bool:
    """Of x on the CPU. A finite sum, a thirtieth of the time, has nothing in it that is not."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _embed(model: Denoiser, graph: SpotGraph, features: Features, where: str) -> Tensor:
    """``image_transform`` of the rows of the graph [N, d], some of them on the device at a time.

    Features are read in the order that they have, which a disk and a cache like, and what is made of them, a tenth as
    wide, goes to the graph's rows.

    Raises:
        InputError: features that are NaN or infinite in the model's type.
    """
    weight = model.image_transform.weight
    image = torch.empty(graph.n_spots, model.config.hidden_dim, dtype=weight.dtype, device=weight.device)
    row_of = torch.empty_like(graph.order)
    row_of[graph.order] = torch.arange(graph.n_spots, device=row_of.device)
    broken = []

    def embed(rows: slice, part: Tensor) -> None:
        part = part.to(weight)
        if not part.sum().isfinite():  # a finite sum, an eighth of the time, has nothing in it that is not
            broken.append(int((~part.isfinite()).any(dim=1).sum()))
        image[row_of[rows]] = model.image_transform(part).to(image.dtype)

    if weight.is_cuda and not (isinstance(features, Tensor) and features.is_cuda):
        for rows, part in _streamed(features, weight.device):
            embed(rows, part)
    else:
        _embed_in_turn(embed, features, weight.device)
    if sum(broken):
        found = f"{sum(broken)} of {graph.n_spots} spots are NaN or infinite"
        raise InputError(f"{where}features: {found}; remove them or embed them again")
    return image


def _embed_in_turn(embed: Callable[[slice, Tensor], None], features: Features, device: torch.device) -> None:
    """``embed`` of blocks with the same bounds, wherever the features lie. Those on a disk are read by larger pieces of
    whole chunks."""
    size = ops.ROW_BLOCK if device.type == "cpu" else FEATURE_CHUNK
    for first, held in _pieces(features, size):

        def embed_block(rows: slice, first: int = first, held: Tensor = held) -> None:
            embed(slice(first + rows.start, first + rows.stop), held[rows].contiguous())

        in_turn(embed_block, blocks_of(len(held), size), device)


def _pieces(features: Features, size: int) -> Iterator[tuple[int, Tensor]]:
    """Where each piece begins, and its rows until the next is asked for: all of one memory, which is then warm."""
    if isinstance(features, Tensor):
        yield 0, features
        return
    buffer = np.empty((0, features.columns), dtype=np.float32)
    for piece in features.blocks(size):
        n = piece.stop - piece.start
        buffer = buffer if len(buffer) >= n else np.empty((n, features.columns), dtype=np.float32)
        yield piece.start, torch.from_numpy(features.read_into(buffer[:n], piece.start))


def _streamed(features: Features, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of spots, and their features on a GPU: they go from the host through two pinned buffers in turn, so that
    one is filled while the other is copied."""
    n, columns = features.shape
    size = (min(FEATURE_CHUNK, n), columns)
    dtype = features.dtype if isinstance(features, Tensor) else torch.float32
    buffers = [torch.empty(size, dtype=dtype, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers]
    for index, chunk in enumerate(blocks_of(n, FEATURE_CHUNK)):
        copied[index % 2].synchronize()
        staged = buffers[index % 2][: chunk.stop - chunk.start]
        if isinstance(features, Tensor):
            staged.copy_(features[chunk])
        else:
            features.read_into(staged.numpy(), chunk.start)
        part = staged.to(device, non_blocking=True)
        copied[index % 2].record()
        yield chunk, part

"""What is made once per model, once per slide, and once per draw."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..config import parse_bytes
from ..errors import InputError
from ..flow import EulerSolver, time_grid
from ..graph import SpotGraph
from ..model import Denoiser, EncoderState
from ..priors import Source, check_seed, slide_seed
from ..slides import Slide
from .call_parts import folded_call, plain_call
from .capture import Captured
from .features import embed_features
from .inputs import Features, expression_array, slide_inputs, where_of
from .modes import TF32, evaluating
from .samples import BlockSample, Sample, expression_blocks, to_host
from .settings import (
    DEFAULT_MEMORY_BUDGET,
    PRECISIONS,
    check_draws,
    check_precision,
    check_smooth,
    observation_of,
    resolve,
)


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
            n_sample_steps: times of the grid, at least 2, one more than NFE. When None, as the model was trained, or 5.
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
        made: Tensor = self.model.fourier_proj(torch.tensor([t], dtype=torch.float64)) if known is None else known
        return made

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model evaluating, in the sampler's precision."""
        chosen: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.precision is not None:
            dtype = PRECISIONS[self.precision]
            chosen = torch.autocast(self.model.image_transform.weight.device.type, dtype, enabled=dtype is not None)
        with evaluating(self.model), chosen, self.products():
            yield

    def products(self) -> contextlib.AbstractContextManager[None]:
        """float32 products as the sampler's precision wants them."""
        return TF32 if self.precision == "tf32" else contextlib.nullcontext()

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
        return PreparedSlide(self, *slide_inputs(self.model, slide))


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
            self.image = embed_features(model, graph, features, where_of(slide_id))
            self.states = model.backbone.keep_messages(sampler.states, graph, sampler.memory_budget)
        # A disk's are read again at every draw.
        self._features = features if sampler.prior.reads_features else None
        messages = [layer.messages for layer in self.states.layers]
        parts = model, sampler.embed_time, graph, self.image, lambda: sampler.cast_states().with_messages(messages)
        folded = self.states.heads is not None
        self._call = call = folded_call(*parts, sampler.cast_states) if folded else plain_call(*parts)

        def loop(terms: Tensor) -> Tensor:  # no method: a cycle would keep the memory of a slide
            read = solver.solve(call.target, terms, last=call.read, overwrite=True)
            return call.leave(graph.to_spots(smoothed(graph, read, sampler.smooth)))

        self._loop = Captured(loop, sampler.stream) if sampler.stream is not None and graph.n_spots else loop

    def denoise(self, x_t: Tensor, t: float) -> Tensor:
        """One call of the denoiser: the prediction of x_1 [N, G] from x_t [N, G] at flow time t in [0, 1], spots in the
        caller's order, on the model's device.

        Raises:
            InputError: x_t of another shape, t out of range.
        """
        model = self.sampler.model
        if not 0 <= t <= 1:
            raise InputError(f"t: must be in [0, 1], not {t}")
        x_t = expression_array("x_t", x_t, (self.graph.n_spots, model.config.n_genes), self.slide_id)
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
            x_1, *finite = to_host(x_1, *finite)
            self._refuse_unless(all(finite))
            return Sample(x_1, self.sampler.solver.nfe, torch.stack(kept) if kept else None)

    def _on_device(self, x: Tensor) -> Tensor:
        weight = self.sampler.model.image_transform.weight
        return x.to(weight, non_blocking=weight.is_cuda)

    def _refuse_unless(self, finite: bool) -> None:
        if not finite:
            raise InputError(f"{where_of(self.slide_id)}x_0: has values that are NaN or infinite")

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
        """[N, .] what the mean of samples is made of, rows of the graph: heads that are read so are linear, and others
        are read behind them."""
        call, mean = self._call, None
        for number in range(draws):
            terms = self._drawn_terms(shape, seed + number)
            read = self.sampler.solver.solve(call.target, terms, last=call.read, overwrite=True)
            mean = read if mean is None else mean.lerp_(read, 1 / (number + 1))
        assert mean is not None  # there is a draw
        return mean

    def _drawn_terms(self, shape: tuple[int, int], seed: int) -> Tensor:
        """[N, .] all that the network reads of the source that ``seed`` decides, rows of the graph."""
        check_seed(seed)
        weight = self.sampler.model.image_transform.weight
        draw = self.sampler.prior.spots(shape[1], slide_seed(seed, self.slide_id), self._features)
        terms = ops.Gathered(shape[0])
        for rows in expression_blocks(shape) or [slice(0, 0)]:
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
            kept.extend(to_host(x_1))
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
        x_0 = expression_array("x_0", x_0, (graph.n_spots, model.config.n_genes), self.slide_id)
        weight = model.image_transform.weight
        x_0 = x_0.to(weight.dtype)
        return x_0.pin_memory() if weight.is_cuda and not x_0.is_cuda else x_0


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
    sampler = Sampler(model, n_sample_steps, prior, memory_budget, cuda_graph=False, precision=precision, smooth=smooth)
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


def smoothed(graph: SpotGraph, read: Tensor, share: float) -> Tensor:
    """What a sample is made of, rows of the graph, with ``share`` of the neighbours' mixed in."""
    return graph.smoothed(read, share) if share else read


def _is_finite(x: Tensor) -> bool:
    """Of x on the CPU. A finite sum, a thirtieth of the time, has nothing in it that is not."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())

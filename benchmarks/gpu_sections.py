"""The parts of the GPU benchmarks: kernels, slides, training, graphs; each checks before it times."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stflow_fast import Denoiser, DenoiserConfig, Sampler, SpotGraph, ops
from stflow_fast.flow import CondOTPath
from stflow_fast.ops.reference import AttentionSpec, Dropouts, EdgeWeights, attend_block

from .baselines.eager_stflow import EagerDenoiser, eager_sample
from .gpu_measure import Figure, Scale, at_most, captured, in_turns, wall_times
from .measure import (
    NETWORK_TOLERANCE,
    adam_step,
    autocast,
    clocked,
    gradients,
    matrix_products,
    out_of_memory,
    peak,
    relative_error,
    times_of,
)
from .roofline import unit_times
from .workload import PITCH, SAMPLE_STEPS, hexagonal_lattice

KERNEL_TOLERANCE = {"bf16": 2e-2, "tf32": 5e-3, "ieee": 1e-5}

EAGER_PRECISION = {"bf16": "tf32", "tf32": "tf32", "ieee": "ieee"}

KERNEL_GOALS = ("forward of 1M spots within 1.7x of its floor", "backward of 1M spots within 3x of the forward")
SLIDE_GOALS = ("sample of 10k spots in at most 3 ms", "sample of 10k spots at least 25x faster than eager")
STEP_GOALS = ("step on 10k spots at least 15x faster than eager", "step on 10k spots in a twentieth of eager's memory")
LARGE_GOALS = ("sample of 1M spots in at most 300 ms", "sample of 1M spots in at most 8 GB")


class Case(NamedTuple):
    """A part of the run that succeeds or fails alone."""

    section: Callable[[Scale, str], Iterator[Figure]]
    precision: str
    goals: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.section.__name__.replace('_', ' ')}, {self.precision}"


def floor_ms(n: int, config: DenoiserConfig, precision: str, backward: bool) -> float:
    """What the units of an H100 need for the counted work of the edge kernels, see ``benchmarks.roofline``."""
    from stflow_fast.kernels.aot import edge_work
    from stflow_fast.kernels.conventions import Settings, Sizes
    from stflow_fast.kernels.edge_shape import edge_shape

    d, heads, e = config.hidden_dim, config.n_heads, config.pairwise_hidden_dim // 2
    sizes = Sizes(config.n_neighbors, e, heads * d, d)
    names = ("edge_attention_bwd_query", "edge_attention_bwd_key") if backward else ("edge_attention_fwd",)
    total = 0.0
    for name in names:
        shape, _ = edge_shape(name, 90, precision, sizes, Settings(heads, config.activation, config.activation))
        rows = n * config.n_neighbors * (heads if name.endswith("key") else 1)
        work = edge_work(name, shape, 2 if precision == "bf16" else 4)
        total += max(unit_times(work, precision, rows).values())
    return total


def edge_kernel(scale: Scale, precision: str) -> Iterator[Figure]:
    """The fused edge attention of one layer at the model's sizes: forward, and backward as what both take more."""
    with matrix_products(precision):
        for n in scale.kernel_spots:
            yield from edge_figures(scale, precision, n, precision == "bf16" and n == scale.kernel_spots[-1])


def edge_figures(scale: Scale, precision: str, n: int, has_goals: bool) -> Iterator[Figure]:
    device, edge = scale.device, EdgeCase(scale, precision, n)
    context, first = clocked(edge.forward, device)
    grad = torch.randn_like(context)
    firsts = (first, clocked(lambda: edge.both(grad), device)[1])
    errors = edge.errors(context.detach(), grad)
    del context
    run = {"forward": captured(edge.forward, device), "both": captured(lambda: edge.both(grad), device)}
    forward, both = in_turns(run, device, rep=50).values()
    backward = [value - forward[0] for value in both]
    floors = [floor_ms(n, scale.config, precision, is_backward) for is_backward in (False, True)]
    met = (forward[0] <= 1.7 * floors[0], backward[0] <= 3 * forward[0])
    for i, (name, times) in enumerate((("forward", forward), ("backward", backward))):
        rest = {"floor_ms": floors[i], "first_call_s": firsts[i], "met": {KERNEL_GOALS[i]: met[i]} if has_goals else {}}
        name = f"edge attention {name}"
        yield Figure(name, "ours", n, precision, times, errors[i], KERNEL_TOLERANCE[precision], **rest)


class EdgeCase:
    """Random inputs of one layer's edge attention, on the graph of a regular lattice."""

    def __init__(self, scale: Scale, precision: str, n: int) -> None:
        config, device = scale.config, scale.device
        d, heads, e = config.hidden_dim, config.n_heads, config.pairwise_hidden_dim // 2
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.graph = ops.build_graph(hexagonal_lattice(n), config.n_neighbors, None, torch.float32, device)
        self.spec = AttentionSpec(heads, config.activation, config.activation)
        leaves = (
            torch.randn(n, 2 * heads * d + d, device=device, dtype=dtype),
            torch.randn(4, 2 * e, device=device),
            (torch.randn(e, heads * d, device=device) * e**-0.5).to(dtype),
            torch.randn(d // 2 + 1, device=device) * (d / 2) ** -0.5,
        )
        self.leaves = [leaf.requires_grad_() for leaf in leaves]

    def forward(self) -> Tensor:
        from stflow_fast.kernels.conventions import Settings
        from stflow_fast.kernels.edge_attention import edge_attention

        terms, *weights = self.leaves
        graph, settings = self.graph, Settings(*self.spec)
        return edge_attention(terms, graph.neighbors, graph.geometry, *weights, settings, arriving=graph.arriving)

    def both(self, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, grad)

    def errors(self, context: Tensor, grad: Tensor) -> tuple[float, float]:
        """Of the context, and the largest of the gradients', against the float64 reference at 10,000 spots, half of
        them the last. The gradients are those of these spots alone, and nobody else may receive one."""
        graph, (n, k) = self.graph, self.graph.neighbors.shape
        spread = torch.linspace(0, n - 1, min(n, 5_000), device=grad.device).long()
        rows = torch.cat([spread, torch.arange(max(0, n - 5_000), n, device=grad.device)]).unique()
        involved, place = torch.cat([rows, graph.neighbors[rows].flatten()]).unique(return_inverse=True)
        inputs = (self.leaves[0][involved], *self.leaves[1:])
        terms, *weights = [part.detach().double().requires_grad_() for part in inputs]
        query, near = terms[place[: len(rows)], : weights[1].shape[1]], place[len(rows) :].view(-1, k)
        expected = attend_block(
            query, terms, near, graph.geometry[rows].double(), EdgeWeights(*weights), self.spec, Dropouts(None, 0, 0)
        )
        gradients = torch.autograd.grad(expected, (terms, *weights), grad[rows].double())
        everywhere, *of_weights = self.both(torch.zeros_like(grad).index_copy_(0, rows, grad[rows]))
        found = (everywhere[involved], *of_weights)
        errors = torch.tensor([relative_error(*pair) for pair in zip(found, gradients, strict=True)])
        nobody_else = bool((everywhere.index_fill_(0, involved, 0) == 0).all())
        return relative_error(context[rows], expected), errors.max().item() if nobody_else else math.nan


class SlideInputs(NamedTuple):
    features: Tensor  # [N, F] on the host, pinned where there is a GPU
    coords: Tensor  # [N, 2] float64, representable in float32
    x_0: Tensor  # [N, G] on the device


def slide_inputs(scale: Scale, n: int) -> SlideInputs:
    """An irregular lattice: on a regular one the published code leaves ties to its libraries."""
    features = torch.empty(n, scale.config.feature_dim, pin_memory=scale.device.type == "cuda")
    for part in features.split(65_536):
        part.copy_(torch.randn(part.shape, device=scale.device))
    coords = hexagonal_lattice(n) + 0.8 * PITCH * (torch.rand(n, 2) - 0.5)
    return SlideInputs(features, coords.float().double(), torch.rand(n, scale.config.n_genes, device=scale.device))


def networks(scale: Scale) -> tuple[Denoiser, EagerDenoiser]:
    """Ours with random weights, and the published one with the same."""
    model, eager = Denoiser(scale.config), EagerDenoiser(**scale.config.to_dict())
    eager.load_state_dict(model.state_dict())
    # The published sampling loop makes its times on the CPU.
    eager.fourier_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(scale.device),))
    return model.to(scale.device).eval(), eager.to(scale.device).eval()


def eager_draw(scale: Scale, eager: EagerDenoiser, slide: SlideInputs) -> Callable[[], Tensor]:
    inputs = [part.to(scale.device) for part in (slide.features, slide.coords.float(), slide.x_0)]

    def draw() -> Tensor:
        with torch.autocast(scale.device.type, enabled=False):
            return eager_sample(eager, *inputs, SAMPLE_STEPS)

    return draw


def corner_check(scale: Scale, eager: EagerDenoiser, slide: SlideInputs) -> Callable[[Tensor], float]:
    """The relative error of a sample in the last corner of its slide, against ``eager_sample`` on a patch around it,
    which is the slide where that is no larger. A layer carries a spot's influence less than 2.7 rows on, in each call:
    behind that margin nothing is left of the patch's border."""
    n = len(slide.coords)
    side, spot = math.ceil(math.sqrt(n)), torch.arange(n)
    first = max(0, side - scale.patch)
    margin = math.ceil(2.7 * scale.config.n_layers * (SAMPLE_STEPS - 1)) if first else 0
    place = torch.minimum(spot // side, spot % side)  # the lower of row and column
    patch = (place >= first).nonzero().squeeze(1)
    corner = place[patch] >= first + margin
    inputs = SlideInputs(slide.features[patch], slide.coords[patch], slide.x_0[patch.to(scale.device)])
    expected = eager_draw(scale, eager, inputs)().cpu()[corner]
    return lambda drawn: relative_error(drawn.cpu()[patch][corner], expected)


class Sampling:
    """A slide to prepare and to draw from, with what is known before it is timed: the error of the second draw, which
    is the first replay, the first call and the peak with a capture."""

    def __init__(
        self, scale: Scale, model: Denoiser, slide: SlideInputs, error_of: Callable[[Tensor], float], cuda_graph: bool
    ) -> None:
        self._device, self._slide, self._sampler = (
            scale.device,
            slide,
            Sampler(model, SAMPLE_STEPS, cuda_graph=cuda_graph),
        )
        self._prepared, first_prepare = clocked(self.prepare, scale.device)
        _, first_draw = clocked(self.draw, scale.device)
        self.known = {
            "relative_error": error_of(self.draw().expression),
            "first_call_s": first_prepare + first_draw,
            "peak_bytes": peak(self.prepare_and_draw_twice, scale.device),
        }

    def prepare(self) -> Any:
        return self._sampler.prepare((self._slide.features, self._slide.coords))

    def draw(self) -> Any:
        return self._prepared.draw(self._slide.x_0)

    def prepare_and_draw_twice(self) -> None:
        prepared = self.prepare()
        for _ in range(2):
            prepared.draw(self._slide.x_0)

    def prepare_figure(self, precision: str) -> Figure:
        times, error = wall_times(self.prepare, self._device, 3), self.known["relative_error"]
        n, tolerance = len(self._slide.coords), NETWORK_TOLERANCE[precision]
        return Figure("prepare", "ours", n, precision, times, error, tolerance)


def small_slide(scale: Scale, precision: str) -> Iterator[Figure]:
    """A sample of 10,000 spots, with and without the CUDA graph, and by the published code."""
    device, n, tolerance = scale.device, scale.slide_spots, NETWORK_TOLERANCE[precision]
    slide, (model, eager) = slide_inputs(scale, n), networks(scale)
    error_of, published = corner_check(scale, eager, slide), eager_draw(scale, eager, slide)
    # One autocast around everything: under another one a graph would be captured anew.
    with matrix_products(precision), autocast(precision, device):
        replayed, launched = (Sampling(scale, model, slide, error_of, cuda_graph) for cuda_graph in (True, False))
        lacks = out_of_memory(published)
        draws = {"replayed": replayed.draw, "launched": launched.draw} | ({} if lacks else {"eager": published})
        times = in_turns(draws, device, rep=100)
        median, limits = times["replayed"][0], (3, None if lacks else times["eager"][0] / 25)
        met = {goal: at_most(median, limit) for goal, limit in zip(SLIDE_GOALS, limits, strict=True)}
        rest = {"tolerance": tolerance, "met": met, **replayed.known}
        yield Figure("sample", "ours, CUDA graph", n, precision, times["replayed"], **rest)
        rest = {"tolerance": tolerance, **launched.known}
        yield Figure("sample", "ours, launches", n, precision, times["launched"], **rest)
        yield replayed.prepare_figure(precision)
        rest = {} if lacks else {"relative_error": error_of(published()), "peak_bytes": peak(published, device)}
        rest |= {"tolerance": tolerance, "note": lacks}
        yield Figure("sample", "eager", n, EAGER_PRECISION[precision], times.get("eager"), **rest)


def large_slide(scale: Scale, precision: str) -> Iterator[Figure]:
    """A sample of a million spots, its features on the host."""
    n = scale.large_spots
    slide, (model, eager) = slide_inputs(scale, n), networks(scale)
    error_of = corner_check(scale, eager, slide)
    with matrix_products(precision), autocast(precision, scale.device):
        ours = Sampling(scale, model, slide, error_of, cuda_graph=True)
        times = in_turns({"draw": ours.draw}, scale.device, rep=1000)["draw"]
        met = (at_most(times[0], 300), at_most(ours.known["peak_bytes"], 8e9))
        goals, tolerance = dict(zip(LARGE_GOALS, met, strict=True)), NETWORK_TOLERANCE[precision]
        yield Figure("sample", "ours, CUDA graph", n, precision, times, tolerance=tolerance, met=goals, **ours.known)
        yield ours.prepare_figure(precision)


def training_step(scale: Scale, precision: str) -> Iterator[Figure]:
    """Forward, mean squared error, backward and Adam on packed windows, dropout and all."""
    device, n, tolerance = scale.device, scale.slide_spots, NETWORK_TOLERANCE[precision]
    model, eager = networks(scale)
    our_loss, eager_loss = training_losses(scale, model, eager, precision)
    expected = gradients(eager, eager_loss)
    with matrix_products(precision):
        errors = [relative_error(gradients(*pair), expected) for pair in ((model, our_loss), (eager, eager_loss))]
        steps = {"ours": adam_step(model, our_loss), "eager": adam_step(eager, eager_loss)}
        _, first = clocked(steps["ours"], device)
        lacks = out_of_memory(steps["eager"])
        if lacks:
            del steps["eager"]
        times = in_turns(steps, device, rep=200)
        peaks = {name: peak(step, device) for name, step in steps.items()}
    limits = (None, None) if lacks else (times["eager"][0] / 15, peaks["eager"] and peaks["eager"] / 20)
    met = dict(zip(STEP_GOALS, map(at_most, (times["ours"][0], peaks["ours"]), limits), strict=True))
    rest = {"first_call_s": first, "met": met}
    yield Figure("training step", "ours", n, precision, times["ours"], errors[0], tolerance, peaks["ours"], **rest)
    rest = {"peak_bytes": peaks.get("eager"), "note": lacks}
    dtype = EAGER_PRECISION[precision]
    yield Figure("training step", "eager", n, dtype, times.get("eager"), errors[1], tolerance, **rest)


def training_losses(
    scale: Scale, model: Denoiser, eager: EagerDenoiser, precision: str
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Of both networks on the same windows; ours in autocast, its graph as new, so that it sorts its edges anew."""
    from stflow_fast.training import FlowObjective
    from stflow_fast.windows import WindowBatch

    slide, device = slide_inputs(scale, scale.slide_spots), scale.device
    graph = model.build_graph(slide.coords, torch.arange(0, scale.slide_spots + 1, scale.window))
    t, seeds = torch.rand(graph.n_slides, device=device), torch.randint(2**62, (graph.n_slides,), device=device)
    features, x_0, x_1 = slide.features.to(device), slide.x_0, torch.rand_like(slide.x_0)
    batch = WindowBatch(graph, *map(graph.to_rows, (features, x_0, x_1)), t, seeds)
    x_t = CondOTPath.sample(x_0, x_1, t.repeat_interleave(scale.window).unsqueeze(1))
    spots = (x_t, features, slide.coords.float().to(device), x_1)
    padded = [part.view(graph.n_slides, scale.window, -1) for part in spots]
    objective = FlowObjective(model)

    def ours() -> Tensor:
        with autocast(precision, device):
            return objective(batch._replace(graph=dataclasses.replace(graph)))

    return ours, lambda: eager(*padded, t)[1]


def neighbour_graph(scale: Scale, precision: str) -> Iterator[Figure]:
    """The graph of a million spots of a regular lattice, ties and all: on the device, and by scipy's tree."""
    device, n, k = scale.device, scale.large_spots, scale.config.n_neighbors
    coords = hexagonal_lattice(n)

    def build() -> SpotGraph:
        return ops.build_graph(coords, k, None, torch.float32, device)

    graph, first = clocked(build, device)
    expected, seconds = clocked(lambda: SpotGraph.build(coords, k), device)
    differing = int((graph.neighbors.cpu() != expected.neighbors).sum() + (graph.order.cpu() != expected.order).sum())
    error = differing + relative_error(graph.geometry, expected.geometry)
    times = wall_times(build, device, 5)
    yield Figure("neighbour graph", "ours", n, precision, times, error, 1e-6, first_call_s=first)
    yield Figure("neighbour graph", f"scipy, {os.cpu_count()} cores", n, precision, times_of([1e3 * seconds]))


def plan(precisions: tuple[str, ...]) -> list[Case]:
    """What is run, in this order, as far as the time goes."""
    return [
        *(Case(edge_kernel, precision, KERNEL_GOALS if precision == "bf16" else ()) for precision in precisions),
        *(Case(small_slide, precision, SLIDE_GOALS) for precision in precisions),
        *(Case(training_step, precision, STEP_GOALS) for precision in precisions),
        *(Case(large_slide, precision, LARGE_GOALS) for precision in ("bf16", "ieee")),
        Case(neighbour_graph, "float64"),
    ]

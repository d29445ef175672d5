"""Flow matching: the path from prior noise to expression, its solver, and the sampling of a slide.

Time t runs from 0 (source) to 1 (data). The network predicts the target x_1 (arXiv 2506.05361, section 4.1).
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .graph import SpotGraph
from .model import Denoiser
from .priors import Prior, check_seed, slide_seed
from .slides import Slide

FIRST_TIME = 0.01
"""Where the published sampling loop starts."""

DEFAULT_SAMPLE_STEPS = 5

DEFAULT_MEMORY_BUDGET = 2 * 2**30
"""Bytes that sampling may spend on keeping edge messages from one flow step to the next."""

FEATURE_CHUNK = 16_384
"""Spots whose features are on the model's device at once."""


class CondOTPath:
    """The conditional optimal transport path (Lipman et al. 2023): straight lines from x_0 to x_1."""

    @staticmethod
    def sample(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - t) x_0 + t x_1; ``t`` broadcasts."""
        return (1 - t) * x_0 + t * x_1

    @staticmethod
    def velocity(x_t: Tensor, x_1: Tensor, t: float) -> Tensor:
        """dx/dt = (x_1 - x_t) / (1 - t) towards the (predicted) target x_1; t below 1."""
        return (x_1 - x_t) / (1 - t)


def time_grid(n_sample_steps: int) -> list[float]:
    """The published grid of S times from 0.01 to 1, the last of them the end.

    Raises:
        InputError: fewer than 2 times, which would be no call of the network at all.
    """
    if not isinstance(n_sample_steps, numbers.Integral) or n_sample_steps < 2:
        raise InputError(f"n_sample_steps: must be at least 2 (S times are S - 1 denoiser calls), not {n_sample_steps}")
    return np.linspace(FIRST_TIME, 1.0, n_sample_steps).tolist()


@dataclass(frozen=True)
class EulerSolver:
    """Euler steps over a time grid t_1 < ... < t_S = 1; the target predicted at t_(S-1) is the solution.

    That is Euler's last step too: x + (1 - t)(x_1 - x)/(1 - t) = x_1.
    """

    grid: list[float]

    @property
    def nfe(self) -> int:
        """Number of denoiser calls."""
        return len(self.grid) - 1

    def solve(self, predict: Callable[[Tensor, float], Tensor], x_0: Tensor) -> Iterator[Tensor]:
        """Yield the target predicted by each of the ``nfe`` calls ``predict(x_t, t)``; the last is the solution."""
        x_t = x_0
        for t, after in zip(self.grid[:-1], self.grid[1:], strict=True):
            x_1 = predict(x_t, t)
            yield x_1
            x_t = x_t + (after - t) * CondOTPath.velocity(x_t, x_1, t)


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
    """Sample the expression of a whole slide in one pass (the published loop: ``n_sample_steps - 1`` calls).

    The neighbour graph, the edge geometry, ``image_transform`` and the folded weights are made once. Edge messages
    are kept between steps as far as ``memory_budget`` allows; the result does not depend on it beyond rounding.

    Args:
        model: the network; it runs in evaluation mode and is left in the mode it was in.
        slide: a Slide, or features [N, F] and coordinates [N, 2] (a slide with the empty id).
        x_0: [N, G] source sample in the order of the spots; drawn from ``prior`` when None.
        n_sample_steps: times S of the grid, at least 2; NFE is S - 1. When None, as the model was trained, or 5.
        prior: a Prior or its name. When None or of that name, as the model was trained, or ZINB as published.
        seed: with the slide's id, decides x_0.
        trajectory: return every call's prediction too.
        memory_budget: bytes, or text such as "4GiB".

    Raises:
        InputError: features of another size than the model's, NaN or infinite features or coordinates, shapes that
            disagree, or a setting out of range.
    """
    features, coords, slide_id = _inputs(slide)
    _check(model, features, coords, x_0, slide_id)
    check_seed(seed)
    n_sample_steps, prior = resolve(model, n_sample_steps, prior)
    solver = EulerSolver(time_grid(n_sample_steps))
    if x_0 is None:
        draw = prior.draw(len(features), model.config.n_genes, slide_seed(seed, slide_id))
        x_0 = torch.from_numpy(draw)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            graph = model.build_graph(coords)
            predict = _predictor(model, graph, features, parse_bytes(memory_budget))
            weight = model.image_transform.weight
            steps = solver.solve(predict, graph.to_rows(x_0.to(weight)))
            kept = []
            for rows in steps:
                if trajectory:
                    kept.append(graph.to_spots(rows).cpu())
            expression = kept[-1] if kept else graph.to_spots(rows).cpu()
    finally:
        model.train(was_training)
    return Sample(expression, solver.nfe, torch.stack(kept) if trajectory else None)


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


def _check(model: Denoiser, features: Tensor, coords: Tensor, x_0: Tensor | None, slide_id: str) -> None:
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
    if x_0 is not None and tuple(x_0.shape) != (n, config.n_genes):
        raise InputError(f"{where}x_0: must have shape [{n}, {config.n_genes}], not {list(x_0.shape)}")
    if x_0 is not None and not x_0.isfinite().all():
        raise InputError(f"{where}x_0: has values that are NaN or infinite")
    broken = sum(int((~part.isfinite()).any(dim=1).sum()) for part in features.split(FEATURE_CHUNK))
    if broken:
        raise InputError(f"{where}features: {broken} of {n} spots are NaN or infinite; remove them or embed them again")


def _predictor(model: Denoiser, graph: SpotGraph, features: Tensor, budget: int) -> Callable[[Tensor, float], Tensor]:
    weight = model.image_transform.weight
    image = torch.empty(graph.n_spots, model.config.hidden_dim, dtype=weight.dtype, device=weight.device)
    order = graph.order.to(features.device)
    for start in range(0, graph.n_spots, FEATURE_CHUNK):
        chunk = slice(start, start + FEATURE_CHUNK)
        image[chunk] = model.image_transform(features[order[chunk]].to(weight))
    states = model.backbone.keep_messages(model.backbone.layer_states(), graph, budget)

    def predict(x_t: Tensor, t: float) -> Tensor:
        # Time stays float64 until the embedding rounds it, as in the published loop. On the CPU: not every device
        # has float64.
        times = torch.full((graph.n_slides,), t, dtype=torch.float64)
        return model.denoise(graph, x_t, image, times, states)

    return predict

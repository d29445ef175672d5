"""The least time of a workload on this machine: counted work over two rates that are measured in the same run.

What is counted is the factored algorithm of stflow_fast (ops/reference.py), whoever is timed: its matrix products, and
the values that its three passes a layer must bring to memory or take from there. Gates, norms, softmax and the search
for neighbours are not counted, so nothing reaches its floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from stflow_fast import DenoiserConfig

from . import measure
from .workload import SAMPLE_STEPS

MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""More than any cache holds."""

REPEATS = 6
SETTLING = 0.3
"""Seconds of repeats before a rate is believed, at least."""


class Rates(NamedTuple):
    """What a machine reaches in one large product of matrices, and in one large copy."""

    flops_per_s: float
    bytes_per_s: float  # read and written


class Work(NamedTuple):
    flops: float  # two for every product of two numbers
    values: float  # read or written


def layer_work(config: DenoiserConfig) -> Work:
    """Of one spot in one layer, its K edges included, but for what is as wide as the genes."""
    d, heads, k = config.hidden_dim, config.n_heads, config.n_neighbors

    def gated(width: int) -> int:
        return width // 2 if config.activation == "swiglu" else width

    message = gated(config.pairwise_hidden_dim)
    terms, context = 2 * heads * d + d, d + heads * message + heads
    edges = k * (heads * d * message + heads * message + d)  # message to logit; the two sums over neighbours
    output = context * d + gated(d) * d
    mlp = 4 * d * d + gated(4 * d) * d
    gene_hidden = d * d
    # Terms and context are written and read; tokens read twice and written.
    values = 2 * (terms + context) + 3 * d + 3 * k
    return Work(2.0 * (d * terms + edges + output + mlp + gene_hidden), float(values))


def gene_work(config: DenoiserConfig, calls: int, training: bool) -> Work:
    """Of one spot in a loop of denoiser calls: expression to the gene terms of every layer and the heads back to it;
    where that is less, with the heads folded (:class:`stflow_fast.model.folding.LinearHeads`)."""
    d, genes, layers = config.hidden_dim, config.n_genes, config.n_layers
    if layers * d < genes and not config.non_negative and not (training and config.dropout):
        to_next, to_first = calls * (layers - 1) * d * d, (calls - 1) * layers * d * d
        return Work(2.0 * ((layers + 1) * genes * d + to_next + to_first), 2.0 * (genes + calls * layers * d))
    return Work(2.0 * 2 * calls * layers * genes * d, 2.0 * calls * layers * genes)


def work(workload: str, config: DenoiserConfig, spots: int) -> Work:
    """Of denoise, sample or train_step.

    A training step is three times a call, since every product has two in the backward pass, of its size, but that of
    the source, which needs no gradient; patches are embedded too, without a gradient of the features.
    """
    training = workload == "train_step"
    calls, times = SAMPLE_STEPS - 1 if workload == "sample" else 1, 3 if training else 1
    layer, genes = layer_work(config), gene_work(config, calls, training)
    flops = times * spots * (calls * config.n_layers * layer.flops + genes.flops)
    values = times * spots * (calls * config.n_layers * layer.values + genes.values)
    if training:
        flops += 2.0 * spots * config.hidden_dim * (2 * config.feature_dim - config.n_genes)
        values += 2.0 * spots * config.feature_dim
    return Work(flops, values)


def floor_ms(counted: Work, rates: Rates, value_bytes: int) -> float:
    return 1e3 * max(counted.flops / rates.flops_per_s, counted.values * value_bytes / rates.bytes_per_s)


def measured_rates(device: torch.device, precision: str) -> Rates:
    """The best of several; ``precision`` is ``"ieee"``, ``"tf32"`` or ``"bf16"``."""
    side, n_bytes = MATRIX_SIDE[device.type], COPIED_BYTES[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    with measure.matrix_products(precision):
        multiplied = _least_seconds(lambda: torch.mm(a, b, out=product), device)
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = _least_seconds(lambda: target.copy_(source), device)
    return Rates(2.0 * side**3 / multiplied, 2.0 * n_bytes / copied)


def _least_seconds(function: Callable[[], object], device: torch.device) -> float:
    function()
    seconds: list[float] = []
    begun = time.monotonic()
    while len(seconds) < REPEATS or time.monotonic() - begun < SETTLING:
        seconds.append(measure.clocked(function, device)[1])
    return min(seconds)

"""Single operations of the network as jobs: what its kernels cost, beside plain torch and the floor of their counts.

Weights are those of the default network's first layer, spots are in space order on one of the layouts, and what comes
from other operations is drawn from a seed. Each is checked against the float64 reference on the same, rounded numbers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from stflow_fast.kernels.conventions import Settings
from torch import Tensor

from stflow_fast import DenoiserConfig, SpotGraph, ops
from stflow_fast.model import LayerState
from stflow_fast.model.layers import STREAM_MLP
from stflow_fast.ops.backend import use_backend
from stflow_fast.ops.dropout import DropoutKeys
from stflow_fast.ops.reference import AttentionSpec, Dropouts, EdgeWeights, MLPWeights

from . import measure
from .cases import NETWORK, PRECISION, Case, Job, Plan
from .floor import Rates
from .h100 import MATRIX_RATES, RATES, unit_times
from .networks import edge_sizes, our_network, triton_lacks
from .slides import coordinates

KERNEL_TOLERANCE = {"bf16": 2e-2, "tf32": 5e-3, "ieee": 1e-5}
"""Of every tensor that a kernel gives, over its norm. Plain torch has a network's tolerance: in bf16, on a CPU, the
sums over rows in its backward of a LayerNorm are 4.4e-2 off."""

REPEATED = 2**16
"""Rows of random numbers; a longer tensor repeats them."""

Call = Callable[[], tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """What the operations read, all of one device and arithmetic."""

    config: DenoiserConfig
    graph: SpotGraph
    layer: LayerState
    spec: AttentionSpec
    terms: Tensor  # [N, 2 * H * P + d]
    tokens: Tensor  # [N, d]
    keys: DropoutKeys
    kept: bool  # messages are

    def normal(self, like: Tensor) -> Tensor:
        n, width = like.shape
        return random_rows(n, width, seed=3).to(like)

    def messages(self) -> Tensor:
        return ops.make_messages(self.graph.geometry, self.layer.attention.edges, self.spec)


def random_rows(n: int, width: int, seed: int) -> Tensor:
    """[n, width] float32 on the CPU, the first :data:`REPEATED` of them normal, over and over."""
    rows = torch.randn(min(n, REPEATED), width, generator=torch.Generator().manual_seed(seed))
    return rows.repeat(math.ceil(n / REPEATED), 1)[:n]


def edge_forward(inputs: Inputs) -> Call:
    """As in sampling: without dropout, of messages that are kept or of geometry."""
    messages = inputs.messages() if inputs.kept else None
    weights, none = inputs.layer.attention.edges, Dropouts(None, 0.0, 0.0)
    return lambda: (ops.edge_attention(inputs.terms, inputs.graph, messages, weights, inputs.spec, none),)


def edge_backward(inputs: Inputs) -> Call:
    """As in training: with dropout."""
    config, leaves = inputs.config, tuple(map(_leaf, (inputs.terms, *inputs.layer.attention.edges)))
    weights = EdgeWeights._make(leaves[1:])
    dropouts = Dropouts(inputs.keys, config.dropout, config.attn_dropout)
    context = ops.edge_attention(leaves[0], inputs.graph, None, weights, inputs.spec, dropouts)
    grad = inputs.normal(context)
    return lambda: torch.autograd.grad(context, leaves, grad, retain_graph=True)


def edge_messages(inputs: Inputs) -> Call:
    return lambda: (inputs.messages(),)


def gated_mlp(inputs: Inputs) -> Call:
    """Of a layer, as in sampling."""
    weights, activation = inputs.layer.mlp, inputs.config.activation
    return lambda: (ops.gated_mlp(inputs.tokens, weights, activation, 0.0, None, STREAM_MLP),)


def gated_mlp_backward(inputs: Inputs) -> Call:
    """Of a layer, as in training."""
    config, leaves = inputs.config, tuple(map(_leaf, (inputs.tokens, *inputs.layer.mlp)))
    weights = MLPWeights._make(leaves[1:])
    out = ops.gated_mlp(leaves[0], weights, config.activation, config.dropout, inputs.keys, STREAM_MLP)
    grad = inputs.normal(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def dropout(inputs: Inputs) -> Call:
    return lambda: (ops.apply_dropout(inputs.tokens, inputs.config.dropout, inputs.keys, STREAM_MLP),)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


OPERATIONS: dict[str, Callable[[Inputs], Call]] = {
    function.__name__: function
    for function in (edge_forward, edge_backward, edge_messages, gated_mlp, gated_mlp_backward, dropout)
}
WITH_GRADIENTS = ("edge_backward", "gated_mlp_backward")
COUNTED = {
    "edge_forward": ("edge_attention_fwd",),
    "edge_backward": ("edge_attention_bwd_query", "edge_attention_bwd_key"),
    "edge_messages": ("edge_messages",),
}
"""The kernels of an operation whose work is counted, by :func:`stflow_fast.kernels.aot_variants.edge_work`."""

KEPT = "_kept_edges"


def terms_width(config: DenoiserConfig) -> int:
    """Columns of A, B and V."""
    sizes = edge_sizes(config)
    return int(2 * sizes.hp + sizes.d)


def operation_providers(workload: str) -> tuple[str, ...]:
    """Names of :data:`benchmarks.suite.providers.PROVIDERS`: of the backend, and whether messages are kept."""
    kept = ("triton_kept_edges",) if workload == "edge_forward" else ()
    return (*kept, "triton", "reference")


class OperationJob(Job):
    """One operation, by one backend: inputs are of one set, for the L2 cache is flushed before they are read."""

    by_device = True

    def __init__(self, plan: Plan, case: Case, name: str) -> None:
        self.config, self.workload, self.device = plan.config(case), case.workload, plan.device
        self.arithmetic, self._precision = case.dtype, PRECISION[case.dtype]
        self.backend, self.kept = name.removesuffix(KEPT), name.endswith(KEPT)
        self.compiles = self.backend == "triton"
        self.tolerance = (KERNEL_TOLERANCE if self.compiles else measure.NETWORK_TOLERANCE)[self._precision]
        self.trains = case.workload in WITH_GRADIENTS

    def why_not(self, spots: int, memory_budget: int) -> str | None:
        return triton_lacks(self.config, self.device) if self.backend == "triton" else None

    def load(self, spots: int, layout: str, seed: int = 0) -> None:
        """Nothing: inputs are made with what is prepared."""

    def prepare(self, spots: int, layout: str, seed: int = 0) -> None:
        with self._running():
            self._inputs = self._made(spots, layout, seed)
            self._call = self._of(self._inputs)

    def call(self, turn: int) -> tuple[Tensor, ...]:
        with self._running():
            return self._call()

    def result(self) -> Tensor:
        """[1], the largest relative error of what comes out."""
        found = self.call(0)
        with use_backend("reference"):
            expected = self._of(exactly(self._inputs))()
        errors = [measure.relative_error(one, other) for one, other in zip(found, expected, strict=True)]
        return torch.tensor(errors).max().view(1)  # NaN where one is

    def floor(self, spots: int, measured: Callable[[], Rates]) -> tuple[float, Rates] | None:
        """By counts and the rates of an H100, see :mod:`benchmarks.suite.h100`."""
        if self.device.type != "cuda" or self.workload not in COUNTED:
            return None
        least = sum(self._least_ms(kernel, spots) for kernel in COUNTED[self.workload])
        return least, Rates(MATRIX_RATES[self._precision], RATES["streamed from memory"])

    def _least_ms(self, kernel: str, spots: int) -> float:
        from stflow_fast.kernels.aot_variants import edge_work
        from stflow_fast.kernels.edge_shape import edge_shape

        c = self.config
        settings = Settings(c.n_heads, c.activation, c.activation, edges_are_messages=self.kept)
        shape, _ = edge_shape(kernel, 90, self._precision, edge_sizes(c), settings)
        rows = spots * c.n_neighbors * (c.n_heads if kernel.endswith("key") else 1)
        work = edge_work(kernel, shape, 2 if self._precision == "bf16" else 4)
        return max(unit_times(work, self._precision, rows).values())

    @staticmethod
    def input_bytes(case: Case) -> int:
        """Terms of the default network, on the host and in the arithmetic's type."""
        return 8 * terms_width(NETWORK) * case.spots

    def _of(self, inputs: Inputs) -> Call:
        call = OPERATIONS[self.workload]
        if self.trains:
            return call(inputs)
        with torch.no_grad():
            return torch.no_grad()(call(inputs))

    def _made(self, spots: int, layout: str, seed: int) -> Inputs:
        """Weights as the operation gets them: in sampling cast before, in training float32."""
        config, network = self.config, our_network(self.config).to(self.device)
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float32
        coords = coordinates(layout, spots, seed)
        graph = ops.build_graph(coords, config.n_neighbors, None, torch.float32, self.device)
        with torch.no_grad():
            states = network.backbone.layer_states()
            layer = (states if self.trains else states.of_autocast()).layers[0]
        widths = (terms_width(config), config.hidden_dim)
        terms, tokens = (random_rows(spots, width, seed).to(self.device, dtype) for width in widths)
        spot = torch.arange(spots, device=self.device)
        keys = DropoutKeys.for_spots(torch.tensor([seed]), torch.zeros_like(spot), spot)
        spec = network.backbone.blks[0].attn.spec
        return Inputs(config, graph, layer, spec, terms, tokens, keys, self.kept)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        products, cast = measure.matrix_products(self._precision), measure.autocast(self._precision, self.device)
        with use_backend(self.backend), products, cast:
            yield


def exactly(inputs: Inputs) -> Inputs:
    """The same numbers in float64 on the CPU."""

    def exact(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu().double() if value.is_floating_point() else value.cpu()
        if isinstance(value, tuple) and hasattr(value, "_make"):
            return value._make(map(exact, value))
        return value

    graph = inputs.graph.to("cpu", torch.float64)
    keys = DropoutKeys(inputs.keys.keys.cpu())
    return inputs._replace(
        graph=graph, keys=keys, layer=exact(inputs.layer), terms=exact(inputs.terms), tokens=exact(inputs.tokens)
    )

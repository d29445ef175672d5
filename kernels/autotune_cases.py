"""What ``autotune`` times: every kernel through the operation that launches it, on random numbers of the model's sizes.

Spots are uniform in a square, in space order, with 8 neighbours each; widths are those of a model whose messages have
``columns`` columns: hidden_dim 2 * columns, 4 heads, SwiGLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stflow_fast.graph import SpotGraph

from .conventions import Settings, context_padding
from .dropout import dropout
from .edge_attention import edge_attention, edge_messages
from .gated_mlp import gate_norm, gate_norm_backward
from .gene_head import gene_head
from .joined_norm import joined_norm
from .launch import EDGE_KERNELS, WIDEST
from .neighbors import nearest
from .residual import residual

N_NEIGHBORS, N_HEADS, N_GENES, P_DROPOUT, STREAM = 8, 4, 50, 0.2, 6

INFERENCE = Settings(N_HEADS, "swiglu", "swiglu")
TRAINING = INFERENCE._replace(p_mlp=P_DROPOUT, p_attention=P_DROPOUT)
KEPT = INFERENCE._replace(edges_are_messages=True)

Run = Callable[[], tuple[Tensor, ...]]


class Case(NamedTuple):
    """One row of the table to be measured."""

    kernel: str
    precision: str
    columns: int = WIDEST

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def precisions(self) -> str:
        return "bf16 fp16" if self.precision == "bf16" else self.precision

    def __str__(self) -> str:
        return f"{self.kernel} {self.precision}" + (f" {self.columns}" if self.columns < WIDEST else "")


def cases(kernels: Sequence[str], precisions: Sequence[str], columns: Sequence[int]) -> list[Case]:
    """Edge kernels have the columns of a message, gates those of the attention's and the layer's MLP, tokens twice as
    many, others any."""
    widths = {kernel: columns for kernel in EDGE_KERNELS}
    widths["joined_norm"] = widths["gene_head"] = [2 * each for each in columns]
    widths["gate_norm"] = sorted({width for each in columns for width in (each, 4 * each)})
    found = []
    for kernel in kernels:
        arithmetic = ("float64",) if kernel == "nearest" else precisions
        found += [Case(kernel, each, width) for each in arithmetic for width in widths.get(kernel, (WIDEST,))]
    return found


class Numbers:
    """Random tensors on a device, and a graph of ``n`` spots."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.n, self.device = n, device
        self.draw = torch.Generator(device).manual_seed(0)
        self.coords = n**0.5 * torch.rand(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.graph = SpotGraph.build(self.coords, N_NEIGHBORS, device=device)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=self.draw, device=self.device)).to(dtype)

    def keys(self) -> Tensor:
        return torch.randint(2**31 - 1, (self.n,), generator=self.draw, device=self.device).int()


class _Attention:
    """Tensors of an attention in the order of its operators."""

    def __init__(self, case: Case, numbers: Numbers) -> None:
        e, dtype = case.columns, case.dtype
        self.d, self.hp, self.graph, self.keys = 2 * e, N_HEADS * 2 * e, numbers.graph, numbers.keys()
        self.terms = numbers.normal(numbers.n, 2 * self.hp + self.d, dtype=dtype)
        self.message_to_logit = numbers.normal(e, self.hp, dtype=dtype, scale=e**-0.5)
        # Which the model leaves in its own precision, under autocast too.
        self.edge = numbers.normal(4, 2 * e, dtype=torch.float32)
        self.logit = numbers.normal(e + 1, dtype=torch.float32, scale=e**-0.5)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.edge, self.message_to_logit, self.logit

    def messages(self) -> Tensor:
        return edge_messages(self.graph.geometry, self.edge, self.message_to_logit, INFERENCE, self.terms.dtype)

    def attend(self, edges: Tensor, settings: Settings) -> Tensor:
        return edge_attention(self.terms, self.graph.neighbors, edges, *self.weights, settings, self.keys)


def _forward(case: Case, numbers: Numbers) -> Run:
    """A step of sampling, with messages that are kept, and one of training."""
    attention = _Attention(case, numbers)
    kept = attention.messages()
    return lambda: (attention.attend(kept, KEPT), attention.attend(attention.graph.geometry, TRAINING))


def _backward(case: Case, numbers: Numbers) -> Run:
    """Both kernels: of the two, one has another launch than the table's."""
    attention = _Attention(case, numbers)
    graph = attention.graph
    grad = torch.randn_like(attention.attend(graph.geometry, TRAINING))
    tensors = (attention.terms, graph.neighbors, graph.geometry, *attention.weights, attention.keys, *graph.arriving)
    return lambda: torch.ops.stflow_fast.edge_attention_backward(grad, *tensors, *TRAINING)


def _messages(case: Case, numbers: Numbers) -> Run:
    attention = _Attention(case, numbers)
    return lambda: (attention.messages(),)


def _dropout(case: Case, numbers: Numbers) -> Run:
    x, keys = numbers.normal(numbers.n, 128, dtype=case.dtype), numbers.keys()
    return lambda: (dropout(x, keys, P_DROPOUT, STREAM),)


def _gate_norm(case: Case, numbers: Numbers) -> Run:
    z, dtype = case.columns, case.dtype
    pre, grad = numbers.normal(numbers.n, 2 * z, dtype=dtype), numbers.normal(numbers.n, z, dtype=dtype)
    affine = numbers.normal(z, dtype=dtype), numbers.normal(z, dtype=dtype)
    rest = pre, affine, numbers.keys(), "swiglu", P_DROPOUT, STREAM
    tensors, settings = rest[:3], rest[3:]
    return lambda: (gate_norm(*rest), *gate_norm_backward(grad, *tensors, torch.empty_like(grad), settings))


def _joined_norm(case: Case, numbers: Numbers) -> Run:
    d, dtype = case.columns, torch.float32
    tokens, x = numbers.normal(numbers.n, d, dtype=dtype), numbers.normal(numbers.n, N_GENES, dtype=dtype)
    columns = d + N_GENES + context_padding(d + N_GENES)
    grad = numbers.normal(numbers.n, columns, dtype=case.dtype)
    return lambda: (
        joined_norm(tokens, x, columns, case.dtype),
        *torch.ops.stflow_fast.joined_norm_backward(grad, tokens, N_GENES, dtype),
    )


def _residual(case: Case, numbers: Numbers) -> Run:
    """A step of sampling, and one of training."""
    tokens, update = (
        numbers.normal(numbers.n, 128, dtype=torch.float32),
        numbers.normal(numbers.n, 128, dtype=case.dtype),
    )
    keys, drop = numbers.keys(), (P_DROPOUT, STREAM)
    return lambda: (
        *residual(tokens, update, None, case.dtype, 0.0, 0),
        *residual(tokens, update, keys, case.dtype, *drop),
    )


def _gene_head(case: Case, numbers: Numbers) -> Run:
    d, dtype = case.columns, case.dtype
    pre, weight = numbers.normal(numbers.n, d, dtype=dtype), numbers.normal(N_GENES, d, dtype=dtype, scale=d**-0.5)
    affine = numbers.normal(d, dtype=torch.float32), numbers.normal(d, dtype=torch.float32)
    head, total = (weight, numbers.normal(N_GENES, dtype=dtype)), torch.zeros(numbers.n, N_GENES, device=pre.device)
    return lambda: (gene_head(pre, affine, head, total, False),)


def _nearest(case: Case, numbers: Numbers) -> Run:
    received: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]] = []

    def search(points: Tensor, code: Tensor, slide_ptr: Tensor, tied: Tensor, spot: Tensor, k: int) -> Tensor:
        received.append((points, code, slide_ptr, tied, spot, k))
        return numbers.graph.neighbors

    SpotGraph.build(numbers.coords, N_NEIGHBORS, device=numbers.device, search=search)
    return lambda: (nearest(*received[0]),)


RUNS: dict[str, Callable[[Case, Numbers], Run]] = {
    "edge_attention_fwd": _forward,
    "edge_attention_bwd_query": _backward,
    "edge_attention_bwd_key": _backward,
    "edge_messages": _messages,
    "dropout": _dropout,
    "gate_norm": _gate_norm,
    "joined_norm": _joined_norm,
    "residual": _residual,
    "gene_head": _gene_head,
    "nearest": _nearest,
}

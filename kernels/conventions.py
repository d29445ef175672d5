"""What a kernel and the reference that defines it (``stflow_fast/ops``) must agree on. No Triton is needed here."""

from __future__ import annotations

from typing import NamedTuple

import torch

LAYERNORM_EPS = 1e-5

MOST_NEIGHBORS = 64
"""K that the kernels take."""

MOST_COLUMNS = 1024
"""E that the edge kernels take (hidden_dim 2048 with SwiGLU): a program holds whole messages."""

MOST_HEAD_COLUMNS = 512
"""hidden_dim that the kernel of a gene head takes: a program holds whole vectors, and the weights of 16 genes."""

CONTEXT_ALIGNMENT = 8
"""Columns of a context: tensor cores want rows of 16-bit numbers to be a multiple of 16 bytes long."""

MULTIPLIER_1, MULTIPLIER_2 = 0x7FEB352D, -0x7B935975
"""Of the 32-bit mixer behind dropout; the second is 0x846CA68B as int32."""

GOLDEN = -0x61C88647
"""2**32 / golden ratio as int32: keeps small values apart."""

STREAM_EDGE_HIDDEN, STREAM_EDGE_OUT, STREAM_LOGIT_HIDDEN, STREAM_LOGIT, STREAM_ATTENTION = range(5)
"""Streams of dropout inside the attention of one layer, whose keys are its own."""


class Settings(NamedTuple):
    """What is not a tensor of the operation: the spec of its reference, dropout, and what ``edges`` holds."""

    n_heads: int
    edge_activation: str
    logit_activation: str
    p_mlp: float = 0.0
    p_attention: float = 0.0
    edges_are_messages: bool = False


class Sizes(NamedTuple):
    """Of the tensors: K, E, H * P and d."""

    k: int
    e: int
    hp: int
    d: int


def context_padding(width: int) -> int:
    """Zeros behind a context of ``width`` columns."""
    return -width % CONTEXT_ALIGNMENT


def dropout_threshold(p: float) -> int:
    """Mixed int32 numbers below it are dropped: a share of ``p``."""
    return int(p * 2**32) - 2**31


def float32_is_tf32() -> bool:
    """torch's setting, by the newer of its two interfaces where there is one: once it is used, the older one raises."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"

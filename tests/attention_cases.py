"""Attentions of every size and kind, and what is asked of the kernels in several files of tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .kernel_cases import (
    Attention,
    AttentionInputs,
    assert_results_agree,
    attention_kernel,
    attention_reference,
    by_block,
)

pytest.importorskip("triton")
kernels = pytest.importorskip("stflow_fast.kernels.edge_attention")
shapes = pytest.importorskip("stflow_fast.kernels.edge_shape")
launch = pytest.importorskip("stflow_fast.kernels.launch")

TOLERANCE = 1e-5

CASES = {
    **{f"{n} spots": Attention(sizes=(n,), k=8) for n in (1, 2, 8, 9, 16, 37)},
    **{f"{k} neighbours": Attention(sizes=(n,), k=k, dh=12) for k, n in ((1, 2), (5, 6), (12, 13))},
    "one neighbour of many": Attention(sizes=(33,), k=1),
    "64 neighbours": Attention(sizes=(65,), k=64, heads=1, e=12, z=12),
    **{f"{heads} heads": Attention(heads=heads, e=24, z=12, dh=8) for heads in (1, 3, 4)},
    "64 wide": Attention(e=64, z=64, dh=32),
    "as hidden_dim 144": Attention(sizes=(11,), heads=1, e=72, z=72, dh=144, p_mlp=0.2),
    "as hidden_dim 512": Attention(sizes=(5,), k=3, heads=1, e=256, z=256, dh=32),
    "messages as of hidden_dim 2048": Attention(sizes=(3,), k=2, heads=1, e=1024, z=80, dh=256, p_attention=0.2),
    "odd widths": Attention(e=24, z=12, dh=5),
    "odd widths, other way round": Attention(e=12, z=24, dh=24),
    "5 wide": Attention(e=5, z=5, dh=12, heads=3),
    "gelu": Attention(activation="gelu", e=12, z=24),
    "relu": Attention(activation="relu"),
    "several programs": Attention(sizes=(60,), k=12),
    "more tiles than programs": Attention(sizes=(8, 40), k=24, heads=1, z=12, e=12, dh=5),
    "lattice with ties": Attention(sizes=(36,), k=6, coords="lattice"),
    "duplicated coordinates": Attention(sizes=(30,), coords="duplicates", activation="gelu"),
    "packed": Attention(sizes=(9, 1, 3, 6, 20)),
    "packed behind a lone spot": Attention(sizes=(1, 30, 4), k=8, e=12, z=5),
    "packed before a lone spot": Attention(sizes=(12, 7, 1), k=6, activation="gelu"),
    "packed with slides of nobody": Attention(sizes=(0, 6, 0, 2)),
    "fewer spots than neighbours": Attention(sizes=(9,), k=12),
    "dropout in the MLPs": Attention(p_mlp=0.3, z=24),
    "dropout of the attention": Attention(p_attention=0.4, heads=3),
    "dropout": Attention(sizes=(1, 20), p_mlp=0.2, p_attention=0.4, e=24, z=12, dh=5, heads=3, k=8),
    "dropout, gelu": Attention(p_mlp=0.2, p_attention=0.2, activation="gelu"),
    "dropout, relu": Attention(p_mlp=0.2, p_attention=0.2, activation="relu", e=24),
    "dropout over 64 neighbours": Attention(sizes=(12,), k=64, heads=1, p_mlp=0.5, p_attention=0.5),
}


def assert_equals_reference(inputs: AttentionInputs, tolerance: float = TOLERANCE) -> None:
    found, expected = (by_block(made(inputs), inputs.case) for made in (attention_kernel, attention_reference))
    assert_results_agree(found, expected, tolerance)


def keep_messages(arguments: dict[str, object]) -> dict[str, object]:
    settings = arguments["settings"]
    messages = kernels.edge_messages(
        arguments["edges"], arguments["edge"], arguments["message_to_logit"], settings, arguments["terms"].dtype
    )
    return {**arguments, "edges": messages, "settings": settings._replace(edges_are_messages=True)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how every edge kernel is launched."""

    def set_rows(rows: int, programs: int) -> None:
        monkeypatch.setattr(shapes, "launch_of", lambda *_: launch.Launch(rows, 4, programs))

    return set_rows

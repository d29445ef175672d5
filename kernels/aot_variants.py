"""What ``aot`` compiles: every kernel in the types, sizes and launches that models ask for, and the work of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from . import (
    dropout,
    edge_attention_backward,
    edge_attention_forward,
    gated_mlp,
    gene_head,
    joined_norm,
    neighbors,
    residual,
)
from .conventions import Settings, Sizes, context_padding, dropout_threshold
from .edge_shape import WHOLE_SPOTS, EdgeShape, columns_of, edge_shape, shared_bytes
from .launch import RESERVED, SHARED_MEMORY, TABLE, Launch, element_size, find_row, halves_of, launch_of


class Variant(NamedTuple):
    """A kernel with everything that its compilation depends on."""

    kernel: Any  # triton.JITFunction
    name: str
    types: dict[str, str]  # of its arguments; of one that is absent, "constexpr"
    constants: dict[str, Any]
    launch: Launch
    default: bool
    trips: tuple[int, ...] | None  # how often its loops run in a program, in the order of their heads, if that is known
    rows: int  # edges (of a gate: spots) that a program, or one turn of its outermost loop, treats
    work: dict[str, float]  # per row
    measured: bool = False  # its launch, on a GPU
    estimate: int | None = None  # of its shared memory, by which a GPU with less is refused; none for another tile
    fused: bool = True  # whether products and sums may be


PRECISIONS = ("bf16", "fp16", "tf32", "ieee")
POINTER = {"bf16": "*bf16", "fp16": "*fp16"}
EDGE_TYPES = {
    **{name: "*fp32" for name in ("edges", "geometry", "edge", "logit", "edge_gradients")},
    **{name: "*fp32" for name in ("grad_edge", "grad_weight", "grad_logit")},
    **{name: "*i64" for name in ("neighbors", "arriving", "arriving_ptr")},
    "dropout_keys": "*i32",
    "n": "i32",
    "n_edges": "i32",  # of fewer than 2^31
}
EDGE_KERNELS = {
    "edge_attention_fwd": edge_attention_forward.edge_attention_fwd_kernel,
    "edge_attention_bwd_query": edge_attention_backward.edge_attention_bwd_query_kernel,
    "edge_attention_bwd_key": edge_attention_backward.edge_attention_bwd_key_kernel,
    "edge_messages": edge_attention_forward.edge_messages_kernel,
}


class EdgeCase(NamedTuple):
    """What an edge kernel is compiled for; the model's default but for what is named."""

    gate: str = "swiglu"
    k: int = 8
    p: float = 0.0
    kept: bool = False
    hidden_dim: int = 128
    n_heads: int = 4
    pairwise_hidden_dim: int | None = None

    def __str__(self) -> str:
        width = f" hidden_dim={self.hidden_dim}" if self.hidden_dim != 128 else ""
        width += f" pairwise={self.pairwise_hidden_dim}" if self.pairwise_hidden_dim else ""
        rest = (f" dropout={self.p}" if self.p else "") + (" kept" if self.kept else "")
        return f"{self.gate} K={self.k}{width}{rest}"


EDGE_CASES = (
    EdgeCase(),
    EdgeCase(p=0.2),
    EdgeCase(kept=True),
    EdgeCase("gelu"),
    EdgeCase("relu", p=0.2),
    EdgeCase(k=5),
    EdgeCase(k=24),
    EdgeCase(k=64),
    EdgeCase(k=1, p=0.2),
    EdgeCase(pairwise_hidden_dim=64),
    EdgeCase(hidden_dim=48, n_heads=3, p=0.2),
    EdgeCase(hidden_dim=144, n_heads=1),
    EdgeCase(hidden_dim=256),
    EdgeCase("gelu", hidden_dim=256),
    EdgeCase(hidden_dim=512),
    EdgeCase(hidden_dim=1024),
    EdgeCase(k=64, hidden_dim=1024),
    EdgeCase(hidden_dim=2048),
)


def edge_variants(arch: int, tile: Launch | None = None) -> Iterator[Variant]:
    """The edge kernels: precisions, gates, dropout, kept messages, numbers of neighbours, widths; without what a GPU
    refuses for its shared memory."""
    for name in EDGE_KERNELS:
        for precision in PRECISIONS:
            for case in EDGE_CASES:
                if (case.kept and name != "edge_attention_fwd") or (
                    name == "edge_messages" and (case.p or case.k != 8)
                ):
                    continue
                variant = _edge_variant(name, arch, precision, case, tile)
                if variant.default or variant.estimate is None or variant.estimate + RESERVED <= SHARED_MEMORY[arch]:
                    yield variant


def _edge_variant(name: str, arch: int, precision: str, case: EdgeCase, tile: Launch | None) -> Variant:
    gate, k, p, kept, width, n_heads, pairwise = case
    e = (pairwise or width) // halves_of("gate", gate)
    d = n_heads if name == "edge_messages" else width  # a launch of which knows of no d
    sizes = Sizes(k=k, e=e, hp=n_heads * width, d=d)
    settings = Settings(n_heads, gate, "swiglu" if gate == "swiglu" else "gelu", p, p, kept)
    shape, launch = edge_shape(name, arch, precision, sizes, settings, tile)
    kernel = EDGE_KERNELS[name]
    typed = POINTER.get(precision, "*fp32")
    types = {argument: EDGE_TYPES.get(argument, typed) for argument in kernel.arg_names}
    constants: dict[str, Any] = {"S": shape}
    if kept:
        types["edges"] = typed
    if not p and "dropout_keys" in types:
        types["dropout_keys"], constants["dropout_keys"] = "constexpr", None
    return Variant(
        kernel,
        f"{name} {precision} {case}",
        {**types, "S": "constexpr"},
        constants,
        launch,
        default=case in EDGE_CASES[:3] and precision != "fp16",  # which compiles to what bf16 does
        trips=_edge_trips(name, shape),
        rows=shape.spots * k if name in WHOLE_SPOTS else shape.rows,
        work=edge_work(name, shape, element_size(precision)),
        measured=not tile and find_row(TABLE, name, arch, precision, columns_of(sizes, settings)).measured,
        estimate=None if tile else shared_bytes(name, arch, precision, sizes, settings),
    )


def _edge_trips(name: str, shape: EdgeShape) -> tuple[int, ...]:
    frames, heads = (() if shape.kept else (4,)), (shape.n_heads,)
    more_parts = (shape.z_parts - 1,) if shape.z_parts > 1 else ()
    return {
        "edge_attention_fwd": (*frames, *heads, *more_parts),
        "edge_attention_bwd_query": (1, 4, *heads, *more_parts, *more_parts, 4),
        "edge_attention_bwd_key": (1, 1),
        "edge_messages": (4,),
    }[name]


def edge_work(name: str, shape: EdgeShape, size: int) -> dict[str, float]:
    """Counted per edge from the mathematics; of the key-owned backward per edge and head."""
    gates = {"message": 4 * shape.e, "logit": shape.n_heads * shape.z}
    matrix = 2 * shape.e * shape.hp
    message = 0 if shape.kept else gates["message"]
    row = (shape.hp + shape.d) * size
    numbers = 4 * edge_attention_backward.EDGE_NUMBERS.value
    per_spot = (shape.hp + shape.context) * size / shape.k
    streamed = per_spot + 8 + (shape.e * size if shape.kept else 12)
    return {
        "edge_attention_fwd": {
            "matrix_flops": matrix,
            "gates": message + gates["logit"],
            "bytes_gathered": row,
            "bytes_streamed": streamed,
        },
        "edge_attention_bwd_query": {
            "matrix_flops": 2 * matrix,
            "gates": 2 * message + gates["logit"],
            "bytes_gathered": row,
            "bytes_streamed": streamed + per_spot + shape.e * size + numbers * shape.n_heads,
        },
        "edge_attention_bwd_key": {
            "matrix_flops": 2 * matrix / shape.n_heads,
            "gates": shape.z,
            "bytes_gathered": (shape.p + shape.dh + 2 * shape.e) * size,
            "bytes_streamed": (shape.p + shape.dh) * size * 2 / shape.k + 8 + numbers,
        },
        "edge_messages": {
            "matrix_flops": 0,
            "gates": message,
            "bytes_gathered": 0,
            "bytes_streamed": 12 + shape.e * size,
        },
    }[name]


def streaming(numbers: int, precision: str) -> dict[str, float]:
    """The work of what reads and writes so many numbers a spot, and nothing else."""
    return moving((numbers, POINTER.get(precision, "*fp32")))


def moving(*tensors: tuple[int, str]) -> dict[str, float]:
    """:func:`streaming` of numbers a spot of several types."""
    bytes_streamed = sum(numbers * (4 if pointer == "*fp32" else 2) for numbers, pointer in tensors)
    return {"matrix_flops": 0, "gates": 0, "bytes_gathered": 0, "bytes_streamed": bytes_streamed}


GATE_TYPES = {"keys": "*i32", "grad_gain": "*fp32", "grad_bias": "*fp32", "n": "i32", "stream": "i32"}


def gate_variants(arch: int) -> Iterator[Variant]:
    """The gated MLP of the default layer (512 columns) and of its attention (128), with and without dropout; the gene
    head, whose LayerNorm nothing casts, and whose backward does not make its result again."""
    for kernel in (gated_mlp.gate_norm_fwd_kernel, gated_mlp.gate_norm_bwd_kernel):
        for precision in PRECISIONS:
            for gate, p, columns in (
                ("swiglu", 0.0, 512),
                ("swiglu", 0.0, 128),
                ("swiglu", 0.2, 512),
                ("swiglu", 0.2, 128),
                ("gelu", 0.2, 512),
                ("gelu", 0.0, 128),
                ("relu", 0.0, 192),
                ("swiglu", 0.2, 4096),
            ):
                shape, launch = gated_mlp.gate_shape(arch, precision, columns, gate, p)
                typed = POINTER.get(precision, "*fp32")
                types = {argument: GATE_TYPES.get(argument, typed) for argument in kernel.arg_names}
                head = (gate, p) == ("gelu", 0.0)
                types |= dict.fromkeys(("gain", "bias"), "*fp32") if head else {}
                constants: dict[str, Any] = {"S": shape}
                absent = ["keys"] * (not p) + ["hidden"] * (head and kernel is gated_mlp.gate_norm_bwd_kernel)
                types |= dict.fromkeys(absent, "constexpr")
                constants |= dict.fromkeys(absent)
                name = f"{_named(kernel)} {precision} {gate} P={columns}"
                yield Variant(
                    kernel,
                    name + (f" dropout={p}" if p else ""),
                    {**types, "S": "constexpr"},
                    constants,
                    launch,
                    default=(head or (gate == "swiglu" and columns <= 512)) and precision != "fp16",
                    measured=find_row(TABLE, "gate_norm", arch, precision, shape.z_pad).measured,
                    trips=() if kernel is gated_mlp.gate_norm_fwd_kernel else (1,),
                    rows=shape.rows,
                    work=streaming(
                        (shape.p + shape.z) * (2 if kernel is gated_mlp.gate_norm_bwd_kernel else 1), precision
                    )
                    | {"gates": shape.z},
                )


def joined_variants(arch: int) -> Iterator[Variant]:
    """What the product of a layer's terms reads, of the default model and the published 50 genes: of the first layer,
    and of others, whose expression comes from a product in the type of autocast. Tokens are in it too in training."""
    genes = 50
    kernels = joined_norm.joined_norm_fwd_kernel, joined_norm.joined_norm_bwd_kernel
    for kernel, precision, d in itertools.product(kernels, PRECISIONS, (128, 512)):
        typed = POINTER.get(precision, "*fp32")
        columns = d + genes + context_padding(d + genes)
        shape, launch = joined_norm.joined_shape(arch, precision, d, genes, columns)
        for tokens, read in dict.fromkeys(itertools.product(("*fp32", typed), repeat=2)):
            types = dict.fromkeys(("tokens", "grad_tokens"), tokens) | dict.fromkeys(("x", "grad_x"), read)
            types |= dict.fromkeys(("joined", "grad_joined"), typed) | {"n": "i32", "S": "constexpr"}
            backward = kernel is kernels[1]
            yield Variant(
                kernel,
                f"{_named(kernel)} {precision} d={d}" + _of_types(typed, tokens=tokens, x=read),
                {name: types[name] for name in kernel.arg_names},
                {"S": shape},
                launch,
                default=d == 128 and precision != "fp16" and (not backward or tokens == typed),
                trips=None,
                rows=shape.rows,
                work=moving(((1 + backward) * d, tokens), (genes, read), (columns, typed)),
            )


def _named(kernel: Any) -> str:
    name: str = kernel.__name__
    return name.removesuffix("_kernel")


def _of_types(typed: str, **pointers: str) -> str:
    """In a variant's name, where precision leaves them open."""
    return "".join(f" {name} {pointer[1:]}" for name, pointer in pointers.items() if typed != "*fp32")


def residual_variants(arch: int) -> Iterator[Variant]:
    """The residual additions of a layer of the default model. Under autocast tokens are float32 in sampling alone."""
    d = 128
    for precision, p in itertools.product(PRECISIONS, (0.0, 0.2)):
        typed = POINTER.get(precision, "*fp32")
        for tokens in dict.fromkeys(("*fp32", typed)):
            shape, launch = residual.residual_shape(arch, precision, d, tokens != typed, p)
            types = {"tokens": tokens, "update": typed, "keys": "*i32", "total": tokens, "cast": typed}
            constants: dict[str, Any] = {"S": shape}
            if not p:
                types["keys"], constants["keys"] = "constexpr", None
            yield Variant(
                residual.residual_kernel,
                f"residual {precision}" + _of_types(typed, tokens=tokens) + (f" dropout={p}" if p else ""),
                {**types, "n": "i32", "stream": "i32", "S": "constexpr"},
                constants,
                launch,
                default=precision != "fp16" and (tokens == typed or not p),
                trips=(),
                rows=shape.rows,
                work=moving((2 * d, tokens), ((2 if tokens != typed else 1) * d, typed)),
            )


def head_variants(arch: int) -> Iterator[Variant]:
    """The gene head of sampling: the published 50 genes, and as many as the default model has without folding."""
    kernel = gene_head.gene_head_kernel
    for precision, (d, genes, relu) in itertools.product(
        PRECISIONS, ((128, 50, False), (128, 50, True), (128, 512, False), (512, 50, False))
    ):
        shape, launch = gene_head.head_shape(arch, precision, d, genes, relu)
        typed = POINTER.get(precision, "*fp32")
        types = dict.fromkeys(kernel.arg_names, typed) | dict.fromkeys(("gain", "shift", "total"), "*fp32")
        parts = -(-genes // shape.part)
        yield Variant(
            kernel,
            f"gene_head {precision} d={d} G={genes}" + (" relu" if relu else ""),
            types | {"n": "i32", "S": "constexpr"},
            {"S": shape},
            launch,
            default=(d, genes, relu) == (128, 50, False) and precision != "fp16",
            trips=(parts,) if parts > 1 else (),
            rows=shape.rows,
            work=moving((d + genes, typed), (2 * genes, "*fp32")) | {"matrix_flops": 2 * d * genes, "gates": d},
        )


def other_variants(arch: int) -> Iterator[Variant]:
    """Dropout, and the neighbour search.

    The default model drops tokens and, of the published 50, genes. In bf16 too it drops float32: CUDA's autocast leaves
    the LayerNorm before the gene head in it.
    """
    for precision in ("bf16", "ieee"):
        for columns in (128, 50):
            launch = launch_of("dropout", arch, precision)
            numbers = {"COLUMNS": columns, "ROWS": launch.rows, "THRESHOLD": dropout_threshold(0.2), "SCALE": 1.25}
            typed = POINTER.get(precision, "*fp32")
            types = {"x": typed, "keys": "*i32", "out": typed, "n": "i32", "stream": "i32"}
            types |= dict.fromkeys(numbers, "constexpr")
            name = f"dropout {precision}" + (f" C={columns}" if columns != 128 else "")
            work = streaming(2 * columns, precision)
            yield Variant(dropout.dropout_kernel, name, types, numbers, launch, True, (), launch.rows, work)
    search = neighbors.nearest_kernel
    launch = launch_of("nearest", arch, "float64")
    numbers = {"CELLS": 9, "BLOCK": launch.rows, "COLS": neighbors.COLS}
    doubles, scalars = ("query_ptr", "tied_ptr", "border_ptr", "point_ptr"), ("n", "k")
    types = {name: "*fp64" if name in doubles else "i32" if name in scalars else "*i32" for name in search.arg_names}
    types |= dict.fromkeys(numbers, "constexpr")
    yield Variant(search, "nearest", types, numbers, launch, True, None, launch.rows, {}, fused=neighbors.FUSED)


def variants_of_spots(arch: int) -> Iterator[Variant]:
    """All but the edge kernels."""
    for variants in (gate_variants, joined_variants, residual_variants, head_variants, other_variants):
        yield from variants(arch)

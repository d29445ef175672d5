"""Kernels compiled for GPUs that are not there: no spills by default, and the launch as Triton would make it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stflow_fast.kernels import aot, launch, modules

KERNELS = {
    kernel.__name__: kernel for module in modules() for name, kernel in vars(module).items() if name.endswith("_kernel")
}


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    """A process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("arch", [80, 90])
def test_default_variants_spill_little_and_leave_room_for_two_programs(arch: int, tmp_path: Path) -> None:
    done = compiled("-m", "stflow_fast.kernels.aot", "--default", "--arch", str(arch), "--json", str(tmp_path / "rows"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["kernel"] for row in rows} == set(KERNELS)
    for row in rows:
        assert (row["arch"], row["default"]) == (arch, True)
        assert row["spill_bytes"] <= aot.SMALL_SPILL or row["measured"]
        assert row["registers"] <= 255
        assert row["instructions"]["EXIT"] >= 1
    forward = next(row for row in rows if row["variant"] == "edge_attention_fwd bf16 swiglu K=8")
    assert {"MUFU", "SHFL", "LDG.128"} <= set(forward["instructions"])
    assert forward["instructions"].get("HGMMA", 0) + forward["instructions"].get("HMMA", 0) > 0
    assert forward["work_per_row"]["matrix_flops"] == 2 * 64 * 512
    assert forward["work_per_row"]["gates"] == 4 * 64 + 4 * 64


def test_no_kernel_has_more_than_sixteen_arguments() -> None:
    assert KERNELS
    assert {name: len(kernel.arg_names) for name, kernel in KERNELS.items() if len(kernel.arg_names) > 16} == {}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, []),
        ({"spill_bytes": 24}, ["spills 24 bytes"]),
        ({"spill_bytes": 16}, []),
        ({"spill_bytes": 600, "measured": True}, []),
        ({"spill_bytes": 24, "default": False}, []),
        ({"shared_bytes": 116_000}, ["needs 116000 bytes of shared memory; two programs do not fit"]),
        ({"shared_bytes": 115_000}, []),
        ({"shared_bytes": 233_000, "default": False}, ["needs 233000 bytes of shared memory; there is no room for it"]),
        ({"shared_bytes": 115_000, "arch": 80}, ["needs 115000 bytes of shared memory; two programs do not fit"]),
        ({"shared_bytes": 9000, "estimated_shared_bytes": 9000}, []),
        (
            {"shared_bytes": 9000, "estimated_shared_bytes": 8999},
            ["needs 9000 bytes of shared memory; 8999 were estimated"],
        ),
        ({"estimated_shared_bytes": 300_000}, ["is refused, for 300000 bytes of shared memory were estimated"]),
        ({"instructions": {"HGMMA": 4}, "estimated_shared_bytes": 0}, []),
        (
            {"instructions": {"HGMMA.R": 4}, "estimated_shared_bytes": 0},
            ["wgmma reads a left side from registers"],
        ),
        # Another tile than the table's is for who looks into it.
        ({"instructions": {"HGMMA.R": 4}}, []),
    ],
)
def test_faults_of_a_row(changed: dict[str, object], fault: list[str]) -> None:
    row = {"spill_bytes": 0, "shared_bytes": 0, "estimated_shared_bytes": None, "arch": 90, "default": True}
    row |= {"instructions": {}, "measured": False, **changed}
    assert aot.faults(row) == fault


SASS = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0010*/                   FFMA R1, R1, R1, R1 ;
.L_x_2:
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/                   STG.E.64 [R2.64], R4 ;
        /*0060*/                   EXIT ;
"""


def test_instructions_are_weighted_by_their_loops() -> None:
    once, weighted = aot.count_instructions(SASS, (3, 4))
    assert once == {"BRA": 2, "LDG.128": 1, "FFMA": 1, "MUFU": 1, "STG.64": 1, "EXIT": 1}
    assert weighted == {"LDG.128": 1, "FFMA": 3, "MUFU": 12, "BRA": 15, "STG.64": 1, "EXIT": 1}
    assert aot.count_instructions(SASS, (3,))[1] is None


@pytest.mark.parametrize(
    ("operands", "name"),
    [("R40, gdesc[UR12].tnspA.tnspB, R40", "HGMMA"), ("R56, R88, gdesc[UR12].tnspB, RZ, !UPT, gsb0", "HGMMA.R")],
)
def test_a_wgmma_that_reads_from_registers_is_told_apart(operands: str, name: str) -> None:
    once, _ = aot.count_instructions(f"        /*3010*/                   HGMMA.64x64x16.F32.BF16 {operands} ;", None)
    assert once == {name: 1}


@pytest.mark.parametrize("match", ["bf16 swiglu K=64", "edge_attention_fwd tf32 swiglu K=64"])
def test_no_wgmma_reads_from_registers_where_a_spot_has_more_than_32_neighbours(match: str, tmp_path: Path) -> None:
    done = compiled("-m", "stflow_fast.kernels.aot", "--arch", "90", "--match", match, "--json", str(tmp_path / "rows"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["instructions"]["HMMA"] > 0
        assert "HGMMA.R" not in row["instructions"]


def test_the_forward_of_64_rows_spills_nothing_and_is_without_wgmma(tmp_path: Path) -> None:
    """It is tried by autotune, beside the table's row."""
    arguments = ("--arch", "90", "--tile", "64x4", "--match", "edge_attention_fwd bf16", "--default")
    done = compiled("-m", "stflow_fast.kernels.aot", *arguments, "--json", str(tmp_path / "rows"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert (row["tile"], row["warps"], row["spill_bytes"]) == (64, 4, 0)
        assert row["instructions"]["HMMA"] > 0
        assert "HGMMA.R" not in row["instructions"]


def test_an_unknown_architecture_is_refused() -> None:
    done = compiled("-m", "stflow_fast.kernels.aot", "--arch", "75")
    assert done.returncode == 2
    assert "--arch: must be of 80, 86, 89, 90, 100, 120, not 75" in done.stderr


def test_interpreted_kernels_are_not_compiled() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stflow_fast.kernels.aot", "--default"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 1
    assert "TRITON_INTERPRET: is 1" in done.stderr


ABSENT_GPU = """
import torch
from stflow_fast.benchmarks.gpu.variants import Variants, absent_gpu
from stflow_fast.kernels import dropout, edge_attention, gated_mlp, gene_head, joined_norm, neighbors, residual

absent = absent_gpu(90, Variants(0, 1), lambda kernel, made: launched(kernel, made))
absent.__enter__()  # to the end of the process
"""

LAUNCH = """
def launched(kernel, made):
    print(kernel.__name__, made.metadata.num_warps, "cubin" in made.asm)

n, k = 1000, 8
half = lambda *size: torch.zeros(*size, dtype=torch.bfloat16, requires_grad=True)
keys = torch.zeros(n, dtype=torch.int32)
table = torch.zeros(n, k, dtype=torch.int64)
for p in (0.0, 0.2):
    settings = edge_attention.Settings(4, "swiglu", "swiglu", p, p)
    weights = torch.zeros(4, 128), half(64, 512), torch.zeros(65)
    context = edge_attention.edge_attention(
        half(n, 1152), table, torch.zeros(n, k, 3), *weights, settings, keys if p else None
    )
    context.sum().backward()
    edge_attention.edge_messages(torch.zeros(n, k, 3), *weights[:2], settings, torch.bfloat16)
    hidden = half(512, 128), half(512), half(256), half(256), half(128, 256), half(128)
    gated_mlp.gated_mlp(half(n, 128), hidden, "swiglu", p, keys if p else None, 3).sum().backward()
    dropout.dropout(half(n, 128), keys, p, 3)
    total, cast = residual.residual(torch.ones(n, 128, requires_grad=True), half(n, 128), keys, torch.bfloat16, p, 3)
    (total.sum() + cast.sum()).backward()
gated_mlp.gelu_norm(half(n, 128), torch.ones(128), torch.ones(128)).sum().backward()
tokens = torch.ones(n, 128, requires_grad=True)
joined_norm.joined_norm(tokens, torch.ones(n, 50), 184, torch.bfloat16).sum().backward()
with torch.no_grad():
    affine, head = (torch.ones(128), torch.ones(128)), (half(50, 128), half(50))
    gene_head.gene_head(half(n, 128), affine, head, torch.ones(n, 50), False)
points = torch.arange(2.0 * n, dtype=torch.float64).view(n, 2)
grid = neighbors.spot_grid(points, torch.tensor([0, n]))
code, spot = neighbors.morton_code(grid.position.long()), torch.arange(n)
neighbors.nearest(points, code, torch.tensor([0, n]), torch.zeros(n, dtype=torch.float64), spot, k)
"""


def test_launches_pass_through_triton_as_on_a_gpu() -> None:
    """The interpreter and the compiler by itself know nothing of how a launch binds and specialises its arguments."""
    done = compiled("-c", ABSENT_GPU + LAUNCH)
    assert done.returncode == 0, done.stderr
    launched = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _, _ in launched} == set(KERNELS)
    assert all(made == "True" for _, _, made in launched)
    warps = launch.launch_of("edge_attention_fwd", 90, "bf16", 64).warps
    assert ["edge_attention_fwd_kernel", str(warps), "True"] in launched


KEYS = """
from stflow_fast.kernels.edge_attention_forward import edge_attention_fwd_kernel as forward
from stflow_fast.kernels.gated_mlp import gate_norm_fwd_kernel as gate
print(*sorted(kernel.__name__ + kernel.cache_key for kernel in {order}))
"""


def test_a_kernel_has_one_key_whichever_is_launched_first() -> None:
    """By which Triton finds it compiled."""
    found = {compiled("-c", KEYS.format(order=order)).stdout for order in ("(gate, forward)", "(forward, gate)")}
    assert len(found) == 1
    assert "gate_norm_fwd_kernel" in found.pop()


MODEL = """
import torch.nn.functional as F
import triton.compiler
from stflow_fast import Denoiser, DenoiserConfig, Sampler
from stflow_fast.kernels import aot_variants

def described(types, constants, options):
    return types, constants, {name: options[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}

def bound(source, target, options):
    constants = {source.fn.arg_names[i]: value for (i,), value in source.constants.items()}
    return described(source.signature, constants, options)

def launched(kernel, made):
    if (kernel, made) not in launches:
        launches.append((kernel, made))

triton.compiler.compile = bound  # nothing is compiled here
layer_norm = F.layer_norm
F.layer_norm = lambda x, *rest: layer_norm(x.float(), *rest)  # as under CUDA's autocast; the CPU's leaves bfloat16
launches = []
slide, x_0 = (torch.rand(1000, 32), torch.rand(1000, 2)), torch.rand(1000, 50)
model = Denoiser(DenoiserConfig(n_genes=50, feature_dim=32))
graph = model.build_graph(slide[1])
for precision in ("bf16", "ieee", "tf32"):
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    for dropout in (False, True):
        model.train(dropout)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model.denoise(graph, x_0, model.image_transform(slide[0]), torch.rand(1)).sum().backward()
    sampler = Sampler(model, precision="bf16" if precision == "bf16" else "float32")  # which keeps messages
    sampler.prepare(slide).draw(x_0)
variants = (*aot_variants.edge_variants(90), *aot_variants.variants_of_spots(90))
compiled = [
    (each.kernel, described(each.types, each.constants, each.launch.options | {"enable_fp_fusion": each.fused}))
    for each in variants
    if each.default
]
for ours, others in ((launches, compiled), (compiled, launches)):
    for kernel, what in ours:
        print(kernel.__name__, (kernel, what) in others, what)
"""


def test_what_the_default_model_launches_is_what_is_compiled_by_default() -> None:
    """And the other way round: types, constants and options, in training with dropout and without, and in sampling.
    Which integers and addresses are multiples of 16 is not compared."""
    done = compiled("-c", ABSENT_GPU + MODEL)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert {name for name, _, _ in lines} == set(KERNELS)
    assert [line for line in lines if line[1] != "True"] == []

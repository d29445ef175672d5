"""The opponents of the benchmarks compute what they say, and say where they cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.opponents.dot_product import dense_softmax, flash_attention, neighbor_attention, neighbor_block_mask
from benchmarks.opponents.message_passing import scatter_softmax
from benchmarks.suite.providers import PROVIDERS, Provider
from benchmarks.suite.slides import BenchmarkSlide, benchmark_slide
from stflow_fast import DenoiserConfig
from stflow_fast.graph import SpotGraph
from stflow_fast.ops import COMPILED_BLOCK, cpp_compiler, use_backend

from .golden import relative_error

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("reference", "reference_kept_edges", "reference_compiled")
PUBLISHED = ("eager_stflow", "message_passing", *PLAIN, "triton", "triton_kept_edges")
PLENTY = 2**62

pytestmark = pytest.mark.usefixtures("same_frequencies")

needs_compiler = pytest.mark.skipif(cpp_compiler() is None, reason="no C++ compiler")
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc")


def small_config(**settings: int) -> DenoiserConfig:
    widths = {"n_genes": 5, "hidden_dim": 32, "pairwise_hidden_dim": 16, "n_layers": 2, "n_heads": 2, "n_neighbors": 8}
    return DenoiserConfig(feature_dim=7, dropout=0.0, attn_dropout=0.0, **(widths | settings))


def prepared(
    name: str, slide: BenchmarkSlide, config: DenoiserConfig | None = None, dtype: torch.dtype = torch.float64
) -> Provider:
    provider = PROVIDERS[name](config or small_config()).to("cpu", dtype)
    provider.prepare(slide)
    return provider


@pytest.fixture(scope="module")
def slide() -> BenchmarkSlide:
    return of_dtype(benchmark_slide("visium_jittered", 300, seed=1, n_genes=5, feature_dim=7), torch.float64)


def of_dtype(slide: BenchmarkSlide, dtype: torch.dtype) -> BenchmarkSlide:
    return slide._replace(x_0=slide.x_0.to(dtype), x_1=slide.x_1.to(dtype))


def gradients(provider: Provider, slide: BenchmarkSlide) -> dict[str, Tensor]:
    """Of every parameter, and of the expression that goes in."""
    x_t = slide.x_0.clone().requires_grad_()
    named = {**dict(provider.model.named_parameters()), "x_t": x_t}
    found = torch.autograd.grad(provider.loss(x_t, slide.x_1, 0.3), tuple(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        if scale < 1e-12:  # a bias in front of a softmax: its gradient is rounding
            assert found[name].abs().max() < tolerance * largest, name
        else:
            assert (found[name] - gradient).abs().max() < tolerance * scale, name


@pytest.mark.parametrize("name", ["eager_stflow", "message_passing"])
def test_published_function_and_all_its_gradients(slide: BenchmarkSlide, name: str) -> None:
    found, expected = prepared(name, slide), prepared("reference", slide)
    assert relative_error(found.denoise(slide.x_0, 0.3), expected.denoise(slide.x_0, 0.3)) < 1e-9
    assert_same_gradients(gradients(found, slide), gradients(expected, slide), 1e-9)


def test_published_function_and_all_its_gradients_with_more_genes_than_the_heads_read() -> None:
    slide = of_dtype(benchmark_slide("visium_jittered", 40, seed=1, n_genes=90, feature_dim=7), torch.float64)
    found, expected = (prepared(name, slide, small_config(n_genes=90)) for name in ("reference", "eager_stflow"))
    assert relative_error(found.denoise(slide.x_0, 0.3), expected.denoise(slide.x_0, 0.3)) < 1e-9
    assert_same_gradients(gradients(found, slide), gradients(expected, slide), 1e-9)


def test_message_passing_in_float32(slide: BenchmarkSlide) -> None:
    expected = prepared("reference", slide).denoise(slide.x_0, 0.3)
    found = prepared("message_passing", slide, dtype=torch.float32).denoise(slide.x_0.float(), 0.3)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("n", [1, 5])
def test_message_passing_with_missing_neighbours(slide: BenchmarkSlide, n: int) -> None:
    few = BenchmarkSlide(*(part[:n] for part in slide))
    found, expected = (prepared(name, few).denoise(few.x_0, 0.3) for name in ("message_passing", "reference"))
    assert relative_error(found, expected) < 1e-9


def test_scatter_softmax_of_uneven_groups_in_any_order() -> None:
    index = torch.tensor([2, 0, 2, 2, 0, 1])
    logits = 100 * torch.randn(6, 3, dtype=torch.float64)
    found = scatter_softmax(logits, index, 4)
    for group in range(3):
        torch.testing.assert_close(found[index == group], logits[index == group].softmax(dim=0))


def test_dense_attention_is_the_reference_with_all_other_spots_as_neighbours() -> None:
    n = 24
    slide = of_dtype(benchmark_slide("uniform", n, n_genes=5, feature_dim=7), torch.float64)
    found = prepared("dense_attention", slide)
    expected = prepared("reference", slide, small_config(n_neighbors=n - 1))
    assert relative_error(found.denoise(slide.x_0, 0.3), expected.denoise(slide.x_0, 0.3)) < 1e-9
    assert_same_gradients(gradients(found, slide), gradients(expected, slide), 1e-9)


@needs_compiler
@pytest.mark.parametrize("name", PUBLISHED)
def test_same_sample_as_eager(name: str) -> None:
    config = small_config(n_layers=1)
    slide = benchmark_slide("visium_jittered", COMPILED_BLOCK + 88, seed=2, n_genes=5, feature_dim=7)
    if name.startswith("triton"):  # interpreted, slowly
        slide = BenchmarkSlide(*(part[:24] for part in slide))
    assert PROVIDERS[name](config).why_not("cpu", len(slide.coords), PLENTY) is None
    expected = prepared("eager_stflow", slide, config, torch.float32).sample(slide.x_0)
    assert relative_error(prepared(name, slide, config, torch.float32).sample(slide.x_0), expected) < 1e-4


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_one_call_of_ours_is_a_call_of_eager(name: str) -> None:
    slide = benchmark_slide("visium_jittered", 24, n_genes=5, feature_dim=7)
    expected = prepared("eager_stflow", slide, dtype=torch.float32).denoise(slide.x_0, 0.6)
    assert relative_error(prepared(name, slide, dtype=torch.float32).denoise(slide.x_0, 0.6), expected) < 1e-4


def test_dense_softmax_and_flash_agree(slide: BenchmarkSlide) -> None:
    slide = of_dtype(slide, torch.float32)
    dense, flash = (prepared(name, slide, dtype=torch.float32) for name in ("dense_softmax", "flash_attention"))
    assert relative_error(flash.denoise(slide.x_0, 0.3), dense.denoise(slide.x_0, 0.3)) < 1e-5
    assert_same_gradients(gradients(flash, slide), gradients(dense, slide), 1e-4)


@needs_compiler
@pytest.mark.parametrize("n", [300, 170, 5])  # of several sizes in one process, and with missing neighbours
def test_flex_attention_is_the_masked_softmax(slide: BenchmarkSlide, n: int) -> None:
    graph = SpotGraph.build(slide.coords[:n], 8)
    mask = (graph.neighbors.unsqueeze(-1) == torch.arange(n)).any(dim=1)
    query, key, value = torch.randn(3, 1, 2, n, 16)
    with torch.no_grad():
        found, expected = neighbor_attention(graph)(query, key, value), dense_softmax(query, key, value, mask)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(flash_attention(query, key, value), expected) > 1e-2


@needs_compiler
def test_flex_attention_follows_the_order_of_the_spots(slide: BenchmarkSlide) -> None:
    """The whole network, in rows of the graph and back."""
    slide = of_dtype(slide, torch.float32)
    flex = prepared("flex_attention", slide, dtype=torch.float32)
    mask = torch.zeros(300, 300, dtype=torch.bool)
    mask.scatter_(1, SpotGraph.build(slide.coords, 8).neighbors, True)
    dense = prepared("flex_attention", slide, dtype=torch.float32)
    dense.edges = (lambda *qkv: dense_softmax(*qkv, mask),)
    assert relative_error(flex.denoise(slide.x_0, 0.3), dense.denoise(slide.x_0, 0.3)) < 1e-5
    shuffle = torch.randperm(300)
    flex.prepare(BenchmarkSlide(*(part[shuffle] for part in slide)))
    assert relative_error(flex.denoise(slide.x_0[shuffle], 0.3), dense.denoise(slide.x_0, 0.3)[shuffle]) < 1e-5


@pytest.mark.parametrize("layout", ["uniform", "clustered"])
def test_block_mask_holds_every_pair_and_only_blocks_with_pairs(layout: str) -> None:
    n = 500
    graph = SpotGraph.build(benchmark_slide(layout, n, n_genes=1, feature_dim=1).coords, 8)
    mask = neighbor_block_mask(graph)
    size, _ = mask.BLOCK_SIZE
    expected = torch.zeros(-(-n // size), -(-n // size), dtype=torch.int32)
    expected[torch.arange(n).repeat_interleave(8) // size, graph.neighbors.flatten() // size] = 1
    assert torch.equal(mask.to_dense()[0, 0], expected)
    by_keys = torch.zeros_like(expected)
    for block, count in enumerate(mask.q_num_blocks[0, 0].tolist()):
        by_keys[mask.q_indices[0, 0, block, :count].long(), block] = 1
    assert torch.equal(by_keys, expected)
    stored = mask.kv_indices.untyped_storage().nbytes() // 4
    assert stored == len(expected) * (int(expected.sum(dim=1).max()) + 1)


def test_why_not_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = DenoiserConfig(n_genes=50, feature_dim=8)
    providers = {name: factory(config) for name, factory in PROVIDERS.items()}
    for provider in providers.values():
        assert provider.why_not("mps", 1000, PLENTY) == "the device is mps; it runs on cpu or cuda"
        assert provider.why_not("cuda", 1000, PLENTY) == "there is no CUDA device"
    lacks = {name: provider.why_not("cpu", 10**6, 2**30) for name, provider in providers.items()}
    assert lacks["dense_softmax"] == "it needs 29,802.3 GiB, over the budget of 1.0 GiB"
    assert lacks["eager_stflow"] == "it needs 8,381.9 GiB, over the budget of 1.0 GiB"
    assert lacks["dense_attention"].endswith("over the budget of 1.0 GiB")
    assert lacks["triton_graph"] == "the device is cpu, and a CUDA graph needs a GPU"
    for name in ("flash_attention", "message_passing", "reference"):
        assert lacks[name] is None
    assert "are not compiled" in providers["reference_compiled"].why_not("cpu", COMPILED_BLOCK - 1, PLENTY)
    assert "no backward" in providers["flex_attention"].why_not_training("cpu")
    assert providers["flash_attention"].why_not_training("cpu") is None
    assert providers["triton_graph"].why_not_one_call() == "a CUDA graph is of a whole sample"
    assert providers["triton"].why_not_one_call() is None
    assert providers["reference_compiled"].why_not_training("cpu") == "training is never compiled"


def test_why_not_without_compiler_or_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suite.providers.cpp_compiler", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lacks = {name: factory(small_config()).why_not("cpu", 1000, PLENTY) for name, factory in PROVIDERS.items()}
    assert lacks["reference_compiled"] == "there is no C++ compiler (g++ or clang++)"
    assert "materialises N x N" in lacks["flex_attention"]
    assert lacks["triton"] == "the device is cpu"


def test_flags_of_the_published_function() -> None:
    with use_backend("reference"):
        same = {name for name, factory in PROVIDERS.items() if factory(small_config()).same_function}
    assert same == {*PUBLISHED, "triton_graph"}


MEASURE = """
import json, torch
from benchmarks.suite.measure import resident_peak
from benchmarks.suite.providers import PROVIDERS
from benchmarks.suite.slides import benchmark_slide
from stflow_fast import DenoiserConfig
config = DenoiserConfig(n_genes=20, feature_dim=8, hidden_dim=32, pairwise_hidden_dim=32, n_layers=1, n_neighbors=4)
torch.set_num_threads(1)
for name, n in (("eager_stflow", 5000), ("dense_attention", 300), ("dense_softmax", 2000)):
    provider = PROVIDERS[name](config)
    for size in (100, n):
        slide = benchmark_slide("uniform", size, n_genes=20, feature_dim=8)
        provider.prepare(slide)
        found = resident_peak(lambda: provider.denoise(slide.x_0, 0.3))
    print(json.dumps([name, found, provider.quadratic_bytes(n)]))
"""


@needs_proc
def test_formulas_of_the_quadratic_ones_are_what_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back at once
    )
    for name, measured, formula in map(json.loads, done.stdout.splitlines()):
        assert 1 / 1.5 < measured / formula < 1.5, (name, measured, formula)

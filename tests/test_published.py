"""The harness that holds ours against a checkout of the published code, on a stand-in of the same layout."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.studies import published, published_figures
from benchmarks.studies.published_code import (
    STAND_INS,
    Mlp,
    SwiGLUPacked,
    einsum,
    load,
    rearrange,
    stand_ins,
    to_dense_batch,
)
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser

from .published_layout import PublishedDenoiser, write_checkout

QUICK = ("--quick", "--spots", "24", "--rounds", "0")
ALL_BLOCKS = "for block in self.backbone.blks: "


def rows_of(tmp_path: Path, fault: str, *options: str) -> tuple[int, list[dict]]:
    """The exit code of a run on a checkout with that fault, and its rows."""
    found = tmp_path / "found.json"
    code = published.main(
        ["--code", str(write_checkout(tmp_path / "code", fault)), *QUICK, "--json", str(found), *options]
    )
    return code, json.loads(found.read_text())["differences"]


def red(rows: list[dict]) -> set[tuple[str, str, bool]]:
    """Who is apart, in which variants."""
    return {
        (row["through"], row["activation"], row["non_negative"])
        for row in rows
        for quantity in published_figures.QUANTITIES
        if published_figures.is_apart(row, quantity)
    }


def test_equal_is_found_equal_in_every_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(tmp_path, "pass")
    assert red(rows) == set()
    assert code == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 of 224 figures")
    of_whom = {(row["activation"], row["non_negative"], row["layout"], row["dtype"], row["through"]) for row in rows}
    ours = published_figures.THROUGH[1:]
    assert len(of_whom) == len(rows) == 3 * 2 * 2 * (len(ours) + len(published_figures.THROUGH))
    for row in rows:
        whole = set(published_figures.QUANTITIES) <= row.keys()
        assert whole or row["through"] == published_figures.SAMPLER
        assert {"prediction", "sample"} <= row.keys()


@pytest.fixture
def _swiglu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two variants: without the ReLU and with it."""
    monkeypatch.setattr(published, "ACTIVATIONS", ("swiglu",))


@pytest.mark.usefixtures("_swiglu_alone")
@pytest.mark.parametrize(
    ("fault", "apart"),
    [
        # A ReLU that is told of and does not follow.
        (
            f"{ALL_BLOCKS}block.gene_updater.__class__ = type('Head', (type(block.gene_updater),), "
            "{'forward': lambda head, tokens: head.output(tokens)})",
            {(name, "swiglu", True) for name in published_figures.THROUGH[1:]},
        ),
        # One neighbour fewer than its settings say; accelerate asks the module, and agrees with it.
        (
            "self.backbone.n_neighbors -= 1",
            {
                (name, "swiglu", on)
                for name in (published_figures.DENOISER, published_figures.SAMPLER)
                for on in (False, True)
            },
        ),
        # Another gate in one MLP of one layer, of which its attributes say nothing.
        (
            "self.backbone.blks[1].mlp.activate = __import__('torch').nn.functional.glu",
            {(name, "swiglu", on) for name in published_figures.THROUGH[1:] for on in (False, True)},
        ),
    ],
    ids=["non_negative", "neighbours", "activation"],
)
def test_what_differs_is_found(tmp_path: Path, fault: str, apart: set[tuple[str, str, bool]]) -> None:
    code, rows = rows_of(tmp_path, fault)
    assert red(rows) == apart
    assert code == 1


def test_what_accelerate_refuses_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout = write_checkout(
        tmp_path / "code", "self.backbone.blks[0].attn.edge_trans.act = __import__('torch').nn.Tanh()"
    )
    assert published.main(["--code", str(checkout), *QUICK]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("benchmarks published: activation: ")
    assert "Tanh" in said


@pytest.mark.usefixtures("_swiglu_alone")
def test_a_wrong_gradient_alone_is_found(tmp_path: Path) -> None:
    """As of a backward pass that forgets something: values are right."""
    fault = "self.backbone.blks[0].attn.edge_trans.fc1.weight.register_hook(lambda gradient: 1.0001 * gradient)"
    code, rows = rows_of(tmp_path, fault)
    apart = [row for row in rows if published_figures.is_apart(row, "gradients")]
    assert code == 1
    assert {row["farthest_gradient"] for row in apart} == {"backbone.blks.0.attn.edge_trans.fc1.weight"}
    assert not any(published_figures.is_apart(row, name) for row in rows for name in ("prediction", "sample", "loss"))


def test_what_is_not_finite_is_apart() -> None:
    row = {"through": published_figures.DENOISER, "activation": "swiglu", "non_negative": False, "dtype": "float64"}
    for value in (math.nan, math.inf):
        found = published_figures.Result({"prediction": torch.tensor([1.0, value])}, {})
        expected = published_figures.Result({"prediction": torch.tensor([1.0, 2.0])}, {})
        differing = row | published_figures.differences(found, expected)
        assert published_figures.is_apart(differing, "prediction")
        assert json.loads(json.dumps(published.written([differing]), allow_nan=False))[0]["prediction"] is None


@pytest.mark.usefixtures("_swiglu_alone")
def test_other_sizes_run_the_variant_that_the_code_is_by_itself(tmp_path: Path) -> None:
    code, rows = rows_of(tmp_path, "pass", "--spots", "30,24", "--gradient-spots", "24")
    assert code == 0
    large = [row for row in rows if row["spots"] == 30]
    assert {(row["activation"], row["non_negative"]) for row in large} == {("swiglu", True)}
    assert not any("loss" in row or "gradients" in row for row in large)


@pytest.mark.usefixtures("_swiglu_alone")
def test_every_racer_is_timed_in_every_round(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    checkout = str(write_checkout(tmp_path / "code"))
    published.main(["--code", checkout, *QUICK, "--rounds", "2", "--json", str(found)])
    content = json.loads(found.read_text())
    assert [row["through"] for row in content["times"]] == [
        "published",
        "accelerate",
        "native sampler",
        "native sampler, prepared before",
    ]
    assert all(row["rounds"] == 2 and row["median_ms"] > 0 for row in content["times"])
    assert content["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    file = tmp_path / "denoiser.py"
    file.write_text("x = 1\n")
    assert published.commit_of(file) == "unknown"

    def git(*arguments: str) -> str:
        person = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *person, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for arguments in (("init",), ("add", "denoiser.py"), ("commit", "-m", "first")):
        git(*arguments)
    commit = git("rev-parse", "HEAD")[:12]
    assert published.commit_of(file) == commit
    file.write_text("x = 2\n")
    assert published.commit_of(file) == f"{commit} with changes"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--spots", "4"), "--spots: the published code wants more than 4 spots, not 4"),
        (("--spots", "ten"), "--spots: "),
        (("--spots", "1e8"), "--spots: the published code on 100,000,000: it needs"),
        (("--rounds", "-1"), "--rounds: must be at least 0"),
    ],
)
def test_options_that_cannot_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str], complaint: str
) -> None:
    assert published.main(["--code", str(write_checkout(tmp_path / "code")), *QUICK, *options]) == 2
    said = capsys.readouterr().err
    assert f"benchmarks published: {complaint}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (None, "holds no model/denoiser.py; name a checkout"),
        ("import no_such_package", "cannot be imported (ModuleNotFoundError: No module named 'no_such_package')"),
        ("def", "cannot be imported (SyntaxError: "),
        ("x = 1", "cannot be imported (AttributeError: "),
        (
            "class Denoiser:\n    def __init__(self, config): raise KeyError(3)",
            "is not the published denoiser (KeyError",
        ),
        ("from torch.nn import Identity as Denoiser", "is not the published denoiser (AttributeError: "),
    ],
)
def test_a_folder_without_the_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str | None, complaint: str
) -> None:
    if source is not None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "denoiser.py").write_text(source + "\n")
    before = set(sys.modules)
    assert published.main(["--code", str(tmp_path), *QUICK]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert str(tmp_path) in said
    assert said.count("\n") == 1
    assert not {
        name for name in set(sys.modules) - before if name.partition(".")[0] in (*STAND_INS, "_published_stflow")
    }


def test_loading_runs_the_module_alone_and_leaves_no_trace(tmp_path: Path) -> None:
    folder = write_checkout(tmp_path / "code")
    files = sorted(folder.rglob("*"))
    before, bytecode = dict(sys.modules), sys.dont_write_bytecode
    code = load(folder)
    assert code.path == folder / "stflow" / "model" / "denoiser.py"
    assert sorted(folder.rglob("*")) == files
    assert {name: sys.modules[name] for name in before} == before
    assert not [name for name in sys.modules if name.startswith(("_published", *code.stood_in))]
    assert sys.dont_write_bytecode is bytecode


def test_two_checkouts_are_two_codes(tmp_path: Path) -> None:
    one, other = (load(write_checkout(tmp_path / name, f"self.name = {name!r}")) for name in ("one", "other"))
    config = DenoiserConfig(n_genes=3, feature_dim=4, hidden_dim=8, pairwise_hidden_dim=8)
    assert [code.build(config, torch.float32).name for code in (one, other)] == ["one", "other"]


def test_stand_ins_are_importable_inside_alone() -> None:
    before = dict(sys.modules)
    absent = tuple(name for name in STAND_INS if importlib.util.find_spec(name) is None)
    with stand_ins() as missing:
        assert missing == absent
        for package in missing:
            module, names = STAND_INS[package]
            found = importlib.import_module(module)
            assert [getattr(found, name.__name__) for name in names] == list(names)
    assert sys.modules == before


def test_what_is_installed_is_not_stood_in_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "einops").mkdir()
    (tmp_path / "einops" / "__init__.py").write_text("rearrange = einsum = 'the real one'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with stand_ins() as missing:
        assert "einops" not in missing
        assert importlib.import_module("einops").rearrange == "the real one"
    monkeypatch.delitem(sys.modules, "einops")


def with_known_weights(mlp: nn.Module) -> nn.Module:
    """fc1 repeats its one input over the hidden numbers, 1, 2, ... times; fc2 takes the first of them."""
    with torch.no_grad():
        mlp.fc1.weight.copy_(torch.arange(1.0, 1 + len(mlp.fc1.weight)).unsqueeze(1))
        mlp.fc1.bias.zero_()
        mlp.fc2.weight.zero_()[:, 0] = 1.0
        mlp.fc2.bias.fill_(0.5)
    return mlp


def test_the_mlp_stands_in_for_timms() -> None:
    mlp = with_known_weights(Mlp(1, 4, 2))
    assert list(dict(mlp.named_children())) == ["fc1", "act", "drop1", "norm", "fc2", "drop2"]
    # gelu(2) = 2 Phi(2), from a table of the normal distribution.
    torch.testing.assert_close(mlp(torch.tensor([[2.0]])), torch.full((1, 2), 2 * 0.9772498681 + 0.5))
    relu = with_known_weights(Mlp(1, 4, 2, act_layer=nn.ReLU))
    torch.testing.assert_close(relu(torch.tensor([[3.0], [-3.0]])), torch.tensor([[3.5, 3.5], [0.5, 0.5]]))
    normed = with_known_weights(Mlp(1, 2, 1, act_layer=nn.Identity, norm_layer=nn.LayerNorm))
    torch.testing.assert_close(normed(torch.tensor([[5.0]])), torch.tensor([[-0.5]]))  # (5, 10) normalised: -1, 1
    assert Mlp(7).fc2.weight.shape == (7, 7)


def test_the_gated_mlp_stands_in_for_timms() -> None:
    mlp = with_known_weights(SwiGLUPacked(1, 4, 2))
    assert list(dict(mlp.named_children())) == ["fc1", "act", "drop1", "norm", "fc2", "drop2"]
    assert isinstance(mlp.act, nn.SiLU)
    # Hidden 1, 2, 3, 4 of an input 1: the first half is the gate, silu(1) * 3.
    torch.testing.assert_close(mlp(torch.tensor([[1.0]])), torch.full((1, 2), 3 * 0.7310585786 + 0.5))
    assert SwiGLUPacked(1, 4, 2, norm_layer=nn.LayerNorm).norm.weight.shape == (2,)


@pytest.mark.parametrize("mlp", [Mlp, SwiGLUPacked])
def test_dropouts_stand_before_the_norm_and_behind_fc2(mlp: type[nn.Module]) -> None:
    dropping = mlp(3, 8, 5, drop=1.0, norm_layer=nn.LayerNorm).train()
    assert torch.equal(dropping.drop1(torch.ones(2)), torch.zeros(2))
    assert torch.equal(dropping(torch.randn(2, 3)), torch.zeros(2, 5))
    dropping.drop2.p = 0.0  # the norm of zeros is its bias
    torch.testing.assert_close(dropping(torch.randn(2, 3)), dropping.fc2(dropping.norm.bias).expand(2, 5))


@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 3))
def test_rearrange_and_einsum_stand_in_for_einops(n: int, h: int, d: int) -> None:
    x = torch.arange(n * h * d).view(n, h * d)
    split = rearrange(x, "n (h d) -> n h d", h=h)
    assert split.shape == (n, h, d)
    assert all(split[i, j, k] == x[i, j * d + k] for i in range(n) for j in range(h) for k in range(d))
    assert torch.equal(rearrange(x, "n d -> n 1 d"), x[:, None])
    assert torch.equal(rearrange(x, "n d -> 1 n d"), x[None])
    assert torch.equal(rearrange(split, "... d -> (...) d"), x.view(n * h, d))
    weight, value = torch.rand(n, h, 2), torch.rand(n, 2, h, d)
    expected = (weight.transpose(1, 2).unsqueeze(-1) * value).sum(dim=1)
    torch.testing.assert_close(einsum(weight, value, "n h m, n m h d -> n h d"), expected)


def test_patterns_without_a_stand_in_are_named() -> None:
    with pytest.raises(InputError, match=r"einops.rearrange: no stand-in for the pattern 'a b -> b a'; install einops"):
        rearrange(torch.ones(2, 2), "a b -> b a")
    for pattern in ("n head, head d -> n d", "... d, d -> ...", "n d"):
        with pytest.raises(InputError, match="einops.einsum: no stand-in for the pattern"):
            einsum(torch.ones(2, 2), torch.ones(2, 2), pattern)


def test_to_dense_batch_stands_in_for_torch_geometrics() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True)
    dense, mask = to_dense_batch(x, batch=torch.tensor([0, 0, 2, 2]), fill_value=-1, max_num_nodes=3)
    assert torch.equal(dense, torch.tensor([[[1.0], [2], [-1]], [[-1], [-1], [-1]], [[3], [4], [-1]]]))
    assert mask.tolist() == [[True, True, False], [False] * 3, [True, True, False]]
    dense.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 1))


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_the_layout_has_the_published_parameters_and_attributes(activation: str) -> None:
    config = DenoiserConfig(n_genes=5, feature_dim=7, hidden_dim=16, pairwise_hidden_dim=8, activation=activation)
    model = PublishedDenoiser(config)
    Denoiser(config).load_state_dict(model.state_dict(), strict=True)
    block = model.backbone.blks[0]
    assert model.backbone.n_neighbors == config.n_neighbors
    assert (block.attn.n_heads, block.attn.d_head, block.attn.d_edge_head) == (4, 4, 2)
    assert isinstance(block.attn.attn_dropout, nn.Dropout)
    assert block.gene_updater.non_negative is True
    act = {"swiglu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}[activation]
    assert all(type(mlp.act) is act for mlp in (block.mlp, block.attn.edge_trans, block.attn.W_output))
    assert type(block.attn.mlp_attn.act) is (nn.SiLU if activation == "swiglu" else nn.GELU)


def test_the_layout_computes_with_its_own_modules() -> None:
    """Whoever changes one of its attributes changes what it computes."""
    config = DenoiserConfig(n_genes=5, feature_dim=7, hidden_dim=16, pairwise_hidden_dim=8, n_neighbors=3)
    torch.manual_seed(0)
    inputs = torch.rand(1, 9, 5), torch.rand(1, 9, 7), torch.rand(1, 9, 2), torch.rand(1)
    model = PublishedDenoiser(config).eval()
    seen = [model.inference(*inputs, predict=True)]
    for block in model.backbone.blks:
        block.gene_updater.non_negative = False
    seen.append(model.inference(*inputs))
    assert torch.equal(seen[0] >= 0, torch.ones_like(seen[0], dtype=torch.bool))
    for mlp in (model.backbone.blks[0].mlp, model.backbone.blks[0].attn.mlp_attn):
        mlp.act = nn.Tanh()
        seen.append(model.inference(*inputs))
    model.backbone.n_neighbors = 2
    seen.append(model.inference(*inputs))
    model.backbone.blks[0].attn.attn_dropout.p = 1.0
    seen.append(F.relu(model.train().inference(*inputs)))
    assert not any(torch.allclose(seen[i], seen[j]) for i in range(len(seen)) for j in range(i))

"""Model folders, published checkpoints, and the swap of our encoder into the published modules."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.baselines.eager_stflow import EagerDenoiser
from stflow_fast.checkpoints import accelerate, convert, shapes_to_config
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser, SpatialTransformer
from stflow_fast.pretrained import Provenance

from .published_layout import PublishedDenoiser

SHAPE = {"n_genes": 6, "feature_dim": 9, "hidden_dim": 16, "pairwise_hidden_dim": 8, "n_layers": 2, "n_neighbors": 4}
GENES = tuple("ABCDEF")
TOLD = {"n_neighbors": 4, "non_negative": False}


def published(**settings: object) -> EagerDenoiser:
    torch.manual_seed(0)
    return EagerDenoiser(**{**SHAPE, **settings}).double().eval()


def inputs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return (
        torch.rand(2, 30, 6).double(),
        torch.randn(2, 30, 9).double(),
        torch.rand(2, 30, 2).double(),
        torch.rand(2).double(),
    )


def test_whoever_may_read_the_settings_may_read_the_weights(tmp_path: Path) -> None:
    Denoiser(DenoiserConfig(**SHAPE)).save_pretrained(tmp_path / "a")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_saved_model_comes_back_with_its_meaning(tmp_path: Path) -> None:
    model = Denoiser(DenoiserConfig(**SHAPE), Provenance(GENES, "uni", "log1p", {"fold": 3})).double()
    model.float().save_pretrained(tmp_path / "m")
    loaded = Denoiser.from_pretrained(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} >= {"config.json", "model.safetensors"}
    assert (loaded.config, loaded.provenance) == (model.config, model.provenance)
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "config.json").read_text()) == json.loads((tmp_path / "m" / "config.json").read_text())


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", b"{", "config.json: is not valid JSON"),
        ("config.json", b"{}", "no 'denoiser' section"),
        ("model.safetensors", None, "model.safetensors: cannot be read"),
        ("model.safetensors", b"\x10", "model.safetensors: cannot be read"),
        ("model.safetensors", "half", "model.safetensors: cannot be read"),
    ],
)
def test_a_broken_model_folder_is_named(tmp_path: Path, file: str, content: bytes | str | None, complaint: str) -> None:
    Denoiser(DenoiserConfig(**SHAPE)).save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(InputError, match=complaint) as caught:
        Denoiser.from_pretrained(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    Denoiser(DenoiserConfig(**SHAPE)).save_pretrained(tmp_path / "a")
    Denoiser(DenoiserConfig(**{**SHAPE, "hidden_dim": 32})).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(InputError, match="parameter backbone.blks.0.attn.W_output.fc1.bias"):
        Denoiser.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_settings_are_read_off_the_parameters(activation: str, n_heads: int) -> None:
    model = published(activation=activation, n_heads=n_heads)
    told = {"n_neighbors": 4} if activation == "swiglu" else {"n_neighbors": 4, "activation": activation}
    expected = DenoiserConfig(**{**SHAPE, "activation": activation, "n_heads": n_heads})
    assert shapes_to_config(model.state_dict(), **told) == expected


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("", ""),
        ("state_dict", "module."),
        ("model_state_dict", ""),
        ("model", "_orig_mod.module."),
        ("state_dict", "net.denoiser."),
        ("model/state_dict", "module."),
    ],
)
def test_a_published_checkpoint_is_converted(tmp_path: Path, key: str, prefix: str) -> None:
    """As training loops, DistributedDataParallel, torch.compile and Lightning save it, among other things."""
    model = published().float()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    if key == "state_dict" and "net" in prefix:
        state["loss.weight"] = torch.ones(3)
    others = {"epoch": 3, "optimizer": {"lr": 1e-3}, "hyper_parameters": {"n_genes": 6}}
    for name in reversed(key.split("/") if key else []):
        state = {name: state, **others}
    torch.save(state, tmp_path / "published.pth")
    converted = convert(tmp_path / "published.pth", GENES, "uni", n_neighbors=4, non_negative=False)
    assert converted.provenance.genes == GENES
    for ours, theirs in zip(converted.double().inference(*inputs()), model.double().inference(*inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    model.load_state_dict(converted.state_dict(), strict=True)


def test_a_running_mean_is_converted(tmp_path: Path) -> None:
    """Its count of steps stands beside the parameters."""
    model = published().float()
    mean = torch.optim.swa_utils.AveragedModel(model)
    mean.update_parameters(model)
    for prefix in ("", "model."):
        torch.save({prefix + name: value for name, value in mean.state_dict().items()}, tmp_path / "swa.pth")
        converted = convert(tmp_path / "swa.pth", GENES, **TOLD)
        for name, value in model.state_dict().items():
            assert torch.equal(converted.state_dict()[name], value)


def test_unfit_checkpoints_are_refused(tmp_path: Path) -> None:
    good, path = published().state_dict(), tmp_path / "x.pth"
    cases = {
        "is no file; give": None,
        "not those of a STFlow": {"weight": torch.zeros(3)},
        "is not a state_dict \\(names to tensors\\), nor": [1, 2],
        "is not a state_dict .* it has 0": {0: torch.zeros(3)},
        "holds no parameters": {},
        "with and without module": {prefix + name: value for prefix in ("", "module.") for name, value in good.items()},
        "nor has one as state_dict, model_state_dict, model, net, denoiser; it has epoch, weights": {
            "epoch": 1,
            "weights": good,
        },
        "holds several denoisers \\(model., ema.\\)": {
            prefix + name: value for prefix in ("model.", "ema.") for name, value in good.items()
        },
        "blks.0.extra is": {**good, "backbone.blks.0.extra": torch.zeros(1)},
        "an encoder alone": {name[9:]: value for name, value in good.items() if name.startswith("backbone.")},
        "n_heads: the parameters say 4": good,
    }
    for complaint, content in cases.items():
        if content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=f"x.pth: .*{complaint}"):
            convert(path, GENES, **TOLD, **({"n_heads": 2} if "n_heads" in complaint else {}))
    torch.save(good, path)
    with pytest.raises(InputError, match="predicts 6 genes, but 2 names"):
        convert(path, ("A", "B"), **TOLD)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="is truncated"):
        convert(path, GENES)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match="holds more than tensors"):
        convert(tmp_path / "x.pth", GENES)
    torch.save({"a": Trap(sprung)}, tmp_path / "y.pth")
    with pytest.raises(InputError, match="holds more than tensors"):
        convert(tmp_path / "y.pth", GENES)
    assert not sprung.exists()


def theirs(non_negative: bool = True, **settings: object) -> PublishedDenoiser:
    """A module with the attributes of the published one, in float64."""
    torch.manual_seed(0)
    config = DenoiserConfig(**{**SHAPE, "dropout": 0.0, "attn_dropout": 0.0, **settings})
    model = PublishedDenoiser(config).double().eval()
    for block in model.backbone.blks:
        block.gene_updater.non_negative = non_negative
    return model


@pytest.mark.parametrize("whole", [True, False], ids=["Denoiser", "SpatialTransformer"])
def test_acceleration_in_place(whole: bool) -> None:
    model = theirs()
    before = [value.clone() for value in model.inference(*inputs())]
    parameters, names = list(model.parameters()), list(model.state_dict())
    held = model.backbone
    assert accelerate(model if whole else model.backbone) is (model if whole else model.backbone)
    assert model.backbone is held
    assert isinstance(model.backbone, SpatialTransformer)
    assert list(model.state_dict()) == names
    assert {id(p) for p in model.parameters()} == {id(p) for p in parameters}
    for after, expected in zip(model.inference(*inputs()), before, strict=True):
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.inference(*inputs()).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(model.inference(*inputs()), torch.stack(before))


@pytest.mark.parametrize("non_negative", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu"])
def test_acceleration_computes_what_the_module_did(activation: str, non_negative: bool) -> None:
    """Prediction, loss and gradients, without being told anything."""
    exp, features, coords, times = inputs()
    found = []
    for fast in (False, True):
        model = theirs(non_negative, activation=activation)
        if fast:
            accelerate(model)
        prediction, loss = model(exp, features, coords, exp.flip(0), times)
        found.append([prediction, loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert (found[0][0] == 0).any() == non_negative  # otherwise the ReLU would show in nothing
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-10)


def test_settings_are_read_from_where_the_published_code_has_them() -> None:
    settings = {"n_heads": 2, "n_neighbors": 6, "dropout": 0.3, "attn_dropout": 0.1, "activation": "gelu"}
    for non_negative in (True, False):
        told = accelerate(theirs(non_negative, **settings)).backbone.config
        wanted = DenoiserConfig(**{**SHAPE, **settings, "feature_dim": SHAPE["hidden_dim"]}, non_negative=non_negative)
        assert dataclasses.replace(told, feature_dim=wanted.feature_dim) == wanted


def set_to(path: str, value: object) -> Callable[[PublishedDenoiser], None]:
    """What sets an attribute of the encoder."""

    def change(model: PublishedDenoiser) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.backbone.get_submodule(owner), name, value)

    return change


def behind_the_head(*modules: nn.Module) -> Callable[[PublishedDenoiser], None]:
    def change(model: PublishedDenoiser) -> None:
        for block in model.backbone.blks:
            block.gene_updater.output.extend(modules)

    return change


def normed_otherwise(model: PublishedDenoiser) -> None:
    class Norm(nn.LayerNorm):
        pass

    model.backbone.blks[1].attn.layernorm_qkv[0] = Norm(SHAPE["hidden_dim"]).double().eval()


def silu(model: PublishedDenoiser) -> None:
    for block in model.backbone.blks:
        for mlp in (block.attn.edge_trans, block.attn.W_output, block.mlp):
            mlp.act = nn.SiLU()


def hooked(model: PublishedDenoiser) -> None:
    model.backbone.blks[1].attn.register_forward_hook(print)


@pytest.mark.parametrize(
    ("activation", "change", "complaint"),
    [
        (
            "swiglu",
            set_to("blks.1.gene_updater.non_negative", False),
            "non_negative: blks.1.* False, but blks.0",
        ),
        (
            "swiglu",
            set_to("non_negative", False),
            "non_negative: blks.0.* True, but non_negative says",
        ),
        ("swiglu", set_to("blks.1.attn.n_heads", 2), "n_heads: blks.1.attn.n_heads says 2, but blks.0"),
        ("swiglu", set_to("blks.1.mlp.drop1.p", 0.5), "dropout: blks.1.mlp.drop1 says 0.5, but blks.0"),
        (
            "swiglu",
            set_to("blks.0.gene_updater.output.5.p", 0.5),
            "dropout: .*gene_updater.output.5 says 0.5, but",
        ),
        ("swiglu", set_to("blks.1.attn.attn_dropout.p", 0.5), "attn_dropout: blks.1.attn.attn_dropout says 0.5, but"),
        (
            "swiglu",
            set_to("blks.1.attn.n_neighbors", 9),
            "n_neighbors: blks.1.attn.n_neighbors says 9, but",
        ),
        ("swiglu", set_to("blks.0.mlp.act", nn.Sigmoid()), "activation: blks.0.mlp.act says Sigmoid, but"),
        ("swiglu", set_to("blks.0.attn.mlp_attn.act", nn.GELU()), "mlp_attn.act: is gelu; .* computes swiglu there"),
        ("swiglu", set_to("blks.1.mlp.gate_last", True), "blks.1.mlp.gate_last: is true"),
        ("gelu", set_to("blks.1.attn.W_output.act", nn.ReLU()), "activation: blks.1.attn.W_output.act says relu, but"),
        ("gelu", set_to("blks.0.mlp.act", nn.GELU("tanh")), "blks.0.mlp.act: is an approximate GELU"),
        ("relu", set_to("blks.0.attn.mlp_attn.act", nn.ReLU()), "mlp_attn.act: is relu; .* computes gelu there"),
        ("relu", set_to("blks.1.mlp.norm.eps", 1e-6), r"blks.1.mlp.norm.eps: is 1e-06; .* computes with 1e-05"),
        (
            "swiglu",
            behind_the_head(nn.Softplus()),
            "gene_updater.output.6: is Softplus.* published gene head",
        ),
        ("swiglu", hooked, "blks.1.attn: has a hook"),
        ("swiglu", set_to("blks.0.gene_updater.forward", print), "blks.0.gene_updater: has a forward of its own"),
        ("swiglu", normed_otherwise, "blks.1.attn.layernorm_qkv.0: is Norm; .* computes torch's LayerNorm"),
        ("swiglu", set_to("blks.1.mlp.drop1.training", True), "blks.1.mlp.drop1: is in another mode than the"),
        ("gelu", silu, "activation: is silu; ungated MLPs are computed with gelu or relu"),
    ],
)
def test_what_the_fast_encoder_would_compute_otherwise_is_refused(
    activation: str, change: Callable[[PublishedDenoiser], None], complaint: str
) -> None:
    model = theirs(activation=activation)
    change(model)
    encoder, blocks = type(model.backbone), model.backbone.blks
    with pytest.raises(InputError, match=complaint):
        accelerate(model)
    assert type(model.backbone) is encoder
    assert model.backbone.blks is blocks


def test_a_relu_module_behind_the_head_is_one() -> None:
    model = theirs(non_negative=False)
    behind_the_head(nn.ReLU())(model)
    before = model.inference(*inputs())
    for block in model.backbone.blks:
        del block.gene_updater.non_negative
    torch.testing.assert_close(accelerate(model).inference(*inputs()), before, rtol=1e-9, atol=1e-9)
    assert model.backbone.config.non_negative


def test_what_stands_nowhere_is_asked_for_by_name() -> None:
    def bare() -> PublishedDenoiser:
        model = theirs(n_neighbors=4)
        for block in model.backbone.blks:
            del block.gene_updater.non_negative
        return model

    with pytest.raises(InputError, match=r"non_negative: the module does not say it; pass .*non_negative=\.\.\."):
        accelerate(bare())
    expected = theirs(non_negative=False).inference(*inputs())
    torch.testing.assert_close(accelerate(bare(), non_negative=False).inference(*inputs()), expected)
    model = bare()
    del model.backbone.n_neighbors
    with pytest.raises(InputError, match="n_neighbors: the module does not say it"):
        accelerate(model, non_negative=True)
    assert not isinstance(model.backbone, SpatialTransformer)
    ungated = theirs(activation="relu")
    for part in ungated.modules():
        if hasattr(part, "act"):
            del part.act
    with pytest.raises(InputError, match="activation: ungated MLPs do not tell gelu from relu; say which it is"):
        accelerate(ungated)


def test_acceleration_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="Linear is neither"):
        accelerate(nn.Linear(2, 2))
    extra = theirs()
    extra.head = nn.Linear(2, 2)
    with pytest.raises(InputError, match="head.bias"):
        accelerate(extra)
    with pytest.raises(InputError, match="non_negative: the module says True, the settings False"):
        accelerate(theirs(), non_negative=False)
    for model in (theirs(), Denoiser(DenoiserConfig(**SHAPE))):
        with pytest.raises(InputError, match="memory_budget: must be a size"):
            accelerate(model, memory_budget="much")
        with pytest.raises(InputError, match="n_neighbour: is not a setting"):
            accelerate(model, n_neighbour=3)


def test_what_the_module_said_cannot_be_changed_without_a_word() -> None:
    encoder = accelerate(theirs()).backbone
    assert encoder.n_neighbors == 4
    with pytest.raises(AttributeError):
        encoder.n_neighbors = 5


def test_what_is_fast_already_is_left_alone_and_said() -> None:
    ours = Denoiser(DenoiserConfig(**SHAPE)).double().eval()
    for model in (ours, accelerate(theirs())):
        before, encoder = model.inference(*inputs()), model.backbone.blks
        with pytest.warns(UserWarning, match="stflow-fast's already; nothing was changed"):
            assert accelerate(model) is model
        assert model.backbone.blks is encoder
        assert torch.equal(model.inference(*inputs()), before)
        with pytest.raises(InputError, match="n_neighbors: the module says 4, the settings 5"):
            accelerate(model, n_neighbors=5)


def test_layers_that_share_parameters_stay_shared() -> None:
    model = theirs()
    model.backbone.blks[1] = model.backbone.blks[0]
    before = model.inference(*inputs())
    torch.testing.assert_close(accelerate(model).inference(*inputs()), before, rtol=1e-9, atol=1e-9)

"""The swap of our encoder into the published modules: what it computes, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stflow_fast.checkpoints import accelerate
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser, SpatialTransformer

from .checkpoint_cases import SHAPE, inputs
from .published_layout import PublishedDenoiser


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

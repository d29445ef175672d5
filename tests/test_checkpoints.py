"""Model folders, published checkpoints, and the swap of our encoder into the published modules."""

from __future__ import annotations

import json
import pickle
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

SHAPE = {"n_genes": 6, "feature_dim": 9, "hidden_dim": 16, "pairwise_hidden_dim": 8, "n_layers": 2, "n_neighbors": 4}
GENES = tuple("ABCDEF")


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


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_published_checkpoint_is_converted(tmp_path: Path, wrapped: bool) -> None:
    model = published().float()
    state = {f"module.{name}": value for name, value in model.state_dict().items()} if wrapped else model.state_dict()
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "published.pth")
    converted = convert(tmp_path / "published.pth", GENES, "uni", n_neighbors=4)
    assert converted.provenance.genes == GENES
    for ours, theirs in zip(converted.double().inference(*inputs()), model.double().inference(*inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    model.load_state_dict(converted.state_dict(), strict=True)


def test_unfit_checkpoints_are_refused(tmp_path: Path) -> None:
    good, path = published().state_dict(), tmp_path / "x.pth"
    cases = {
        "is no file": None,
        "not those of a STFlow": {"weight": torch.zeros(3)},
        "is not a state_dict": [1, 2],
        "blks.0.extra is": {**good, "backbone.blks.0.extra": torch.zeros(1)},
        "an encoder alone": {name[9:]: value for name, value in good.items() if name.startswith("backbone.")},
        "n_heads: the parameters say 4": good,
    }
    for complaint, content in cases.items():
        if content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=complaint):
            convert(path, GENES, n_neighbors=4, **({"n_heads": 2} if "n_heads" in complaint else {}))
    torch.save(good, path)
    with pytest.raises(InputError, match="predicts 6 genes, but 2 names"):
        convert(path, ("A", "B"))
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


def attributes(model: EagerDenoiser) -> EagerDenoiser:
    """The attributes that the published modules have and the plain re-implementation names alike."""
    model.backbone.n_neighbors = SHAPE["n_neighbors"]
    return model


@pytest.mark.parametrize("whole", [True, False], ids=["Denoiser", "SpatialTransformer"])
def test_acceleration_in_place(whole: bool) -> None:
    model = attributes(published())
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


def test_acceleration_refuses_what_it_does_not_know() -> None:
    with pytest.raises(InputError, match="Linear is neither"):
        accelerate(nn.Linear(2, 2))
    extra = attributes(published())
    extra.head = nn.Linear(2, 2)
    with pytest.raises(InputError, match="head.bias"):
        accelerate(extra)
    unknown = attributes(published())
    unknown.backbone.__dict__.pop("n_neighbors")
    with pytest.raises(InputError, match="n_neighbors: the module does not say it"):
        accelerate(unknown)
    ungated = attributes(published(activation="relu"))
    with pytest.raises(InputError, match="activation: is unknown, and ungated MLPs do not tell gelu from relu"):
        accelerate(ungated)
    for act, named in ((nn.SiLU(), "swiglu"), (nn.Tanh(), "Tanh")):
        ungated.backbone.blks[0].attn.edge_trans.act = act
        with pytest.raises(InputError, match=f"activation: is {named}"):
            accelerate(ungated)
    gated = attributes(published())
    gated.backbone.blks[0].attn.edge_trans.act = nn.Sigmoid()
    with pytest.raises(InputError, match="activation: the parameters say swiglu, the settings Sigmoid"):
        accelerate(gated)
    assert not isinstance(unknown.backbone, SpatialTransformer)
    assert isinstance(accelerate(unknown, n_neighbors=4).backbone, SpatialTransformer)

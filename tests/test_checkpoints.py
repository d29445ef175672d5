"""Model folders and published checkpoints: saved, loaded, converted, and refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from benchmarks.opponents.eager_stflow import EagerDenoiser
from stflow_fast.checkpoints import convert, shapes_to_config
from stflow_fast.config import DenoiserConfig
from stflow_fast.errors import InputError
from stflow_fast.model import Denoiser
from stflow_fast.pretrained import Provenance

from .checkpoint_cases import SHAPE, inputs

GENES = tuple("ABCDEF")
TOLD = {"n_neighbors": 4, "non_negative": False}


def published(**settings: object) -> EagerDenoiser:
    torch.manual_seed(0)
    return EagerDenoiser(**{**SHAPE, **settings}).double().eval()


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

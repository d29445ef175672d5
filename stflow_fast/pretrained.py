"""A model's folder: config.json and model.safetensors, with what a prediction needs to be understood later."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open

from ._version import __version__
from .config import DenoiserConfig
from .errors import InputError
from .files import atomic_path, read_json, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from and what its numbers mean.

    Attributes:
        genes: names of the predicted genes, in the order of the model's output; empty when unknown.
        encoder: name of the patch encoder whose embeddings it reads; empty when unknown.
        normalize: what the predictions are, one of ``stflow_fast.slides.NORMALIZATIONS``.
        training: free description of the training: data, slides, fold, seed, how the epoch was selected.
        version: of stflow-fast that wrote it.
    """

    genes: tuple[str, ...] = ()
    encoder: str = ""
    normalize: str = "log1p"
    training: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Provenance:
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "genes": tuple(known.get("genes", ()))})


class Pretrained(PyTorchModelHubMixin, library_name="stflow-fast", paper_url="https://arxiv.org/abs/2506.05361"):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for a module made from (config, provenance)."""

    config: DenoiserConfig
    provenance: Provenance

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_tensors(Path(save_directory) / WEIGHTS_FILE, state)
        content = {"denoiser": self.config.to_dict(), "provenance": dataclasses.asdict(self.provenance)}
        write_json(Path(save_directory) / CONFIG_FILE, content)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load a folder written by ``save_pretrained``, or a repository of the Hugging Face Hub, in evaluation mode.

        Raises:
            InputError: config.json or model.safetensors is missing, truncated or not a stflow-fast model.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            content = read_json(folder / CONFIG_FILE)
            if not isinstance(content, dict) or not isinstance(content.get("denoiser"), dict):
                raise InputError(f"{folder / CONFIG_FILE}: has no 'denoiser' section; it is not a stflow-fast model")
        elif folder.is_absolute() or folder.exists():
            raise InputError(f"{folder}: is not a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: dict[str, Any],
        provenance: dict[str, Any] | None = None,
        map_location: str = "cpu",
        **download: Any,
    ) -> Any:
        path = Path(model_id) / WEIGHTS_FILE
        if not Path(model_id).is_dir():
            path = Path(hf_hub_download(model_id, WEIGHTS_FILE, **download))
        state, _ = load_tensors(path)
        model = cls(DenoiserConfig.from_dict(config["denoiser"]), Provenance.from_dict(config.get("provenance", {})))
        load_state(model, state, path)
        return model.to(map_location).eval()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises InputError when the disk is full or not writable."""
    with atomic_path(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file onto the CPU: (tensors, metadata). Raises InputError when it is missing or truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); it is missing or truncated") from error


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """``load_state_dict(strict=True)``; what does not fit is an InputError that names the first parameter."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        found = list(state[name].shape) if name in state else "nothing"
        wanted = list(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise InputError(f"{path}: parameter {name} is {found}, but the model's settings ask for {wanted}")
    model.load_state_dict(state, strict=True)

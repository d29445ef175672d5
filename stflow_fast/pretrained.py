"""A model's folder: config.json and model.safetensors, with what a prediction needs to be understood later."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import (
    ModelCard,
    PyTorchModelHubMixin,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from ._version import __version__
from .config import DenoiserConfig
from .errors import InputError, first_line, with_path
from .files import atomic_files, atomic_path, read_json, write_json
from .model_card import CARD_FILE, SCORES_FILE, keep_if_edited, known_scores, model_card
from .priors.fitted import FittedSource
from .priors.observation import ObservationModel, load_observation
from .priors.sources import load_source
from .priors.streams import fingerprint as of_arrays
from .slides import NORMALIZATIONS

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

REACH_SECONDS = 2.0
"""Within which the Hub must answer a first question. What is then downloaded may take its time."""


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from and what its numbers mean.

    Attributes:
        genes: names of the predicted genes, in the order of the model's output; empty when unknown.
        encoder: name of the patch encoder whose embeddings it reads; empty when unknown.
        normalize: what the predictions are, one of ``stflow_fast.slides.NORMALIZATIONS``.
        training: free description of the training: data, slides, fold, seed, how the epoch was selected.
        version: of stflow-fast that wrote it.

    Raises:
        InputError: a gene named twice, an unknown normalisation, or ``training`` that is no dict.
    """

    genes: tuple[str, ...] = ()
    encoder: str = ""
    normalize: str = "log1p"
    training: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        if len(set(self.genes)) < len(self.genes):
            twice = next(name for name in self.genes if self.genes.count(name) > 1)
            raise InputError(f"genes: {twice} is named twice; every predicted gene needs a name of its own")
        if not (isinstance(self.training, dict) and isinstance(self.training.get("training", {}), dict)):
            raise InputError(f"training: must be a dict that describes the training, not {self.training!r}")
        if self.normalize not in NORMALIZATIONS:
            raise InputError(f"normalize: must be one of {', '.join(NORMALIZATIONS)}, not {self.normalize!r}")

    @classmethod
    def from_dict(cls, values: Any) -> Provenance:
        if not isinstance(values, dict):
            raise InputError(f"provenance: must be a dict, not {values!r}")
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        return cls(**{**known, "genes": tuple(known.get("genes", ()))})


P = TypeVar("P", bound="Pretrained")


class Pretrained(PyTorchModelHubMixin):
    """``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` for a module made from (config, provenance)."""

    config: DenoiserConfig
    provenance: Provenance
    observation: ObservationModel | None
    source: FittedSource | None

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Write config.json, model.safetensors and a card, README.md; the options are those of PyTorchModelHubMixin.

        A card that somebody has edited stays as it is, which is logged as a warning. The scores that ``stflow-fast
        evaluate`` kept in the folder are in the card as long as they are of these weights. What is pushed is what the
        folder then holds; ``push_to_hub(NAME, model_card_kwargs={"beside": FOLDER})`` takes card and scores from a
        folder too.

        Raises:
            OutputError: the folder cannot be written; an earlier model in it is untouched.
        """
        folder = Path(save_directory)
        beside = Path((options.pop("model_card_kwargs", None) or {}).get("beside", folder))
        told = {"scores": known_scores(beside, fingerprint(cast(torch.nn.Module, self)))}
        with atomic_files(folder) as temporary:
            super().save_pretrained(temporary, model_card_kwargs=told, **({} if push_to_hub else options))
            if beside != folder:
                for name in (CARD_FILE, SCORES_FILE):
                    if (beside / name).exists():
                        shutil.copyfile(beside / name, temporary / name)
            elif keep_if_edited(folder / CARD_FILE):
                (temporary / CARD_FILE).unlink()
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or folder.name, model_card_kwargs={"beside": folder}, **options)

    def generate_model_card(self, scores: Sequence[Mapping[str, Any]] = ()) -> ModelCard:
        """The card of this model, see :func:`.model_card.model_card`; PyTorchModelHubMixin asks for it."""
        return model_card(self.described(), scores)

    def described(self) -> dict[str, Any]:
        """The content of config.json (plain JSON types)."""
        laws = {kind: getattr(self, kind) for kind in LAWS_BESIDE}
        return {
            "denoiser": self.config.to_dict(),
            "provenance": dataclasses.asdict(self.provenance),
            **{kind: law.to_dict() for kind, law in laws.items() if law is not None},
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: value.contiguous() for name, value in cast(torch.nn.Module, self).state_dict().items()}
        for kind in LAWS_BESIDE:
            law = getattr(self, kind)
            if law is not None:
                for name, array in law.tensors().items():
                    state[f"{kind}.{name}"] = torch.from_numpy(np.array(array, order="C"))
        save_tensors(Path(save_directory) / WEIGHTS_FILE, state)
        write_json(Path(save_directory) / CONFIG_FILE, self.described())

    @classmethod
    def from_pretrained(
        cls: type[P],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        map_location: str = "cpu",
        observation: bool = True,
        **download: Any,
    ) -> P:
        """Load a folder written by ``save_pretrained``, or a repository of the Hugging Face Hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, or the repository's "owner/name".
            map_location: device of the model.
            observation: load its observation model, if it has one; False for who fits another, whatever that one is.
            download: ``revision``, ``token``, ``cache_dir``, ... of ``huggingface_hub.hf_hub_download``. A Hub that
                does not answer within ``etag_timeout`` seconds (or HF_HUB_ETAG_TIMEOUT of the environment; 2) is out
                of reach: the model is then taken from the cache if it is there.

        Raises:
            InputError: config.json or model.safetensors is missing, truncated or not a stflow-fast model, or neither a
                folder nor a repository within reach has this name.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
        elif len(folder.parts) != 2 or folder.parent.is_dir():  # no "owner/name" of the Hub
            raise InputError(f"{folder}: is not a folder; give the folder of a run or of a model")
        else:
            config_file, weights_file = _download(str(pretrained_model_name_or_path), download)
        content = read_json(config_file)
        if not isinstance(content, dict) or not isinstance(content.get("denoiser"), dict):
            raise InputError(f"{config_file}: has no 'denoiser' section; it is not a stflow-fast model")
        model: Any = cls(
            DenoiserConfig.from_dict(content["denoiser"]), Provenance.from_dict(content.get("provenance", {}))
        )
        state, _ = load_tensors(weights_file)
        arrays = {kind: _taken(state, f"{kind}.") for kind in LAWS_BESIDE}
        load_state(model, state, weights_file)
        for kind, load in LAWS_BESIDE.items():
            if kind in content and (observation or kind != "observation"):
                try:
                    setattr(model, kind, load(content[kind], arrays[kind], model.provenance.genes))
                except InputError as error:
                    raise InputError(with_path(config_file, error)) from error
        model.to(map_location).eval()
        return cast(P, model)


LAWS_BESIDE: dict[str, Callable[[Any, dict[str, np.ndarray], tuple[str, ...]], Any]] = {
    "observation": load_observation,
    "source": load_source,
}
"""What a model may have beside its parameters: sections of config.json, whose arrays have these words before their
names in model.safetensors; and what reads them."""


def _taken(state: dict[str, torch.Tensor], prefix: str) -> dict[str, np.ndarray]:
    """What begins so, taken out of a state."""
    names = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state.pop(name).numpy() for name in names}


def _download(name: str, options: dict[str, Any]) -> tuple[Path, Path]:
    """config.json and model.safetensors from the Hub, or where that is out of reach as they were last downloaded."""
    try:
        try:
            reach_hub(name, options)
        except (ConnectionError, TimeoutError):
            cached = _cached(name, options)
            if len(cached) < 2 or options.get("force_download"):
                raise
            return cached[0], cached[1]
        config, weights = (Path(hf_hub_download(name, file, **options)) for file in (CONFIG_FILE, WEIGHTS_FILE))
        return config, weights
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = first_line(error.__cause__ or error)
        raise InputError(
            f"{name}: is neither a folder with {CONFIG_FILE} and {WEIGHTS_FILE} nor a model within reach on the "
            f"Hugging Face Hub ({reason})"
        ) from error


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 of the parameters, in the order of their names."""
    state = module.state_dict().items()
    return of_arrays({name: value.cpu().reshape(-1).view(torch.uint8).numpy() for name, value in state})


def reach_hub(name: str, options: dict[str, Any]) -> None:
    """Ask the Hub once, unless it need not be; any answer but an error of its own will do. ``hf_hub_download`` goes on
    asking for half a minute, and before it looks into its cache it spends 3 s on a question about this machine. In a
    thread, as looking up a name, and each of its addresses, has a time limit of its own.

    Raises:
        ConnectionError, TimeoutError: there is no Hub to ask.
    """
    if options.get("local_files_only"):
        return
    of_environment = constants.HF_HUB_ETAG_TIMEOUT != constants.DEFAULT_ETAG_TIMEOUT  # which hf_hub_download obeys too
    seconds = constants.HF_HUB_ETAG_TIMEOUT if of_environment else options.get("etag_timeout", REACH_SECONDS)
    place = {key: options[key] for key in ("subfolder", "repo_type", "revision", "endpoint") if key in options}
    url = hf_hub_url(name, CONFIG_FILE, **place)
    answer: list[int | Exception] = []

    def ask() -> None:
        try:
            answer.append(get_session().head(url, timeout=2 * seconds).status_code)  # that it ends at all
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"no answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT=10 waits longer")
    [status] = answer
    if isinstance(status, Exception):
        raise ConnectionError(first_line(status)) from status
    if status >= 500:
        raise ConnectionError(f"{url} answers {status}")


def _cached(name: str, options: dict[str, Any]) -> tuple[Path, ...]:
    """What is in the cache of config.json and model.safetensors."""
    place = {key: options[key] for key in ("cache_dir", "revision", "repo_type") if key in options}
    folder = f"{options['subfolder']}/" if options.get("subfolder") else ""
    found = [try_to_load_from_cache(name, folder + file, **place) for file in (CONFIG_FILE, WEIGHTS_FILE)]
    return tuple(Path(path) for path in found if isinstance(path, str))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically. Raises OutputError when the disk is full or not writable."""
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files that nobody else may read
        try:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        temporary.chmod(mode)


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file onto the CPU: (tensors, metadata). Raises InputError when it is missing or truncated."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise InputError(f"{path}: cannot be read as safetensors ({reason}); it is missing or truncated") from error


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    """``load_state_dict(strict=True)``; what does not fit is an InputError that names the first parameter."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        found = list(state[name].shape) if name in state else "nothing"
        wanted = list(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise InputError(f"{path}: parameter {name} is {found}, but the model's settings ask for {wanted}")
    model.load_state_dict(state, strict=True)

"""Published checkpoints and published modules: recognising them, converting them, and speeding them up in place."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import DenoiserConfig
from .errors import InputError
from .model import Denoiser, SpatialTransformer
from .pretrained import Provenance, load_state

_ENCODER_PREFIX = "backbone."

# What torch.load raises for files of the wrong kind, cut off, or empty; the last four come from its unpickler.
_UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
)


def shapes_to_config(state: Mapping[str, Tensor], **settings: Any) -> DenoiserConfig:
    """The settings of a published denoiser or encoder, read off its parameters.

    Shapes tell everything but ``n_neighbors``, ``non_negative``, the dropouts, which come from ``settings`` or are the
    published defaults, and whether an ungated MLP uses gelu or relu, which has no default.

    Args:
        state: a ``state_dict``, with or without the prefix ``backbone.`` of a whole denoiser.
        settings: fields of DenoiserConfig that the shapes do not tell.

    Raises:
        InputError: the parameters are not those of STFlow or contradict the settings, or the activation is unknown.
    """
    whole = any(name.startswith(_ENCODER_PREFIX) for name in state)
    encoder = {name.removeprefix(_ENCODER_PREFIX): value for name, value in state.items()}
    try:
        genes, d = encoder["blks.0.gene_updater.output.4.weight"].shape
        edge = encoder["blks.0.attn.edge_trans.fc1.weight"].shape[0]
        gated = encoder["blks.0.attn.edge_trans.norm.weight"].shape[0]
        attention_inputs = encoder["blks.0.attn.mlp_attn.fc1.weight"].shape[1]
        feature_dim = encoder["image_transform.weight"].shape[1] if whole else d
    except (KeyError, ValueError) as error:
        raise InputError(f"parameters: not those of a STFlow denoiser or encoder (missing: {error})") from error
    layers = {name.split(".")[1] for name in encoder if name.startswith("blks.")}
    # mlp_attn reads a query head, a key head, an edge head and the genes: (2 d + de) / H + G numbers.
    per_head = attention_inputs - genes
    n_heads = (2 * d + edge) // per_head if per_head > 0 else 0
    activation = "swiglu" if gated * 2 == edge else settings.get("activation", "unknown")
    if gated == edge and activation not in ("gelu", "relu"):
        raise InputError(f"activation: is {activation}, and ungated MLPs do not tell gelu from relu; say which it is")
    read = {
        "n_genes": genes,
        "feature_dim": feature_dim,
        "hidden_dim": d,
        "pairwise_hidden_dim": edge,
        "n_layers": len(layers),
        "n_heads": n_heads,
        "activation": activation,
    }
    for name, value in settings.items():
        if read.get(name, value) != value:
            raise InputError(f"{name}: the parameters say {read[name]}, the settings {value}")
    config = DenoiserConfig(**{**settings, **read})
    with torch.device("meta"):
        expected = Denoiser(config).state_dict() if whole else SpatialTransformer(config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in expected.items()}
    for name in sorted(shapes.keys() | wanted.keys()):
        found, asked = shapes.get(name, "missing"), wanted.get(name, "nothing")
        if found != asked:
            raise InputError(f"parameters: not those of STFlow; {name} is {found}, expected {asked}")
    return config


def convert(
    published: str | Path,
    genes: tuple[str, ...],
    encoder: str = "",
    normalize: str = "log1p",
    **settings: Any,
) -> Denoiser:
    """Read a published ``.pth`` (a state_dict) into a Denoiser that ``save_pretrained`` can write.

    Args:
        published: the file; loaded with ``weights_only=True``, so nothing in it is executed.
        genes: names of the predicted genes in the order of its output.
        encoder: name of the patch encoder.
        normalize: what it was trained on.
        settings: fields of DenoiserConfig that shapes do not tell (``n_neighbors``, ``activation``, ...).

    Raises:
        InputError: unreadable or unsafe file, other parameters than STFlow's, or a wrong number of genes.
    """
    state = _read_state(Path(published))
    config = shapes_to_config(state, **settings)
    if f"{_ENCODER_PREFIX}blks.0.attn.mlp_attn.fc1.weight" not in state:
        raise InputError(f"{published}: holds an encoder alone; a whole denoiser is needed to predict")
    if len(genes) != config.n_genes:
        raise InputError(f"{published}: predicts {config.n_genes} genes, but {len(genes)} names were given")
    training = {"converted_from": Path(published).name}
    model = Denoiser(config, Provenance(tuple(genes), encoder, normalize, training))
    load_state(model, state, Path(published))
    return model.eval()


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: is no file; give a .pth of the published code")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # Not with torch's own words: they advise to load whatever is in the file.
        raise InputError(
            f"{path}: is truncated, no checkpoint, or holds more than tensors, which is not loaded"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: is not a state_dict (names to tensors)")
    # DistributedDataParallel and torch.compile prefix the names they save.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in content.items()}


def accelerate(module: nn.Module, **settings: Any) -> nn.Module:
    """Swap our encoder into an instance of the published ``Denoiser`` or ``SpatialTransformer``, in place.

    The module is recognised by its parameters. They are shared: an optimiser that holds them goes on working, and
    so do its ``state_dict`` and its checkpoints. Its own ``forward`` and ``inference`` stay; what they call is faster
    and needs memory linear in the spots.

    Args:
        module: on any device, in any dtype.
        settings: what neither the parameters nor the attributes of the module tell: ``n_neighbors``, ``activation``
            ("gelu" or "relu"), ``dropout``, ``attn_dropout``, ``non_negative``.

    Returns:
        The same ``module``.

    Raises:
        InputError: a module that is not STFlow's, or a setting that cannot be found and was not given.
    """
    encoder = getattr(module, "backbone", module)
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "blks"):
        raise InputError(f"module: {type(module).__name__} is neither STFlow's Denoiser nor its SpatialTransformer")
    told = {**_attributes(encoder), **settings}
    if "n_neighbors" not in told:
        raise InputError("n_neighbors: the module does not say it; pass accelerate(module, n_neighbors=...)")
    config = shapes_to_config(module.state_dict(), **told)
    with torch.device("meta"):
        ours = SpatialTransformer(config)
    for name, parameter in encoder.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, parameter)
    # The class changes, not the object: whoever holds a reference to the encoder holds the fast one.
    encoder.__class__ = SpatialTransformer
    encoder.config, encoder.blks = config, ours.blks
    encoder.train(encoder.training)
    return module


def _attributes(encoder: nn.Module) -> dict[str, Any]:
    """What the published modules remember beside their parameters."""
    block = encoder.blks[0]
    found: dict[str, Any] = {}
    for owner, names in (
        (encoder, ("n_neighbors", "non_negative")),
        (block.attn, ("n_heads", "n_neighbors")),
    ):
        found |= {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    activation = getattr(block.attn.edge_trans, "act", None)
    if activation is not None:
        names = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "swiglu"}
        found["activation"] = names.get(type(activation), type(activation).__name__)
    drops = [part.p for part in block.mlp.modules() if isinstance(part, nn.Dropout)]
    if drops:
        found["dropout"] = drops[0]
    attention = getattr(block.attn, "attn_dropout", None)
    if isinstance(attention, nn.Dropout):
        found["attn_dropout"] = attention.p
    return found

"""Published checkpoints and published modules: recognising them, converting them, and speeding them up in place."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .config import DenoiserConfig, parse_bytes
from .errors import InputError, with_path
from .kernels.conventions import LAYERNORM_EPS
from .model import CALLS_BUDGET, Denoiser, KnownSlides, SpatialTransformer
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

    Shapes tell everything but ``n_neighbors``, ``non_negative`` and the dropouts, which come from ``settings`` or are
    the published defaults, and whether an ungated MLP uses gelu or relu, which has no default.

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
        if activation == "unknown":
            raise InputError("activation: ungated MLPs do not tell gelu from relu; say which it is")
        raise InputError(f"activation: is {activation}; ungated MLPs are computed with gelu or relu")
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
        settings: fields of DenoiserConfig that shapes do not tell: ``n_neighbors`` and ``non_negative``, without which
            predictions would be others, ``activation`` of ungated MLPs, and the dropouts for training on.

    Raises:
        InputError: unreadable or unsafe file, other parameters than STFlow's, a wrong number of genes, or a setting
            that predictions depend on and that was not given.
    """
    state = _read_state(Path(published))
    for name in ("n_neighbors", "non_negative"):
        if name not in settings:
            raise InputError(f"{name}: {published} does not say it; give it (--{name.replace('_', '-')})")
    try:
        config = shapes_to_config(state, **settings)
    except InputError as error:
        raise InputError(with_path(published, error)) from error
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
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except _UNREADABLE as error:
        # Not with torch's own words: they advise to load whatever is in the file.
        raise InputError(
            f"{path}: is truncated, no checkpoint, or holds more than tensors, which is not loaded"
        ) from error
    state = _state_in(content)
    if not _is_state(state):
        keys = f"; it has {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else ""
        raise InputError(
            f"{path}: is not a state_dict (names to tensors), nor has one as {', '.join(_STATE_KEYS)}{keys}"
        )
    if not state:
        raise InputError(f"{path}: holds no parameters; save the state_dict of the trained denoiser")
    return _without_prefix(path, state)


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )


def _state_in(content: Any) -> Any:
    """What lies in the place of the parameters: one that keeps them so is itself kept so by some loops."""
    for _ in range(2):
        if isinstance(content, dict):
            content = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), dict)), content)
    return content


_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "denoiser")
"""Where training loops keep the parameters in what they save."""

_FIRST = "blks.0.gene_updater.output.4.weight"
"""A parameter that every denoiser and encoder has."""


_WRAPPERS = ("module", "_orig_mod")
"""What DistributedDataParallel, torch.compile and AveragedModel put into the names of the parameters that they wrap."""

_COUNTER = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside the parameters."""


def _without_prefix(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the denoiser, by their published names: Lightning's modules have a word of their own before
    them, and others, such as a loss's, beside; a running mean has the count of its steps."""
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in state}
    found = [name.removesuffix(_FIRST).removesuffix(_ENCODER_PREFIX) for name in plain if name.endswith(_FIRST)]
    if len(found) > 1:
        raise InputError(f"{path}: holds several denoisers ({', '.join(found)}); save the parameters of one")
    if len(plain) < len(state):
        both = "with and without " + " or ".join(_WRAPPERS)
        raise InputError(f"{path}: holds several denoisers ({both} in their names); save the parameters of one")
    [prefix] = found or [""]
    ours = {name.removeprefix(prefix): state[given] for name, given in plain.items() if name.startswith(prefix)}
    ours.pop(_COUNTER, None)
    return ours


def accelerate(module: nn.Module, memory_budget: int | str = CALLS_BUDGET, **settings: Any) -> nn.Module:
    """Swap our encoder into an instance of the published ``Denoiser`` or ``SpatialTransformer``, in place.

    The module is recognised by its parameters. They are shared: an optimiser that holds them goes on working, and
    so do its ``state_dict`` and its checkpoints. Its own ``forward`` and ``inference`` stay; what they call is faster
    and needs memory linear in the spots. What hangs on coordinates alone is kept from one call to the next
    (:class:`~stflow_fast.model.KnownSlides`), so a sampling loop makes it once.

    Slides of K spots or fewer differ: there the published code lets spots attend to themselves. Coordinates get no
    gradient. Code of a fork that no attribute tells of (a ``forward`` of its classes) is not seen:
    ``python -m benchmarks published --code FOLDER`` holds a checkout against ours.

    Args:
        module: on any device, in any dtype. A module that is ours already is left as it is, with a warning.
        memory_budget: bytes that graphs and, of calls without gradients, edge messages may take between calls, or text
            such as "4GiB".
        settings: what neither the parameters nor the attributes of the module tell: ``n_neighbors``, ``activation``
            ("gelu" or "relu"), ``dropout``, ``attn_dropout``, ``non_negative``.

    Returns:
        The same ``module``.

    Raises:
        InputError: a module that is not STFlow's; blocks that disagree; a setting that cannot be found and was not
            given, or was given and is another one; a hook, which would no longer be called.
    """
    encoder = getattr(module, "backbone", module)
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "blks"):
        raise InputError(f"module: {type(module).__name__} is neither STFlow's Denoiser nor its SpatialTransformer")
    unknown = sorted(settings.keys() - DenoiserConfig.__dataclass_fields__.keys())
    if unknown:
        raise InputError(f"{unknown[0]}: is not a setting of the denoiser")
    budget = parse_bytes(memory_budget)
    if isinstance(encoder, SpatialTransformer):
        _check_settings(settings, encoder.config.to_dict())
        warnings.warn("accelerate: the encoder is stflow-fast's already; nothing was changed", stacklevel=2)
        return module
    _check_modules(encoder)
    told = settings_of(encoder)
    _check_settings(settings, told)
    told |= settings
    for name in ("n_neighbors", "non_negative", "dropout", "attn_dropout"):
        if name not in told:
            raise InputError(f"{name}: the module does not say it; pass accelerate(module, {name}=...)")
    config = shapes_to_config(module.state_dict(), **told)
    with torch.device("meta"):
        ours = SpatialTransformer(config)
    for name, parameter in encoder.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, parameter)
    # The class changes, not the object: whoever holds a reference to the encoder holds the fast one.
    encoder.__class__ = SpatialTransformer
    vars(encoder).pop("n_neighbors", None)
    fast = cast(SpatialTransformer, encoder)
    fast.config, fast.blks, fast.known = config, ours.blks, KnownSlides(budget)
    encoder.train(encoder.training)
    return module


def _check_settings(given: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if told.get(name, value) != value:
            raise InputError(f"{name}: the module says {told[name]}, the settings {value}")


def _check_modules(encoder: nn.Module) -> None:
    """That nothing stands in the encoder which ours would pass by, as far as that can be seen."""
    for name, part in encoder.named_modules():
        if name and any(getattr(part, kind, None) for kind in _HOOKS):
            raise InputError(f"{name}: has a hook, which the fast encoder would not call; remove it first")
        if "forward" in vars(part):
            raise InputError(f"{name or 'module'}: has a forward of its own, which the fast encoder would not call")
        for kind in (nn.Linear, nn.LayerNorm):
            if isinstance(part, kind) and type(part) is not kind:
                raise InputError(f"{name}: is {type(part).__name__}; the fast encoder computes torch's {kind.__name__}")
        if isinstance(part, nn.Dropout) and part.training != encoder.training:
            raise InputError(f"{name}: is in another mode than the encoder; call train() or eval() of the whole first")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu"}


def settings_of(encoder: nn.Module) -> dict[str, Any]:
    """What the published encoder and its forks remember beside their parameters, by the fields of DenoiserConfig.

    Raises:
        InputError: places that should agree and do not, such as two blocks; or something that no setting describes.
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, where, value in _places(encoder):
        first, known = found.setdefault(name, (where, value))
        if value != known:
            raise InputError(f"{name}: {where} says {value}, but {first} says {known}")
    return {name: value for name, (_, value) in found.items()}


def _places(encoder: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(setting, where it stands, its value), for every place of every block."""
    if hasattr(encoder, "n_neighbors"):
        yield "n_neighbors", "n_neighbors", encoder.n_neighbors
    if hasattr(encoder, "non_negative"):
        yield "non_negative", "non_negative", bool(encoder.non_negative)
    blocks: Any = encoder.blks
    for index, block in enumerate(blocks):
        at = f"blks.{index}"
        for name in ("n_heads", "n_neighbors"):
            if hasattr(block.attn, name):
                yield name, f"{at}.attn.{name}", getattr(block.attn, name)
        yield from _dropouts_of("attn_dropout", f"{at}.attn", block.attn, ("attn_dropout",))
        mlps = {"attn.edge_trans": block.attn.edge_trans, "attn.W_output": block.attn.W_output, "mlp": block.mlp}
        for path, mlp in {**mlps, "attn.mlp_attn": block.attn.mlp_attn}.items():
            yield from _dropouts_of("dropout", f"{at}.{path}", mlp, ("dropout", "drop1", "drop2", "drop"))
        for path, mlp in mlps.items():
            yield from _activation_of(f"{at}.{path}", mlp)
        _check_logit_activation(f"{at}.attn.mlp_attn", block.attn.mlp_attn)
        yield from _gene_head(f"{at}.gene_updater", block.gene_updater)
    for name, part in encoder.named_modules():
        if isinstance(part, nn.LayerNorm) and part.eps != LAYERNORM_EPS:
            raise InputError(f"{name}.eps: is {part.eps}; the fast encoder computes with {LAYERNORM_EPS}")


def _dropouts_of(name: str, at: str, owner: nn.Module, attributes: tuple[str, ...]) -> Iterator[tuple[str, str, Any]]:
    """Of a module's dropouts, as modules or as numbers."""
    for attribute in attributes:
        value = getattr(owner, attribute, None)
        if isinstance(value, nn.Dropout):
            value = value.p
        elif isinstance(value, nn.Identity):
            value = 0.0
        if isinstance(value, (int, float)):
            yield name, f"{at}.{attribute}", float(value)


def _activation_of(at: str, mlp: nn.Module) -> Iterator[tuple[str, str, Any]]:
    if getattr(mlp, "gate_last", False):
        raise InputError(f"{at}.gate_last: is true; the fast encoder gates by the first half, as published")
    act = getattr(mlp, "act", None)
    if getattr(act, "approximate", "none") != "none":
        raise InputError(f"{at}.act: is an approximate GELU; the fast encoder computes the exact one")
    if act is not None:
        name = _ACTIVATIONS.get(type(act), type(act).__name__)
        yield "activation", f"{at}.act", "swiglu" if name == "silu" and _is_gated(mlp) else name


def _is_gated(mlp: Any) -> bool:
    return bool(mlp.norm.normalized_shape[0] < mlp.fc1.out_features)


def _check_logit_activation(at: str, mlp: nn.Module) -> None:
    """Ungated, the published mlp_attn has a GELU whatever the activation of the others."""
    wanted = "swiglu" if _is_gated(mlp) else "gelu"
    for _, where, value in _activation_of(at, mlp):
        if value != wanted:
            raise InputError(f"{where}: is {value}; the fast encoder computes {wanted} there, as published")


def _gene_head(at: str, head: Any) -> Iterator[tuple[str, str, Any]]:
    if hasattr(head, "non_negative"):
        yield "non_negative", f"{at}.non_negative", bool(head.non_negative)
    kinds = (nn.Linear, nn.GELU, nn.LayerNorm, (nn.Dropout, nn.Identity), nn.Linear, (nn.Dropout, nn.Identity))
    for index, part in enumerate(head.output):
        if index == len(kinds) and isinstance(part, nn.ReLU):
            yield "non_negative", f"{at}.output.{index}", True
        elif (
            index >= len(kinds) or not isinstance(part, kinds[index]) or getattr(part, "approximate", "none") != "none"
        ):
            raise InputError(f"{at}.output.{index}: is {part}, which the published gene head does not have there")
        elif isinstance(part, nn.Dropout):
            yield "dropout", f"{at}.output.{index}", part.p

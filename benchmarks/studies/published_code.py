"""The published code out of somebody's checkout, loaded as it is: none of it is in this repository.

It needs three packages for a handful of names. Where one is not installed, stand-ins written here are importable
while the checkout is loaded, and at no other time.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stflow_fast import DenoiserConfig
from stflow_fast.errors import InputError, first_line

PLACES = tuple(f"{above}model/denoiser.py" for above in ("", "*/", "*/*/"))
"""Where the module file may lie below a checkout."""

PACKAGE = "_published_stflow"
"""Name of the package that it is imported in: the folder above ``model/``, without that folder's ``__init__.py``."""

MOVED = 0.1
"""Standard deviation of what is added to initial biases and norms: at their 0 and 1 they would hide how they enter."""


class Mlp(nn.Module):
    """Stands in for timm's: fc1, act, drop1, norm, fc2, drop2, under its names of attributes and arguments."""

    parts = 1
    default_act: Callable[[], nn.Module] = nn.GELU

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] | None = None,
        norm_layer: Callable[[int], nn.Module] | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden)
        self.act = (act_layer or self.default_act)()
        self.drop1 = nn.Dropout(drop)
        self.norm = (norm_layer or nn.Identity)(hidden // self.parts)
        self.fc2 = nn.Linear(hidden // self.parts, out_features or in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop2(self.fc2(self.norm(self.drop1(self.activate(self.fc1(x))))))
        return out

    def activate(self, x: Tensor) -> Tensor:
        activated: Tensor = self.act(x)
        return activated


class SwiGLUPacked(Mlp):
    """Stands in for timm's, a ``GluMlp`` with SiLU and ``gate_last=False``: the first half of fc1 is the gate."""

    parts, default_act = 2, nn.SiLU

    def activate(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        activated: Tensor = self.act(gate)
        return activated * value


REARRANGED: dict[str, Callable[..., Tensor]] = {
    "n (h d) -> n h d": lambda x, h: x.unflatten(1, (h, -1)),
    "n d -> n 1 d": lambda x: x.unsqueeze(1),
    "n d -> 1 n d": lambda x: x.unsqueeze(0),
    "... d -> (...) d": lambda x: x.reshape(-1, x.shape[-1]),
}


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Stands in for einops' in the patterns of the published code.

    Raises:
        InputError: another pattern.
    """
    if pattern not in REARRANGED:
        raise InputError(f"einops.rearrange: no stand-in for the pattern {pattern!r}; install einops")
    return REARRANGED[pattern](x, **sizes)


def einsum(*tensors_and_pattern: Any) -> Tensor:
    """Stands in for einops', tensors first and the pattern last, where every axis is named by one letter.

    Raises:
        InputError: another pattern.
    """
    *tensors, pattern = tensors_and_pattern
    axes = r"[A-Za-z](?: [A-Za-z])*"
    if not re.fullmatch(rf"{axes}(?:, {axes})* -> {axes}", pattern):
        raise InputError(f"einops.einsum: no stand-in for the pattern {pattern!r}; install einops")
    return torch.einsum(pattern.replace(" ", ""), *tensors)


def to_dense_batch(x: Tensor, batch: Tensor, fill_value: float, max_num_nodes: int) -> tuple[Tensor, Tensor]:
    """Stands in for torch_geometric's: rows [N, C] of the slides ``batch`` [N], ascending, to [B, max_num_nodes, C],
    filled up behind each slide's rows, and the mask [B, max_num_nodes] of what is a row."""
    counts = batch.bincount()
    place = torch.arange(len(batch), device=batch.device) - (counts.cumsum(0) - counts)[batch]
    dense = x.new_full((len(counts), max_num_nodes, *x.shape[1:]), fill_value)
    dense[batch, place] = x
    return dense, torch.arange(max_num_nodes, device=batch.device) < counts.unsqueeze(1)


STAND_INS: dict[str, tuple[str, tuple[Callable[..., Any], ...]]] = {
    "timm": ("timm.models.vision_transformer", (Mlp, SwiGLUPacked)),
    "einops": ("einops", (rearrange, einsum)),
    "torch_geometric": ("torch_geometric.utils", (to_dense_batch,)),
}
"""Package -> its module, and what the published code imports from that."""


@contextlib.contextmanager
def stand_ins() -> Iterator[tuple[str, ...]]:
    """Packages of :data:`STAND_INS` that are not installed are importable inside; yields which those are."""
    missing = tuple(name for name in STAND_INS if importlib.util.find_spec(name) is None)
    made: dict[str, types.ModuleType] = {}
    for package in missing:
        module, names = STAND_INS[package]
        parts = module.split(".")
        made |= {name: types.ModuleType(name) for name in (".".join(parts[: i + 1]) for i in range(len(parts)))}
        made[module].__dict__.update({name.__name__: name for name in names})
    with _only_inside(made):
        yield missing


@contextlib.contextmanager
def _only_inside(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Importable, and forgotten afterwards with all that was imported below them."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        roots = {name.partition(".")[0] for name in modules}
        for name in [name for name in sys.modules if name.partition(".")[0] in roots]:
            del sys.modules[name]


@contextlib.contextmanager
def _without_bytecode() -> Iterator[None]:
    """Nothing is written into the checkout."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


class PublishedCode(NamedTuple):
    denoiser: Callable[[Any], Any]  # its class; takes an object with the published settings
    path: Path  # of the file it stands in
    stood_in: tuple[str, ...]  # packages that were not installed

    def build(self, config: DenoiserConfig, dtype: torch.dtype) -> nn.Module:
        """In evaluation mode, with random weights of one seed whatever the dtype.

        ``non_negative`` is told as forks tell it, by an attribute of every gene head. The embedding of the flow time
        is float32, as published, and is cast before its MLP, without which a float64 model does not run.

        Raises:
            InputError: the class cannot be made of these settings, or is laid out otherwise.
        """
        with self._being_the_denoiser():
            model = self._moved(config)
            for block in model.backbone.blks:
                block.gene_updater.non_negative = config.non_negative
            model.fourier_proj.mlp.register_forward_pre_hook(_cast_to_weight)
            network: nn.Module = model.to(dtype).eval()
            return network

    def is_non_negative(self, config: DenoiserConfig) -> bool:
        """What the code makes of its gene heads if it is told nothing; raises InputError as :meth:`build`."""
        with self._being_the_denoiser():
            return bool(self._moved(config).backbone.blks[0].gene_updater.non_negative)

    @contextlib.contextmanager
    def _being_the_denoiser(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever somebody's code raises
            raise InputError(f"{self.path}: is not the published denoiser ({_said(error)})") from error

    def _moved(self, config: DenoiserConfig) -> Any:
        settings = types.SimpleNamespace(**config.to_dict())
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's, about how an older torch was to be indexed
            torch.manual_seed(0)
            model = self.denoiser(settings)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(MOVED * torch.randn_like(parameter))
        return model


def _cast_to_weight(mlp: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].to(mlp[0].weight.dtype),)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def load(folder: Path) -> PublishedCode:
    """Find the published module below a checkout and import it. That executes its code, as whoever names the folder
    asks for; of the checkout, only what that file imports.

    Raises:
        InputError: no such file, or one that cannot be imported.
    """
    path = next((path for place in PLACES for path in sorted(folder.glob(place))), None)
    if path is None:
        raise InputError(f"{folder}: holds no model/denoiser.py; name a checkout of the published code")
    model = f"{PACKAGE}.{path.parent.name}"
    packages = {name: types.ModuleType(name) for name in (PACKAGE, model)}
    packages[PACKAGE].__path__, packages[model].__path__ = [str(path.parents[1])], [str(path.parent)]
    with stand_ins() as stood_in, _only_inside(packages), _without_bytecode():
        try:
            denoiser = importlib.import_module(f"{model}.{path.stem}").Denoiser
        except Exception as error:  # whatever somebody's code raises
            raise InputError(f"{path}: cannot be imported ({_said(error)}); install what it needs") from error
    return PublishedCode(denoiser, path, stood_in)

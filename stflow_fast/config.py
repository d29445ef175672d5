"""Settings of the denoiser, checked when they are made."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from .errors import InputError

ACTIVATIONS = ("swiglu", "gelu", "relu")


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape and regularisation of a :class:`~stflow_fast.Denoiser`; names and defaults are the published ones.

    Attributes:
        n_genes: size G of the gene panel.
        feature_dim: size F of a patch embedding.
        hidden_dim: width d of a spot's token; a multiple of ``n_heads``, even with ``swiglu``.
        pairwise_hidden_dim: width de of an edge's representation; a multiple of ``n_heads``, even with ``swiglu``.
        n_layers: Transformer blocks.
        n_heads: attention heads H.
        n_neighbors: nearest spots K each spot attends to (itself excluded).
        dropout: probability inside the MLPs, in [0, 1).
        attn_dropout: probability on the attention weights, in [0, 1).
        activation: ``swiglu`` (published default), ``gelu`` or ``relu``.
        non_negative: a ReLU after every layer's gene head. The published code names this option but its release
            cannot run with it, and its forks went both ways.

    Raises:
        InputError: an impossible value, with the field's name.
    """

    n_genes: int
    feature_dim: int
    hidden_dim: int = 128
    pairwise_hidden_dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_neighbors: int = 8
    dropout: float = 0.2
    attn_dropout: float = 0.2
    activation: str = "swiglu"
    non_negative: bool = False

    def __post_init__(self) -> None:
        for field in (
            "n_genes",
            "feature_dim",
            "hidden_dim",
            "pairwise_hidden_dim",
            "n_layers",
            "n_heads",
            "n_neighbors",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{field}: must be a positive whole number, not {value!r}")
        for field in ("dropout", "attn_dropout"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise InputError(f"{field}: must be a probability in [0, 1), not {value!r}")
        if self.activation not in ACTIVATIONS:
            raise InputError(f"activation: must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if not isinstance(self.non_negative, bool):
            raise InputError(f"non_negative: must be true or false, not {self.non_negative!r}")
        for field in ("hidden_dim", "pairwise_hidden_dim"):
            value = getattr(self, field)
            if value % self.n_heads:
                raise InputError(f"{field}: must be a multiple of n_heads ({self.n_heads}), not {value}")
            if self.activation == "swiglu" and value % 2:
                raise InputError(f"{field}: must be even with activation swiglu, not {value}")

    @property
    def heads_are_narrow(self) -> bool:
        """Whether all that the gene heads read of a spot, n_layers * hidden_dim numbers, is less than its genes."""
        return self.n_layers * self.hidden_dim < self.n_genes

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DenoiserConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: an unknown or missing field, with its name.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"{unknown[0]}: is not a setting of the denoiser; the settings are {', '.join(sorted(known))}"
            )
        missing = [name for name in ("n_genes", "feature_dim") if name not in values]
        if missing:
            raise InputError(f"{missing[0]}: is missing from the denoiser's settings")
        return cls(**values)


def parse_bytes(size: int | str) -> int:
    """``"4GiB"``, ``"500 MB"`` or a number of bytes.

    Raises:
        InputError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", str(size))
    if not found:
        raise InputError(f"memory_budget: must be a size such as 4GiB or 500MB, not {size!r}")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))

"""The golden files: outputs and gradients of the published code (see ../shared/design/DESIGN.md, section 4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

CASES = (
    "batched_padding",
    "default_config",
    "narrow_edges",
    "non_negative",
    "small_gelu",
    "small_relu",
    "small_swiglu",
    "visium_hex_grid",
    "wide_neighbourhood",
)


class Golden:
    """One golden file; tensors come in the dtype asked for."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float64) -> None:
        self._file = np.load(path, allow_pickle=False)
        self.dtype = dtype

    def __contains__(self, key: str) -> bool:
        return key in self._file.files

    def __getitem__(self, key: str) -> torch.Tensor:
        value = torch.from_numpy(self._file[key])
        return value.to(self.dtype) if value.is_floating_point() else value

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self._file.files if key.startswith(prefix)}

    @property
    def config(self) -> dict[str, int | str | bool]:
        settings = {key[7:]: self._file[key].item() for key in self._file.files if key.startswith("config/")}
        return {**settings, "n_genes": self["input/gene_exp"].shape[-1], "dropout": 0.0, "attn_dropout": 0.0}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest entry."""
    if not len(expected.flatten()):
        return 0.0
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()

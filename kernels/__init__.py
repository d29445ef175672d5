"""Triton kernels: tensors in, tensors out. Installed as ``stflow_fast.kernels``; ``stflow_fast.ops`` chooses them."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def modules() -> list[ModuleType]:
    """Every module of the kernels, for what looks at all of them; kernels themselves are functions ``*_kernel``."""
    return [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]

"""stflow-fast: spatial gene expression from histology, for whole slides, in memory linear in the spots.

    >>> import stflow_fast
    >>> model = stflow_fast.Denoiser.from_pretrained("run/model")
    >>> drawn = stflow_fast.sample(model, (features, coords))

Names are loaded when they are first used, so that ``import stflow_fast`` and ``stflow-fast --help`` stay quick.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__

_HOMES = {
    "Denoiser": "model",
    "DenoiserConfig": "config",
    "InputError": "errors",
    "Prior": "priors",
    "SamplingConfig": "cohort",
    "Slide": "slides",
    "HestTask": "slides",
    "ReadOptions": "slides",
    "RunConfig": "cohort",
    "SpatialTransformer": "model",
    "SpotGraph": "graph",
    "TrainingConfig": "windows",
    "accelerate": "checkpoints",
    "calibrate": "calibration",
    "convert": "checkpoints",
    "embed": "embedding",
    "evaluate": "cohort",
    "fit": "training",
    "inspect": "inspection",
    "knn_graph": "graph",
    "load_model": "cohort",
    "OutputConfig": "outputs",
    "make_cohort": "synthetic",
    "predict": "cohort",
    "predict_adata": "tables",
    "predict_iter": "cohort",
    "read_h5ad": "slides",
    "Sampler": "sampling",
    "sample": "sampling",
    "train": "training",
    "use_backend": "ops",
    "use_compile": "ops",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stflow_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)

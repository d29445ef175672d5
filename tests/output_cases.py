"""A small model, slides, and their predictions as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest

from stflow_fast.cohort import predict
from stflow_fast.model import Denoiser
from stflow_fast.outputs import LAYOUT, Expression, OutputConfig, prediction_table, write_h5ad
from stflow_fast.slides import Slide

from .builders import arrays, small_model

GENES = ("ERBB2", "CD3E", "GATA3", "VWF")


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return small_model(len(GENES), GENES, "tiny")


def slide(name: str = "S0", n: int = 60, **more: Any) -> Slide:
    made = arrays("S0", n)
    return Slide(name, made["features"], made["centres"], made["barcodes"], **more)


def table_of(one: Slide) -> anndata.AnnData:
    return prediction_table(one, ["A", "B"], {"layout": LAYOUT})


def zeros(table: anndata.AnnData) -> Expression:
    return Expression(table.shape, "float32", [(slice(0, table.n_obs), [np.zeros(table.shape, np.float32)])])


def reread(table: anndata.AnnData, path: Path) -> anndata.AnnData:
    write_h5ad(path, table, zeros(table))
    return anndata.read_h5ad(path)


def predict_one(model: Denoiser, path: Path, one: Slide | None = None, **options: Any) -> anndata.AnnData:
    [written] = predict(model, [one or slide()], path, output=OutputConfig(**options))
    return anndata.read_h5ad(written)


HUNDREDS = {"A": {"spot_diameter_fullres": 180.0, "fiducial_diameter_fullres": 900.0}}
TENS = {"B": {"spot_diameter_fullres": 18.0}}

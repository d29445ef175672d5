"""Predictions in other interpreters: other versions of anndata read them, squidpy and scanpy draw them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stflow_fast import outputs
from stflow_fast.cohort import predict
from stflow_fast.model import Denoiser
from stflow_fast.outputs import OutputConfig

from .output_cases import GENES, model, slide

__all__ = ["model"]  # a fixture

pytestmark = pytest.mark.others


def run_in(python: str, script: str, *arguments: object) -> Any:
    """What a script prints as JSON in its last line, run by another interpreter."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "TRITON"))}
    command = [python, "-W", "ignore", "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


READ = """
import json, sys
import anndata
table = anndata.read_h5ad(sys.argv[1])
plain = lambda each: {key: plain(value) for key, value in each.items()} if hasattr(each, "items") else (
    each.tolist() if hasattr(each, "tolist") else each)
print(json.dumps({
    "X": table.X.astype("float64").tolist(), "dtype": str(table.X.dtype), "var": list(table.var_names),
    "obs": {name: [None if missing else str(value) for value, missing in zip(table.obs[name], table.obs[name].isna())]
            for name in table.obs},
    "barcodes": list(table.obs_names), "spatial": table.obsm["spatial"].tolist(), "uns": plain(table.uns),
}))
"""


@pytest.mark.parametrize("dtype", outputs.DTYPES)
def test_other_versions_of_anndata_read_the_same(model: Denoiser, tmp_path: Path, dtype: str) -> None:
    pythons = os.environ.get("STFLOW_ANNDATA_PYTHONS")
    if not pythons:
        pytest.skip(
            "STFLOW_ANNDATA_PYTHONS names no interpreters (with colons between) that have other versions of anndata"
        )
    n = 60
    obs = pd.DataFrame(
        {
            "number": np.linspace(0, 1, n),
            "text": [f"cell {i}" for i in range(n)],
            "missing": ["a", None] * (n // 2),
            "whole": pd.array([1, None] * (n // 2), dtype="Int64"),
            "flag": pd.array([True, None] * (n // 2), dtype="boolean"),
            "string": pd.array(["q", "r"] * (n // 2), dtype="string"),
            "ordered": pd.Categorical(["hi", "lo"] * (n // 2), categories=["lo", "hi"], ordered=True),
        }
    )
    output = OutputConfig(dtype=dtype, genes=GENES[:3])
    [path] = predict(model, [slide(obs=obs, notes=("ä note",))], tmp_path / "out", output=output)
    expected, *others = [run_in(python, READ, path) for python in (sys.executable, *pythons.split(":"))]
    assert expected["dtype"] == dtype
    assert expected["obs"]["whole"] == ["1", None] * (n // 2)
    for found in others:
        assert found == expected


DRAW = """
import json, sys
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import anndata, numpy as np, scanpy, squidpy

table = anndata.read_h5ad(sys.argv[1])
gene = table.var_names[0]
several = {"library_key": "library_id"} if len(table.uns["spatial"]) > 1 else {}
drawings = {
    "squidpy": lambda: squidpy.pl.spatial_scatter(table, color=gene, **several),
    "embedding": lambda: scanpy.pl.embedding(table, basis="spatial", color=gene, show=False),
}
if not several:
    drawings["scanpy"] = lambda: scanpy.pl.spatial(table, color=gene, show=False)
shares = {}
for name, draw in drawings.items():
    plt.close("all")
    draw()
    figure = plt.gcf()
    figure.savefig(f"{sys.argv[2]}/{name}.png")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[::-1, :, :3].astype(int)
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.get_label() != "<colorbar>"]
    panels = [pixels[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] for box in boxes]
    shares[name] = [float((np.ptp(panel, axis=-1) > 30).mean()) for panel in panels]
print(json.dumps(shares))
"""


@pytest.mark.parametrize("sections", [1, 2])
def test_squidpy_and_scanpy_draw_predictions_as_they_are(model: Denoiser, tmp_path: Path, sections: int) -> None:
    """Circles fill a good part of each panel: of several sections, one has a panel of its own."""
    python = os.environ.get("STFLOW_SQUIDPY_PYTHON")
    if not python:
        pytest.skip("STFLOW_SQUIDPY_PYTHON names no interpreter that has squidpy and scanpy")
    n = 200
    library = None if sections == 1 else np.where(np.arange(n) < n // 2, "upper", "lower")
    [path] = predict(model, [slide(n=n, library_id=library)], tmp_path / "out")
    shares = run_in(python, DRAW, path, tmp_path)
    assert len(shares["squidpy"]) == sections
    assert all(share > 0.2 for panels in shares.values() for share in panels), shares

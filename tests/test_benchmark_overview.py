"""The README's picture: drawn from a demo and from the committed lines."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks.studies import overview
from stflow_fast.synthetic import make_cohort


def test_it_shows_the_demos_gene_beside_its_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = make_cohort(n_train=1, train_spots=20, test_spots=60)
    monkeypatch.setattr(overview, "make_cohort", lambda seed: cohort)
    slide, drawn = cohort.test[0], []
    monkeypatch.setattr(overview, "draw_spots", lambda axes, coords, values, *rest: drawn.append(values))
    truth = slide.expression(cohort.genes, "log1p")
    table = anndata.AnnData(2 * truth, var=pd.DataFrame(index=list(cohort.genes)))
    table.uns["stflow_fast"] = {"normalize": "log1p"}
    (tmp_path / "predictions").mkdir()
    table.write_h5ad(tmp_path / "predictions" / f"{slide.id}.h5ad")
    (tmp_path / "demo.json").write_text(json.dumps({"seed": 0}))
    overview.draw(tmp_path, tmp_path / "overview.png")
    column = cohort.genes.index(overview.GENE)
    for values, expected in zip(drawn, (truth, 2 * truth), strict=True):
        assert values == pytest.approx(expected[:, column])
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_its_times_are_the_lines_that_were_measured() -> None:
    axes = Figure().subplots()
    overview.draw_times(axes)
    last = {line.get_label(): tuple(line.get_xydata()[-1]) for line in axes.lines}
    assert list(last) == [name for *_, name in overview.SERIES]
    assert last["stflow-fast, two CPU cores"] == pytest.approx((1e6, 449.4), rel=1e-3)
    assert last["stflow-fast, NVIDIA H200, bf16"] == pytest.approx((1e6, 0.2105), rel=1e-3)
    lacking = [f"{spots} spots: out of memory" for spots in ("100,000", "3,000,000", "1,000,000")]
    assert [text.get_text().strip() for text in axes.texts] == lacking

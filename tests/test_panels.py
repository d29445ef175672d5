"""Gene panels as HEST-bench picks them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from stflow_fast.errors import InputError
from stflow_fast.slides import HestTask, Slide, read_genes
from stflow_fast.slides.panels import variable_genes_of

from .builders import gene_names, write_task
from .command_cases import say

__all__ = ["say"]  # a fixture


def slide(name: str, counts: np.ndarray, genes: list[str]) -> Slide:
    n = len(counts)
    coords = np.column_stack([np.arange(n), np.zeros(n)])
    return Slide(name, None, coords, np.arange(n).astype(str), scipy.sparse.csr_matrix(counts), tuple(genes))


@pytest.mark.parametrize("n", [50, 500])
def test_the_panels_of_her2st_are_picked_again(shared: Callable[[str], Path], n: int) -> None:
    """Those that scanpy made, through HEST's own code."""
    root = shared("data/her2st")
    task = HestTask(root)
    slides = [task.measured(name) for name in ("A1", "B4", "C2", "C3", "C4", "C5", "C6")]
    assert variable_genes_of(slides, n) == read_genes(root / f"var_{n}genes.json")
    assert variable_genes_of(slides, 4523) == tuple(sorted(read_genes(root / "all_genes.json")))


def test_genes_must_be_detected_in_every_slide_and_be_genes() -> None:
    rng = np.random.default_rng(0)
    genes = ["FLAT", "WILD", "RARE", "BLANK_1", "Control_2", "TWICE", "TWICE", "HERE"]
    counts = rng.poisson(5, (100, 8)).astype(float)
    counts[:, 1] *= rng.integers(0, 6, 100)
    counts[9:, 2] = 0  # in 9 of 100 spots
    first, second = slide("a", counts, genes), slide("b", counts[:, :7], genes[:7])
    assert variable_genes_of([first, second], 2) == ("FLAT", "WILD")
    assert variable_genes_of([first, second], 3, min_share=0.05) == ("FLAT", "RARE", "WILD")
    with pytest.raises(InputError, match="n: 3 genes are wanted, but 2 are detected in 10% of the spots of each of 2"):
        variable_genes_of([first, second], 3)
    with pytest.raises(InputError, match="slides: none is given"):
        variable_genes_of([], 3)


def test_a_gene_is_compared_with_those_of_about_its_mean() -> None:
    rng = np.random.default_rng(0)
    means = np.repeat([2.0, 20.0], 30)
    counts = rng.poisson(means, (400, 60)).astype(float)
    counts[:, 7] = rng.negative_binomial(1, 1 / 3, 400)  # of mean 2, with thrice the variance
    counts[:, 40] = rng.negative_binomial(20, 0.5, 400)  # of mean 20, with twice
    genes = [f"G{number:02d}" for number in range(60)]
    assert variable_genes_of([slide("a", counts, genes)], 2) == ("G07", "G40")


def test_panels_of_training_slides_and_of_all(tmp_path: Path, say: Callable[..., str]) -> None:
    task, out = write_task(tmp_path / "task"), tmp_path / "genes.json"
    say("genes", task, "--out", out, "--n", 5, "--fold", 0, code=0)
    of_training = read_genes(out)
    told = HestTask(task)
    assert of_training == variable_genes_of([told.measured("S0"), told.measured("S1")], 5)
    assert set(of_training) < set(gene_names())
    assert "exists already" in say("genes", task, "--out", out, "--all")
    say("genes", task, "--out", out, "--n", 5, "--all", "--overwrite", code=0)
    assert read_genes(out) == variable_genes_of(map(told.measured, ("S0", "S1", "S2")), 5)
    assert "wants --fold K" in say("genes", task, "--out", tmp_path / "other.json")
    assert "n: 99 genes are wanted" in say("genes", task, "--out", tmp_path / "other.json", "--all", "--n", 99)

"""Gene panels: the genes that vary the most, as HEST-bench picks them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd

from ..errors import InputError
from .slide import Slide

MIN_SHARE = 0.1
"""Of the spots of every slide, in which a gene must be detected."""

BINS = 20
"""Of genes by their mean, within which dispersions are compared."""

NO_GENES = ("BLANK", "Control")
"""In names of probes that are no genes."""


class _Counted(NamedTuple):
    """Of one slide."""

    spots: int
    detected: dict[str, int]  # by gene, in how many spots
    total: dict[str, float]  # of counts
    squares: dict[str, float]


def variable_genes_of(slides: Iterable[Slide], n: int, min_share: float = MIN_SHARE) -> tuple[str, ...]:
    """The ``n`` most variable genes, in alphabetical order: HEST's ``get_k_genes(..., "var")``, which is scanpy's
    ``highly_variable_genes`` (seurat's flavour; Satija et al. 2015) of the counts of all slides, among genes that are
    detected in enough spots of every slide.

    The dispersion of a gene is the logarithm of the variance of its counts over their mean. It is compared with that of
    genes of about the same mean: :data:`BINS` bins of log1p of the mean, in each of which it is standardised.

    Args:
        slides: with counts; gone through once.
        n: genes wanted.
        min_share: of the spots of every slide.

    Raises:
        InputError: no slides, slides without counts, or fewer genes than are wanted.
    """
    found = [_counted(slide) for slide in slides]
    if not found:
        raise InputError("slides: none is given; genes are picked by their counts")
    wanted = (
        {name for name, spots in one.detected.items() if spots >= np.ceil(min_share * one.spots)} for one in found
    )
    shared = sorted(name for name in set.intersection(*wanted) if not any(part in name for part in NO_GENES))
    if len(shared) < n:
        share = f"{min_share:.0%} of the spots of each of {len(found)} slides"
        raise InputError(f"n: {n} genes are wanted, but {len(shared)} are detected in {share}; ask for fewer")
    spots = sum(one.spots for one in found)
    mean, squares = (
        np.array([sum(getattr(one, what)[name] for one in found) for name in shared]) / spots
        for what in ("total", "squares")
    )
    variance = (squares - mean**2) * spots / max(1, spots - 1)
    order = np.argsort(-_standardised(mean, variance), kind="stable")[:n]
    return tuple(shared[index] for index in sorted(order.tolist()))


def _counted(slide: Slide) -> _Counted:
    if slide.counts is None:
        raise InputError(f"slide {slide.id}: has no expression; give its counts")
    once = {name for name, times in Counter(slide.gene_names).items() if times == 1}
    counts = slide.counts.astype(np.float64)
    sums = (counts > 0).sum(axis=0), counts.sum(axis=0), counts.power(2).sum(axis=0)
    detected, total, squares = (
        dict(zip(slide.gene_names, np.asarray(each).ravel().tolist(), strict=True)) for each in sums
    )
    return _Counted(slide.n_spots, {name: detected[name] for name in once}, total, squares)


def _standardised(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """[G] dispersions among those of genes of the same bin; of a gene that is alone in its bin 1."""
    dispersion = np.log(np.maximum(variance, 1e-300) / mean)
    table = pd.DataFrame({"dispersion": dispersion, "bin": pd.cut(np.log1p(mean), bins=BINS)})
    grouped = table.groupby("bin", observed=True)["dispersion"]
    centre, spread = grouped.transform("mean"), grouped.transform("std")
    alone = spread.isna()
    centre, spread = centre.where(~alone, 0.0), spread.where(~alone, grouped.transform("mean"))
    scaled: np.ndarray = ((table["dispersion"] - centre) / spread).fillna(0.0).to_numpy()
    return scaled

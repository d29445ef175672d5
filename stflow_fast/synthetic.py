"""A synthetic cohort that behaves like tissue: what ``stflow-fast demo`` trains on, and data for tests.

Nothing here is fitted to a real slide. What the cohort shares with one is what matters for a model that looks at
neighbours: domains (tumour, stroma, immune, fat) with smooth gene programmes inside, a Visium lattice cut to an
outline, sequencing depth that differs from spot to spot and slide to slide, over-dispersed counts with excess zeros,
and image features that see the programmes through noise that is drawn afresh for every patch. Because the programmes
are smooth and the noise is not, the patches around a spot tell about it what its own patch does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import scipy.sparse

from .errors import InputError
from .slides import Slide

MICRON_PER_PIXEL = 0.5
PITCH_MICRON = 100.0
"""Distance between neighbouring spots of a Visium lattice, in micrometres."""

N_BACKGROUND = 300
"""Genes outside the panel, so that the total count of a spot says something about its depth."""

MARKERS = {
    "luminal": ("ERBB2", "GATA3", "ESR1", "KRT8", "KRT18", "GRB7", "TFF3"),
    "proliferation": ("UBE2C", "MKI67", "TOP2A", "CCNB1", "BIRC5", "CDK1", "PCNA"),
    "hypoxia": ("CA9", "VEGFA", "NDRG1", "ADM", "SLC2A1", "LDHA"),
    "matrix": ("COL1A1", "COL3A1", "FN1", "POSTN", "DCN", "LUM"),
    "vascular": ("VWF", "PECAM1", "CDH5", "ENG", "PLVAP", "CLDN5"),
    "lymphoid": ("CD3E", "CD8A", "MS4A1", "CXCL13", "IL7R", "CD79A"),
    "myeloid": ("CD68", "C1QA", "ISG15", "IFI27", "CXCL10", "LYZ"),
    "adipose": ("FABP4", "ADIPOQ", "PLIN1", "LPL", "CIDEC", "G0S2"),
}
"""Programme -> genes that follow it; their order is the order of the columns of ``Cohort.programmes``."""

PROGRAMMES = tuple(MARKERS)

# How far the noise of one patch hides each programme, in units of the programme's own range: a duct or fat is plain
# in a stain, an interferon response is not.
_PATCH_NOISE = np.array([0.7, 0.9, 0.9, 0.7, 1.0, 0.8, 1.3, 0.5])
_FOURIER_TERMS = 256


@dataclass(frozen=True)
class Cohort:
    """Slides to train on, slides to test on, and the truth behind them.

    Attributes:
        train: training slides, with counts.
        test: test slides, with counts.
        genes: the panel to predict; every slide has these genes and ``N_BACKGROUND`` others.
        programmes: slide id -> [N, len(PROGRAMMES)] float64, the noiseless activity that the counts were drawn
            from, about 0 to 1.5: an upper bound of what any model can know.
    """

    train: list[Slide]
    test: list[Slide]
    genes: tuple[str, ...]
    programmes: dict[str, np.ndarray]


@dataclass(frozen=True)
class _World:
    """What all slides of a cohort share: genes, how they follow the programmes, and the image encoder."""

    gene_names: tuple[str, ...]
    log_mean: np.ndarray  # [G_all] log expected count where no programme is active
    loading: np.ndarray  # [programmes, G_all]
    dispersion: np.ndarray  # [G_all] inverse over-dispersion of the negative binomial
    zero_probability: np.ndarray  # [G_all] excess zeros
    encoder: np.ndarray  # [programmes, F]
    encoder_bias: np.ndarray  # [F]


def make_cohort(
    n_train: int = 4,
    train_spots: int = 1200,
    test_spots: int = 10_000,
    n_genes: int = 50,
    feature_dim: int = 128,
    seed: int = 0,
) -> Cohort:
    """Make ``n_train`` training slides and one test slide; the same arguments give the same cohort.

    A slide depends on ``seed``, its own number and its own size only: more training slides do not change the others.

    Args:
        n_train: number of training slides.
        train_spots: spots of each training slide.
        test_spots: spots of the test slide.
        n_genes: size of the panel; the first 50 names are known markers of the programmes.
        feature_dim: size of a patch's feature vector.
        seed: a whole number, 0 or larger.

    Raises:
        InputError: a count below 1, or a negative seed.
    """
    sizes = {
        "n_train": n_train,
        "train_spots": train_spots,
        "test_spots": test_spots,
        "n_genes": n_genes,
        "feature_dim": feature_dim,
    }
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name}: must be 1 or larger, not {value}")
    if seed < 0:
        raise InputError(f"seed: must be 0 or larger, not {seed}")
    world = _make_world(n_genes, feature_dim, np.random.default_rng([seed, 0]))
    programmes: dict[str, np.ndarray] = {}

    def make(kind: int, number: int, name: str, n_spots: int) -> Slide:
        slide, programmes[name] = _make_slide(name, n_spots, world, np.random.default_rng([seed, kind, number]))
        return slide

    train = [make(1, i, f"synthetic_train_{i}", train_spots) for i in range(n_train)]
    test = [make(2, 0, "synthetic_test_0", test_spots)]
    return Cohort(train, test, world.gene_names[:n_genes], programmes)


def _make_world(n_genes: int, feature_dim: int, rng: np.random.Generator) -> _World:
    panel, programme = _panel(n_genes)
    n_all, n_programmes = n_genes + N_BACKGROUND, len(PROGRAMMES)
    log_mean = np.concatenate([rng.normal(-1.2, 0.4, n_genes), rng.normal(1.2, 0.9, N_BACKGROUND)])
    loading = rng.normal(0.0, 0.15, (n_programmes, n_all))
    loading[programme, np.arange(n_genes)] = rng.uniform(2.2, 3.2, n_genes)
    visibility = rng.normal(0.0, 1.0, (n_programmes, feature_dim))
    return _World(
        gene_names=panel + _background_names(panel),
        log_mean=log_mean,
        loading=loading,
        dispersion=rng.uniform(2.0, 6.0, n_all),
        zero_probability=rng.uniform(0.05, 0.2, n_all),
        encoder=visibility,
        encoder_bias=rng.uniform(-1.0, 1.0, feature_dim),
    )


def _panel(n_genes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the panel and the programme of each, dealt in turn so that a small panel covers all programmes."""
    rows = zip_longest(*([(name, p) for name in names] for p, names in enumerate(MARKERS.values())))
    known = [pair for pair in chain.from_iterable(rows) if pair is not None]
    more = [(f"TMEM{i + 1}", i % len(PROGRAMMES)) for i in range(max(0, n_genes - len(known)))]
    names, programme = zip(*(known + more)[:n_genes], strict=True)
    return names, np.array(programme)


def _background_names(panel: Sequence[str]) -> tuple[str, ...]:
    families = (("RPL", 40), ("RPS", 30), ("NDUFA", 13), ("PSMA", 7), ("ZNF", N_BACKGROUND))
    names = (f"{family}{i + 1}" for family, size in families for i in range(size))
    taken = set(panel)
    return tuple(name for name in names if name not in taken)[:N_BACKGROUND]


def _make_slide(name: str, n_spots: int, world: _World, rng: np.random.Generator) -> tuple[Slide, np.ndarray]:
    micron = _spots_in_outline(n_spots, rng)
    domains, depth_in_tumour = _domains(micron, rng)
    programmes = _programmes(micron, domains, depth_in_tumour, rng)
    counts = _counts(domains, programmes, micron, world, rng)
    slide = Slide(
        id=name,
        features=_features(programmes, world, rng),
        coords=micron / MICRON_PER_PIXEL,
        barcodes=_barcodes(n_spots),
        counts=scipy.sparse.csr_matrix(counts),
        gene_names=world.gene_names,
        micron_per_pixel=MICRON_PER_PIXEL,
    )
    return slide, programmes


def _fields(points: np.ndarray, length: float, n_fields: int, rng: np.random.Generator) -> np.ndarray:
    """``n_fields`` independent smooth Gaussian random fields, mean 0 and variance 1, at ``points`` [N, 2].

    Squared-exponential covariance exp(-d^2 / (2 length^2)), by random Fourier features.

    Returns: [N, n_fields] float64.
    """
    frequency = rng.normal(0.0, 1.0 / length, (2, _FOURIER_TERMS))
    phase = rng.uniform(0.0, 2 * np.pi, _FOURIER_TERMS)
    weight = rng.normal(0.0, np.sqrt(2.0 / _FOURIER_TERMS), (_FOURIER_TERMS, n_fields))
    return np.cos(points @ frequency + phase) @ weight


def _spots_in_outline(n_spots: int, rng: np.random.Generator) -> np.ndarray:
    """Centres in micrometres, [n_spots, 2]: a hexagonal lattice cut to a wavy outline, row by row."""
    side = int(np.ceil(1.35 * np.sqrt(n_spots))) + 2
    row, column = np.divmod(np.arange(side * side), side)
    points = PITCH_MICRON * np.column_stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2])
    centred = (points - points.mean(axis=0)) / (np.ptp(points, axis=0) + PITCH_MICRON)
    outside = np.linalg.norm(centred, axis=1) + 0.06 * _fields(centred, 0.2, 1, rng)[:, 0]
    chosen = np.sort(np.argsort(outside, kind="stable")[:n_spots])
    kept: np.ndarray = points[chosen] - points[chosen].min(axis=0) + PITCH_MICRON
    return kept


def _domains(micron: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Share of tumour, stroma, immune and fat in every spot, [N, 4], and how deep in the tumour it lies, [N]."""
    tumour, stroma, fat = _fields(micron, 600.0, 3, rng).T
    immune = _fields(micron, 350.0, 1, rng)[:, 0]
    margin = np.exp(-(tumour**2) / 0.2)  # lymphocytes gather where tumour meets stroma
    logits = np.column_stack([tumour + 0.2, stroma, immune - 0.9 + 0.9 * margin, fat - 0.5])
    share = np.exp(5.0 * (logits + rng.normal(0.0, 0.15, 4)))
    share /= share.sum(axis=1, keepdims=True)
    return share, tumour


def _programmes(micron: np.ndarray, domains: np.ndarray, core: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Activity of every programme, [N, len(PROGRAMMES)], smooth within its domain."""
    tumour, stroma, immune, fat = domains.T
    wave = _fields(micron, 300.0, len(PROGRAMMES), rng)
    activity = {
        "luminal": tumour * (0.85 + 0.3 * wave[:, 0]),
        "proliferation": tumour * _sigmoid(3.0 * wave[:, 1]),
        "hypoxia": tumour * _sigmoid(4.0 * (core - 0.7) + wave[:, 2]),
        "matrix": stroma * (0.85 + 0.3 * wave[:, 3]) + 0.15 * tumour,
        "vascular": (stroma + 0.5 * fat + 0.3 * tumour) * _sigmoid(4.0 * (wave[:, 4] - 0.5)),
        "lymphoid": immune * (0.9 + 0.3 * wave[:, 5]),
        "myeloid": (immune + 0.6 * tumour + 0.3 * stroma) * _sigmoid(3.0 * (wave[:, 6] - 0.3)),
        "adipose": fat * (0.9 + 0.15 * wave[:, 7]),
    }
    return np.column_stack([activity[name] for name in PROGRAMMES]).clip(0.0, None)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    shares: np.ndarray = 1.0 / (1.0 + np.exp(-x))
    return shares


def _counts(
    domains: np.ndarray, programmes: np.ndarray, micron: np.ndarray, world: _World, rng: np.random.Generator
) -> np.ndarray:
    """Zero-inflated negative binomial counts, [N, G_all] float32."""
    n_spots = len(domains)
    cells = domains @ np.array([0.25, 0.0, 0.35, -0.8])  # log cell density: fat is nearly empty
    depth = rng.normal(0.0, 0.3) + cells + 0.1 * _fields(micron, 800.0, 1, rng)[:, 0] + rng.normal(0.0, 0.25, n_spots)
    mean = np.exp(depth[:, None] + world.log_mean + programmes @ world.loading)
    counts = rng.poisson(rng.gamma(world.dispersion, mean / world.dispersion))
    return np.where(rng.random(counts.shape) < world.zero_probability, 0, counts).astype(np.float32)


def _features(programmes: np.ndarray, world: _World, rng: np.random.Generator) -> np.ndarray:
    """What an image encoder makes of each patch, [N, F] float32: a saturating view of the programmes behind noise.

    The noise enters before the encoder, so a patch misleads all its features together: no amount of features averages
    it away, only other patches do. A stain shift moves the whole slide.
    """
    n_spots, n_programmes = programmes.shape
    seen = programmes + _PATCH_NOISE * rng.normal(size=(n_spots, n_programmes))
    stain = rng.normal(0.0, 0.1, world.encoder_bias.shape)
    view: np.ndarray = np.tanh(seen @ world.encoder + world.encoder_bias)
    return (view + stain + rng.normal(0.0, 0.2, view.shape)).astype(np.float32)


def _barcodes(n_spots: int) -> np.ndarray:
    """Sixteen bases and the lane, as Visium names its spots; an odd multiplier modulo 4^16 never repeats."""
    code = (np.arange(n_spots, dtype=np.uint64) * np.uint64(2_654_435_761) + np.uint64(0x1B2D_3C4F)) % np.uint64(4**16)
    digits = (code[:, None] >> np.arange(30, -1, -2, dtype=np.uint64)) & np.uint64(3)
    bases = np.array(["A", "C", "G", "T"])[digits.astype(np.intp)]
    return np.array(["".join(row) + "-1" for row in bases])

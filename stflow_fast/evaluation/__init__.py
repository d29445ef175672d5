"""What a prediction is worth: scores, baselines that must stand beside it, tissue structure, and certainty."""

from .baselines import ALPHAS, PCA_COMPONENTS, PCA_SEED, STRONG_ALPHA, Baseline, baselines
from .certainty import certainty, random_training_spots
from .compare import compare
from .groups import left_out_groups
from .hotspots import TOP_SHARE, check_biomarkers, top_overlap
from .neighbors import NEAREST, neighbor_mean, neighbor_weights
from .scores import score
from .structure import gene_correlation_error, morans_i, structure, zero_fraction

__all__ = [
    "ALPHAS",
    "Baseline",
    "NEAREST",
    "PCA_COMPONENTS",
    "PCA_SEED",
    "STRONG_ALPHA",
    "TOP_SHARE",
    "baselines",
    "certainty",
    "check_biomarkers",
    "compare",
    "gene_correlation_error",
    "left_out_groups",
    "morans_i",
    "neighbor_mean",
    "neighbor_weights",
    "random_training_spots",
    "score",
    "structure",
    "top_overlap",
    "zero_fraction",
]

"""What a prediction is worth: scores, baselines that must stand beside it, tissue structure, and certainty."""

from .baselines import ALPHAS, PCA_COMPONENTS, PCA_SEED, STRONG_ALPHA, Baseline, baselines
from .certainty import Draws, certainty, random_training_spots
from .compare import compare
from .groups import left_out_groups
from .hotspots import TOP_SHARE, check_biomarkers, top_overlap
from .neighbors import NEAREST, neighbor_mean, neighbor_weights, neighborhood_mean
from .scores import score
from .structure import GeneCorrelations, Structure, morans_i, zero_fraction

__all__ = [
    "ALPHAS",
    "Baseline",
    "Draws",
    "GeneCorrelations",
    "NEAREST",
    "PCA_COMPONENTS",
    "PCA_SEED",
    "STRONG_ALPHA",
    "Structure",
    "TOP_SHARE",
    "baselines",
    "certainty",
    "check_biomarkers",
    "compare",
    "left_out_groups",
    "morans_i",
    "neighbor_mean",
    "neighbor_weights",
    "neighborhood_mean",
    "random_training_spots",
    "score",
    "top_overlap",
    "zero_fraction",
]

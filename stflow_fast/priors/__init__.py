"""What x_0 is drawn from, and what x_1 may be around its mean: sources of the flow, and observation models."""

from .fitted import FittedSource
from .prior import PRIORS, Prior, Source
from .sources import SOURCES, fit_source, load_source
from .streams import PIECE, check_seed, slide_seed

__all__ = [
    "PIECE",
    "PRIORS",
    "SOURCES",
    "FittedSource",
    "Prior",
    "Source",
    "check_seed",
    "fit_source",
    "load_source",
    "slide_seed",
]

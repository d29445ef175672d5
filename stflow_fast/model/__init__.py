"""STFlow's network with its parameters and its call, computed in memory linear in the spots.

The modules hold the published parameters under the published names, so checkpoints go both ways. What they compute
is the rearranged mathematics of ops/reference.py, on a SpotGraph; the padded calls build one and call the same.
"""

from .calls import CALLS_BUDGET, KnownSlides
from .denoiser import Denoiser, TimestepEmbedder
from .encoder import SpatialTransformer
from .folding import EncoderState, LayerState

__all__ = [
    "CALLS_BUDGET",
    "Denoiser",
    "EncoderState",
    "KnownSlides",
    "LayerState",
    "SpatialTransformer",
    "TimestepEmbedder",
]

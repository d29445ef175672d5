"""Training: flow matching on windows of slides, honest selection of the epoch, and resuming to the same bits."""

from .fitting import Run, fit, train
from .folds import SELECTIONS, load_fold
from .trainer import Diverged

__all__ = ["Diverged", "Run", "SELECTIONS", "fit", "load_fold", "train"]

"""Cohorts: slides of files and folders to predictions and scores, unattended (``run.py``), and the score of a fold."""

from .evaluate import Evaluation, evaluate, evaluate_slides, keep_scores
from .page import PAGE
from .run import MANIFEST, predict, predict_iter, summarize, would_do
from .run_config import RunConfig
from .settings import SamplingConfig, drawn_by, gene_names, load_model, made_by, model_and_origin
from .state import SlideLine, read_lines

__all__ = [
    "MANIFEST",
    "PAGE",
    "Evaluation",
    "RunConfig",
    "SamplingConfig",
    "SlideLine",
    "drawn_by",
    "evaluate",
    "evaluate_slides",
    "gene_names",
    "keep_scores",
    "load_model",
    "made_by",
    "model_and_origin",
    "predict",
    "predict_iter",
    "read_lines",
    "summarize",
    "would_do",
]

"""What a person sees of a result: tables for the terminal, pictures, and a web page that needs no network."""

from .charts import reliability, score_bars, training_curves
from .maps import gene_maps
from .page import write_html
from .pictures import evaluation_pictures, pick_genes
from .tables import biomarker_table, certainty_table, hotspot_table, observation_table, protocol_table, results_table

__all__ = [
    "biomarker_table",
    "certainty_table",
    "evaluation_pictures",
    "gene_maps",
    "hotspot_table",
    "observation_table",
    "pick_genes",
    "protocol_table",
    "reliability",
    "results_table",
    "score_bars",
    "training_curves",
    "write_html",
]

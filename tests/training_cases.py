"""A small cohort to train on, and settings that are quick."""

from __future__ import annotations

import pytest
import torch

from stflow_fast.synthetic import make_cohort
from stflow_fast.training import Run
from stflow_fast.windows import TrainingConfig, TrainingData, hold_out_regions

TINY = {"hidden_dim": 16, "pairwise_hidden_dim": 16, "n_layers": 1}
QUICK = TrainingConfig(epochs=3, windows_per_slide=4, ema_decay=0.5)


@pytest.fixture(scope="module")
def data() -> TrainingData:
    cohort = make_cohort(n_train=2, train_spots=120, test_spots=10, n_genes=6, feature_dim=12)
    rest, regions = hold_out_regions(cohort.train, 0.2, 0)
    return TrainingData(rest, regions, "held-out regions", cohort.genes, "synthetic")


def weights(run: Run) -> list[torch.Tensor]:
    return list(run.model.state_dict().values())

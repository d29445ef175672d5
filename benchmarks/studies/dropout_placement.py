"""Does our one dropout that stands elsewhere cost accuracy? her2st with both placements, three folds, three seeds.

OMP_NUM_THREADS=1 python -m benchmarks dropout_placement ../shared/data/her2st --out runs/dropout_placement

The published ``edge_trans`` drops out the edge representation of every frame, after its fc2; ours the normalised
hidden vector before it (``edge_messages`` in stflow_fast/ops/reference.py). Everything else is placed alike. Trains
what is not there yet (two to three minutes a run on one core) and writes benchmarks/results/dropout_placement.json and
dropout_placement.md after every seed but the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

import stflow_fast
from stflow_fast.config import DenoiserConfig
from stflow_fast.graph import MISSING, SpotGraph
from stflow_fast.markdown import table
from stflow_fast.model import Denoiser
from stflow_fast.progress import epochs_bar
from stflow_fast.training import load_fold
from stflow_fast.windows import TEST, TrainingConfig

from ..opponents.eager_stflow import SIGN_FRAMES, EagerAttention, EagerBlock
from ..pages import RESULTS
from ..suite.measure import commit

PLACEMENTS = {
    "ours": "ours: before fc2 of `edge_trans`, on its normalised hidden vector",
    "published": "published: after fc2, on the edge representation",
}


ENCODER, FOLDS, SEEDS = "efficientnet_lite0", (0, 1, 2), (0, 1, 2)


class Case(NamedTuple):
    fold: int
    seed: int

    @property
    def name(self) -> str:
        return f"test_f{self.fold}_s{self.seed}"


class PublishedPlacement(Denoiser):
    """The denoiser with every dropout of its training mode where it is published: the plain blocks of the baseline,
    with this model's parameters."""

    def denoise(
        self,
        graph: SpotGraph,
        x_t: Tensor,
        image: Tensor,
        t: Tensor,
        states: Any = None,
        slide_seed: Tensor | None = None,
    ) -> Tensor:
        if not self.training:
            return super().denoise(graph, x_t, image, t, states, slide_seed)
        # From the seed of the windows, as our own masks are: a resumed run draws what an uninterrupted one would.
        assert slide_seed is not None, "a training step has it"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(slide_seed[0]))
            return self.plain(graph, x_t, image, t)

    def plain(self, graph: SpotGraph, x_t: Tensor, image: Tensor, t: Tensor) -> Tensor:
        """:meth:`denoise` by the blocks of the baseline, dropout in training mode from torch's generator."""
        assert (graph.neighbors != MISSING).all(), "the baseline knows no missing neighbours"
        config = self.config
        with torch.device("meta"):  # every parameter is one of ours
            block = EagerBlock(
                config.n_genes,
                config.hidden_dim,
                config.pairwise_hidden_dim,
                config.n_heads,
                config.activation,
                config.non_negative,
                config.dropout,
                config.attn_dropout,
                EagerAttention,
            ).train(self.training)
        # The frames are the graph's, whatever the block makes of its coordinates.
        signs = graph.geometry.new_tensor(SIGN_FRAMES).view(1, 4, 1, 2)
        projected, distance = graph.geometry.unsqueeze(1).split([2, 1], dim=-1)
        frames = torch.cat([projected * signs, distance.expand(-1, 4, -1, -1)], dim=-1)
        block.attn.edge_trans.register_forward_pre_hook(lambda module, inputs: (frames,))
        coords = graph.geometry.new_zeros(graph.n_spots, 2)
        x, tokens, heads = x_t, image + self.fourier_proj(t)[graph.slide_of], []
        for ours in self.backbone.blks:
            parameters: dict[str, Tensor] = dict(ours.named_parameters())
            x, tokens = functional_call(block, parameters, (x, tokens, coords, graph.neighbors), strict=True)
            heads.append(x)
        return torch.stack(heads).mean(dim=0)


def check() -> None:
    """The variant differs from the package by the dropout alone: equal without it, and another draw with it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    torch.manual_seed(0)
    graph = SpotGraph.build(draw(60, 2), 8, torch.tensor([0, 9, 60]), torch.float64)
    inputs = graph, draw(60, 50), draw(60, 128), draw(2)
    rates: list[dict[str, Any]] = [{"dropout": p, "attn_dropout": p} for p in (0.0, 0.2)]
    off, on = rates
    model = PublishedPlacement(DenoiserConfig(n_genes=50, feature_dim=4, **off)).double().train()
    seed, weight = torch.tensor([5, 6]), draw(60, 50)
    made = []
    for denoise in (model.denoise, super(PublishedPlacement, model).denoise):
        model.zero_grad()
        predicted = denoise(*inputs, slide_seed=seed)
        (predicted * weight).sum().backward()
        # A bias in front of a softmax has a gradient of rounding alone: hence the 1 beside the largest.
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        made.append({"": predicted.detach(), **gradients})
    assert made[0].keys() == made[1].keys()
    worst = max(float((made[0][k] - v).abs().max() / max(1.0, float(v.abs().max()))) for k, v in made[1].items())
    assert worst < 1e-9, worst
    dropping = PublishedPlacement(DenoiserConfig(n_genes=50, feature_dim=4, **on)).double().train()
    dropping.load_state_dict(model.state_dict())
    with torch.no_grad():
        first, again, other = (dropping.denoise(*inputs, slide_seed=seed + i) for i in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)
        evaluated = dropping.eval().denoise(*inputs)
        assert torch.equal(evaluated, super(PublishedPlacement, dropping).denoise(*inputs))
        assert F.l1_loss(dropping.plain(*inputs), evaluated) < 1e-9  # off in evaluation, both paths
        single: Any = [part.to("cpu", torch.float32) for part in inputs]
        dropping.float()
        assert (dropping.plain(*single) - dropping.denoise(*single)).abs().max() < 1e-5


def train(data: Path, case: Case, out: Path) -> None:
    config = TrainingConfig(seed=case.seed)
    loaded = load_fold(data, ENCODER, case.fold, select_on="test", config=config)
    epochs = config.filled_in(TEST).epochs
    assert epochs is not None, "it is filled in"
    with epochs_bar(epochs, TEST) as on_epoch:
        stflow_fast.fit(loaded, out, config=config, resume=(out / "run.json").exists(), on_epoch=on_epoch)


def measured(data: Path, placement: str, case: Case, run: Path) -> dict[str, Any]:
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = stflow_fast.evaluate(run, data, case.fold, device="cpu").result
    return {
        "placement": placement,
        **case._asdict(),
        **{name: kept[name] for name in ("pearson_mean", "mse_mean", "selected_on")},
        "best_epoch": max(epoch["epoch"] for epoch in epochs if epoch["best"]),
        "epoch_pearson": [epoch["selection_pearson"] for epoch in epochs],
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs)),
    }


def comparison(scored: dict[str, dict[tuple[int, int], float]], seeds: list[int]) -> str:
    """The table of one score, from {placement: {(fold, seed): score}}."""

    def summary(values: list[float]) -> str:
        return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    def difference(chosen: list[tuple[int, int]]) -> str:
        values = [gain[case] for case in chosen]
        return f"{statistics.mean(values):+.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"

    gain = {case: scored["ours"][case] - scored["published"][case] for case in scored["ours"]}
    rows = []
    for placement, label in PLACEMENTS.items():
        cells = [summary([scored[placement][fold, seed] for seed in seeds]) for fold in FOLDS]
        rows.append([label, *cells, f"{statistics.mean(scored[placement].values()):.3f}"])
    for seed in seeds:
        values = [gain[fold, seed] for fold in FOLDS]
        cells = [f"{value:+.3f}" for value in values]
        rows.append([f"ours - published, seed {seed}", *cells, f"{statistics.mean(values):+.3f}"])
    for n in sorted({min(len(SEEDS), len(seeds)), len(seeds)}):
        of_folds = [list(itertools.product(folds, seeds[:n])) for folds in [*([fold] for fold in FOLDS), FOLDS]]
        rows.append([f"ours - published, seeds 0 to {n - 1}: mean ± standard error", *map(difference, of_folds)])
    return table(["dropout of the edges", "fold 0 (C6)", "fold 1 (B4)", "fold 2 (C2 to C6)", "all"], rows)


def page(found: dict[str, Any]) -> str:
    runs = found["runs"]
    seeds = sorted({run["seed"] for run in runs})
    epochs = min(len(run["epoch_pearson"]) for run in runs)

    def by_placement(score: Callable[[dict[str, Any]], float]) -> dict[str, dict[tuple[int, int], float]]:
        return {
            placement: {(run["fold"], run["seed"]): score(run) for run in runs if run["placement"] == placement}
            for placement in PLACEMENTS
        }

    intro = (
        "Mean Pearson over 50 genes, mean of the seeds (least to most). Default settings, dropout 0.2, commit "
        f"{found['commit']}, by `{found['command']}`. A fold and seed has the same initial weights, windows and noise "
        "in both; the masks of dropout differ everywhere. Single runs in dropout_placement.json."
    )
    if len(seeds) > len(SEEDS):
        intro += " Seeds 0 to 2 were planned; the others were added, in every fold, once those were seen."
    parts = [
        "# Where the edges' dropout stands",
        intro,
        "## Epoch chosen on the test fold, as published",
        comparison(by_placement(lambda run: run["pearson_mean"]), seeds),
        f"## Mean of the first {epochs} epochs, no epoch chosen",
        comparison(by_placement(lambda run: statistics.mean(run["epoch_pearson"][:epochs])), seeds),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds 0 to this, itself left out; at least 2")
    arguments = parser.parse_args()
    check()
    found: dict[str, Any] = {
        "commit": commit(),
        "command": f"python -m benchmarks dropout_placement {arguments.data} --out {arguments.out}"
        + (f" --seeds {arguments.seeds}" if arguments.seeds != len(SEEDS) else ""),
        "runs": [],
    }
    for seed in range(arguments.seeds):
        for fold, placement in itertools.product(FOLDS, PLACEMENTS):
            case = Case(fold, seed)
            run = arguments.out / placement / case.name
            model = PublishedPlacement if placement == "published" else Denoiser
            if not (run / "model").exists():
                with mock.patch("stflow_fast.training.trainer.Denoiser", model):
                    train(arguments.data, case, run)
            found["runs"].append(measured(arguments.data, placement, case, run))
        if seed:  # a standard error takes two
            (RESULTS / "dropout_placement.json").write_text(json.dumps(found, indent=1) + "\n")
            (RESULTS / "dropout_placement.md").write_text(page(found))

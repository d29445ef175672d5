"""A stand-in of the published module: its layout of attributes, written here, around the formulas of the baseline.

The published code itself is not in this repository. That ours computes what it computes is shown by the golden files,
and on anybody's checkout by ``python -m benchmarks published``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.opponents.eager_stflow import EagerAttention, EagerDenoiser
from benchmarks.studies.published_code import Mlp, SwiGLUPacked
from stflow_fast.config import DenoiserConfig

SETTINGS = [name for name in DenoiserConfig.__dataclass_fields__ if name != "non_negative"]
LAYERS = {"gelu": nn.GELU, "relu": nn.ReLU}

MODULE = '''"""A stand-in of the published code: see tests/published_layout.py."""

from einops import einsum, rearrange
from torch_geometric.utils import to_dense_batch

from tests.published_layout import PublishedDenoiser

from .layers import Mlp, SwiGLUPacked


class Denoiser(PublishedDenoiser):
    def __init__(self, config):
        super().__init__(config, Mlp, SwiGLUPacked)
        {fault}
'''

MakeMLP = Callable[..., nn.Module]


class MLPAttnEdgeAggregation(nn.Module):
    """Published attributes of the attention; takes the arguments of :class:`EagerAttention` behind ``make_mlp``."""

    def __init__(
        self,
        make_mlp: MakeMLP,
        n_genes: int,
        dim: int,
        edge_dim: int,
        n_heads: int,
        activation: str,
        dropout: float,
        attn_dropout: float,
    ) -> None:
        super().__init__()
        self.n_heads, self.d_head, self.d_edge_head = n_heads, dim // n_heads, edge_dim // n_heads
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim))
        # Published: without an activation of its own where MLPs are not gated.
        of_logit = {"activation": activation if activation == "swiglu" else "gelu"}
        self.mlp_attn = make_mlp(2 * self.d_head + self.d_edge_head + n_genes, dim, 1, **of_logit)
        self.edge_trans = make_mlp(3, edge_dim, edge_dim)
        self.W_output = make_mlp(dim + edge_dim, dim, dim)
        self.attn_dropout = nn.Dropout(attn_dropout)

    def forward(self, gene: Tensor, tokens: Tensor, coords: Tensor, neighbors: Tensor) -> Tensor:
        """As :class:`EagerAttention`, which computes it on these modules."""
        with torch.device("meta"):  # every parameter of it is replaced
            plain = EagerAttention(1, self.n_heads, self.n_heads, self.n_heads, "gelu", 0.0, self.attn_dropout.p)
        for name, module in self.named_children():
            if name != "attn_dropout":
                setattr(plain, name, module)
        return plain.train(self.training)(gene, tokens, coords, neighbors)


class PublishedDenoiser(EagerDenoiser):
    """``backbone`` has ``n_neighbors`` and ``blks``, of ``attn``, ``mlp`` and ``gene_updater``; MLPs have timm's names.
    As in the fork that people run, a ReLU follows every gene head until ``gene_updater.non_negative`` is set."""

    def __init__(
        self, config: DenoiserConfig, plain_mlp: type[nn.Module] = Mlp, gated_mlp: type[nn.Module] = SwiGLUPacked
    ) -> None:
        """``config`` is any object with the published settings."""

        def make_mlp(n_in: int, n_hidden: int, n_out: int, activation: str = config.activation) -> nn.Module:
            sizes = {"in_features": n_in, "hidden_features": n_hidden, "out_features": n_out, "drop": config.dropout}
            if activation == "swiglu":
                return gated_mlp(**sizes, norm_layer=nn.LayerNorm)
            return plain_mlp(**sizes, act_layer=LAYERS[activation], norm_layer=nn.LayerNorm)

        settings = {name: getattr(config, name) for name in SETTINGS}
        attention = functools.partial(MLPAttnEdgeAggregation, make_mlp)
        super().__init__(**settings, non_negative=True, attention=attention)
        for block in self.backbone.blks:
            block.mlp = make_mlp(config.hidden_dim, 4 * config.hidden_dim, config.hidden_dim)

    def inference(
        self, noisy_exp: Tensor, img_features: Tensor, coords: Tensor, t_steps: Tensor, predict: bool = False
    ) -> Tensor:
        """With the keyword that the fork has and does not read."""
        return super().inference(noisy_exp, img_features, coords, t_steps)


def write_checkout(folder: Path, fault: str = "pass") -> Path:
    """A folder as a checkout has it, with ``fault`` as the last statement of its denoiser's ``__init__``. Whatever else
    is in it fails if it is run."""
    package, model = folder / "stflow", folder / "stflow" / "model"
    model.mkdir(parents=True)
    (model / "denoiser.py").write_text(MODULE.format(fault=fault))
    (model / "layers.py").write_text("from timm.models.vision_transformer import Mlp, SwiGLUPacked\n")
    for file in (package / "__init__.py", model / "__init__.py", folder / "setup.py", package / "train.py"):
        file.write_text("raise RuntimeError('nobody asked for this')\n")
    return folder

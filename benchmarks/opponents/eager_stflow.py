"""STFlow as published (Huang et al., ICML 2025, arXiv 2506.05361), written plainly: what the benchmarks race against.

Every forward pass builds a dense N x N distance matrix and materialises the inputs of every edge, as the published
code does. Parameters have the published names and shapes; outputs and gradients equal the golden files
(tests/test_eager_baseline.py). Nothing here is used by the package.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAR = 1e9
"""Distance entered for a spot itself and for spots of other slides."""

SIGN_FRAMES = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))


class EagerMLP(nn.Module):
    """fc1 -> gate or activation -> dropout -> LayerNorm -> fc2 -> dropout."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int, activation: str, dropout: float) -> None:
        super().__init__()
        n_normed = n_hidden // 2 if activation == "swiglu" else n_hidden
        self.activation = activation
        self.dropout = dropout
        self.fc1 = nn.Linear(n_in, n_hidden)
        self.norm = nn.LayerNorm(n_normed)
        self.fc2 = nn.Linear(n_normed, n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.activation == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x) if self.activation == "gelu" else F.relu(x)
        x = self.norm(F.dropout(x, self.dropout, self.training))
        return F.dropout(self.fc2(x), self.dropout, self.training)


def dense_neighbors(coords: Tensor, slide: Tensor, k: int) -> Tensor:
    """[N, k] nearest other spots of the same slide, from all N x N distances. ``coords`` [N, 2], ``slide`` [N]."""
    # The matrix-product form of cdist rounds neighbouring spots of a large slide into each other in float32.
    distance = torch.cdist(coords, coords, compute_mode="donot_use_mm_for_euclid_dist")
    distance = distance.masked_fill(slide.unsqueeze(0) != slide.unsqueeze(1), FAR)
    distance.fill_diagonal_(FAR)
    return distance.topk(k, dim=-1, largest=False).indices


def frame_projections(offsets: Tensor) -> Tensor:
    """Offsets [N, K, 2] centred and projected on each of the four sign frames of their covariance: [N, 4, K, 2]."""
    return project_on_frames(offsets - offsets.mean(dim=1, keepdim=True))


def project_on_frames(centred: Tensor) -> Tensor:
    """The same of offsets that are centred already."""
    _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
    frames = axes.unsqueeze(1) * axes.new_tensor(SIGN_FRAMES).view(1, 4, 1, 2)
    projected: Tensor = centred.unsqueeze(1) @ frames
    return projected


class EagerAttention(nn.Module):
    """Attention over the nearest spots with frame-averaged edges."""

    def __init__(
        self, n_genes: int, dim: int, edge_dim: int, n_heads: int, activation: str, dropout: float, attn_dropout: float
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_dropout = attn_dropout
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim))
        # Published: gelu here in the relu variant too (see the golden file small_relu).
        logit_activation = "swiglu" if activation == "swiglu" else "gelu"
        per_head = 2 * (dim // n_heads) + edge_dim // n_heads + n_genes
        self.mlp_attn = EagerMLP(per_head, dim, 1, logit_activation, dropout)
        self.edge_trans = EagerMLP(3, edge_dim, edge_dim, activation, dropout)
        self.W_output = EagerMLP(dim + edge_dim, dim, dim, activation, dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.n_heads, -1))
        return heads

    def query_key_value(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens [N, d] -> three of [N, H, d / H]."""
        return tuple(self.split_heads(part) for part in self.layernorm_qkv(tokens).chunk(3, dim=-1))

    def forward(self, gene: Tensor, tokens: Tensor, coords: Tensor, neighbors: Tensor) -> Tensor:
        """Gene expression [N, G], tokens [N, d], coordinates [N, 2], neighbours [N, K] -> [N, d]."""
        n, k = neighbors.shape
        query, key, value = self.query_key_value(tokens)
        offsets = coords[neighbors] - coords.unsqueeze(1)
        projected = frame_projections(offsets)
        distance = offsets.norm(dim=-1, keepdim=True).unsqueeze(1).expand(-1, 4, -1, -1)
        edge = self.edge_trans(torch.cat([projected, distance], dim=-1)).mean(dim=1)
        edge = self.split_heads(edge)
        gene_change = (gene[neighbors] - gene.unsqueeze(1)).unsqueeze(2).expand(-1, -1, self.n_heads, -1)
        message = torch.cat([query.unsqueeze(1).expand(-1, k, -1, -1), key[neighbors], edge, gene_change], dim=-1)
        attention = self.mlp_attn(message).softmax(dim=1)
        attention = F.dropout(attention, self.attn_dropout, self.training)
        context = (attention * value[neighbors]).sum(dim=1).reshape(n, -1)
        edge_context = (attention * edge).sum(dim=1).reshape(n, -1)
        out: Tensor = self.W_output(torch.cat([context, edge_context], dim=-1))
        return out


class EagerGeneUpdate(nn.Module):
    """Gene head of one layer."""

    def __init__(self, n_genes: int, dim: int, non_negative: bool, dropout: float) -> None:
        super().__init__()
        self.non_negative = non_negative
        self.output = nn.Sequential(
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.LayerNorm(dim),
            nn.Dropout(dropout),
            nn.Linear(dim, n_genes),
            nn.Dropout(dropout),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        gene: Tensor = self.output(tokens)
        return F.relu(gene) if self.non_negative else gene


class EagerBlock(nn.Module):
    """One layer. What it knows of the edges is what its attention reads: here coordinates and neighbours."""

    def __init__(
        self,
        n_genes: int,
        dim: int,
        edge_dim: int,
        n_heads: int,
        activation: str,
        non_negative: bool,
        dropout: float,
        attn_dropout: float,
        attention: type[EagerAttention],
    ) -> None:
        super().__init__()
        self.attn = attention(n_genes, dim, edge_dim, n_heads, activation, dropout, attn_dropout)
        self.mlp = EagerMLP(dim, 4 * dim, dim, activation, dropout)
        self.gene_updater = EagerGeneUpdate(n_genes, dim, non_negative, dropout)

    def forward(self, gene: Tensor, tokens: Tensor, *edges: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens + self.attn(gene, tokens, *edges)
        tokens = tokens + self.mlp(tokens)
        return self.gene_updater(tokens), tokens


class EagerBackbone(nn.Module):
    """The stack of layers; its prediction is the mean of their gene heads."""

    def __init__(self, n_layers: int, n_neighbors: int, **layer: Any) -> None:
        super().__init__()
        self.n_neighbors = n_neighbors
        self.blks = nn.ModuleList(EagerBlock(**layer) for _ in range(n_layers))

    def forward(self, gene: Tensor, tokens: Tensor, coords: Tensor) -> Tensor:
        """[B, N, G], [B, N, d], [B, N, 2] -> [B, N, G]; rows of tokens that sum to zero are padding."""
        real = tokens.sum(dim=-1) != 0
        slide = torch.arange(len(real), device=real.device).unsqueeze(1).expand_as(real)[real]
        packed_gene, packed_tokens, packed_coords = gene[real], tokens[real], coords[real]
        neighbors = dense_neighbors(packed_coords, slide, self.n_neighbors)
        prediction = torch.zeros_like(gene)
        prediction[real] = self.run_layers(packed_gene, packed_tokens, packed_coords, neighbors)
        return prediction

    def run_layers(self, gene: Tensor, tokens: Tensor, *edges: Tensor) -> Tensor:
        """[N, G], [N, d] and the edges of all layers -> [N, G]."""
        heads = []
        for block in self.blks:
            gene, tokens = block(gene, tokens, *edges)
            heads.append(gene)
        return torch.stack(heads).mean(dim=0)


class EagerTimeEmbedding(nn.Module):
    """Sinusoids of the flow time, float32 whatever the model's dtype, then an MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    @staticmethod
    def frequencies(device: torch.device) -> Tensor:
        """10000^(-i / 128) for 128 frequencies. The exponential is float32, as published, so its last bit is the
        processor's; the test against the golden files puts in those of the machine that made them."""
        index = torch.arange(128, dtype=torch.float32, device=device)
        return torch.exp(-math.log(10000.0) * index / 128)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float().unsqueeze(-1) * self.frequencies(t.device)
        embedded: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))
        return embedded


class EagerDenoiser(nn.Module):
    """The published denoiser, with dense graphs and materialised edges."""

    def __init__(
        self,
        n_genes: int,
        feature_dim: int,
        hidden_dim: int = 128,
        pairwise_hidden_dim: int = 128,
        n_layers: int = 4,
        n_heads: int = 4,
        n_neighbors: int = 8,
        activation: str = "swiglu",
        non_negative: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        attention: type[EagerAttention] = EagerAttention,
    ) -> None:
        super().__init__()
        self.backbone = EagerBackbone(
            n_layers,
            n_neighbors,
            n_genes=n_genes,
            dim=hidden_dim,
            edge_dim=pairwise_hidden_dim,
            n_heads=n_heads,
            activation=activation,
            non_negative=non_negative,
            dropout=dropout,
            attn_dropout=attn_dropout,
            attention=attention,
        )
        self.fourier_proj = EagerTimeEmbedding(hidden_dim)
        self.image_transform = nn.Linear(feature_dim, hidden_dim)

    def inference(self, noisy_exp: Tensor, img_features: Tensor, coords: Tensor, t_steps: Tensor) -> Tensor:
        """[B, N, G], [B, N, F], [B, N, 2] and [B] -> predicted x_1 [B, N, G]; zero rows of features are padding."""
        tokens = self.image_transform(img_features) + self.fourier_proj(t_steps).unsqueeze(1)
        prediction: Tensor = self.backbone(noisy_exp, tokens, coords)
        return prediction

    def forward(
        self, exp: Tensor, img_features: Tensor, coords: Tensor, labels: Tensor, t_steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Prediction, and its mean squared error over the spots that are not padding."""
        prediction = self.inference(exp, img_features, coords, t_steps)
        real = img_features.sum(dim=-1) != 0
        return prediction, F.mse_loss(prediction[real], labels[real])


@torch.no_grad()
def eager_sample(
    model: EagerDenoiser, features: Tensor, coords: Tensor, x_0: Tensor, n_sample_steps: int = 5
) -> Tensor:
    """The published sampling loop of one slide: features [N, F], coordinates [N, 2] and noise [N, G] -> [N, G]."""
    times = torch.linspace(0.01, 1.0, n_sample_steps, dtype=torch.float64).tolist()
    x, features, coords = x_0.unsqueeze(0), features.unsqueeze(0), coords.unsqueeze(0)
    for now, after in itertools.pairwise(times):
        prediction = model.inference(x, features, coords, torch.full((1,), now, dtype=torch.float64))
        x = x + (after - now) * (prediction - x) / (1 - now)
    return prediction[0]

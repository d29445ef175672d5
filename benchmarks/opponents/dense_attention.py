"""The published attention with every other spot as a neighbour, as dense tensors: K = N - 1 and no neighbour search.

Frames, edge MLP and attention MLP are those of eager_stflow, and so are the parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager_stflow import EagerAttention, project_on_frames


def dense_edges(coords: Tensor) -> Tensor:
    """Inputs of the edge MLP for all pairs, [N, 4, N, 3]; a spot's pair with itself is zero. ``coords`` [N, 2]."""
    n = len(coords)
    others = ~torch.eye(n, dtype=torch.bool, device=coords.device).unsqueeze(-1)
    offsets = coords.unsqueeze(0) - coords.unsqueeze(1)
    centred = (offsets - offsets.sum(dim=1, keepdim=True) / (n - 1)) * others
    distance = offsets.norm(dim=-1, keepdim=True).unsqueeze(1).expand(-1, 4, -1, -1)
    return torch.cat([project_on_frames(centred), distance], dim=-1)


class DenseAttention(EagerAttention):
    """Attention over all other spots."""

    def forward(self, gene: Tensor, tokens: Tensor, edges: Tensor) -> Tensor:  # type: ignore[override]  # a layer is given the edges of its kind
        """Gene expression [N, G], tokens [N, d] and :func:`dense_edges` -> [N, d]."""
        shape = (len(tokens), len(tokens), self.n_heads, -1)
        query, key, value = self.query_key_value(tokens)
        edge = self.split_heads(self.edge_trans(edges).mean(dim=1))
        gene_change = (gene.unsqueeze(0) - gene.unsqueeze(1)).unsqueeze(2)
        parts = (query.unsqueeze(1).expand(shape), key.unsqueeze(0).expand(shape), edge, gene_change.expand(shape))
        logits = self.mlp_attn(torch.cat(parts, dim=-1)).squeeze(-1)
        logits.diagonal().fill_(float("-inf"))
        attention = F.dropout(logits.softmax(dim=1), self.attn_dropout, self.training)
        context = torch.einsum("ijh,jhc->ihc", attention, value)
        edge_context = torch.einsum("ijh,ijhc->ihc", attention, edge)
        out: Tensor = self.W_output(torch.cat([context.flatten(1), edge_context.flatten(1)], dim=-1))
        return out

"""The published attention as graph libraries write it: an edge list, gathers, a scatter-softmax, a scatter-add.

Plain torch, in the manner of PyTorch Geometric's ``MessagePassing`` and ``utils.softmax``. The edge list and the
inputs of the edge MLP are made once per slide, as a library's ``edge_index`` and ``edge_attr`` are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stflow_fast.graph import MISSING, SpotGraph

from .eager_stflow import SIGN_FRAMES, EagerAttention


def edge_list(graph: SpotGraph) -> tuple[Tensor, Tensor, Tensor]:
    """Of E edges: the spots that receive [E] and those that send [E], rows of the graph, and [4, E, 3] the inputs of
    the edge MLP in each sign frame."""
    present = graph.neighbors != MISSING
    center, _ = present.nonzero(as_tuple=True)
    geometry = graph.geometry[present]
    projected = geometry[:, :2] * geometry.new_tensor(SIGN_FRAMES).unsqueeze(1)
    return center, graph.neighbors[present], torch.cat([projected, geometry[:, 2:].expand(4, -1, -1)], dim=-1)


def scatter_sum(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of the rows of ``values`` [E, C] by ``index`` [E]: [n, C]."""
    return values.new_zeros(n, values.shape[1]).scatter_add_(0, index.unsqueeze(1).expand_as(values), values)


def scatter_softmax(logits: Tensor, index: Tensor, n: int) -> Tensor:
    """Softmax of [E, H] among the rows of the same ``index`` [E], which is below n."""
    rows = index.unsqueeze(1).expand_as(logits)
    largest = logits.new_full((n, logits.shape[1]), float("-inf")).scatter_reduce_(0, rows, logits.detach(), "amax")
    weight = (logits - largest[index]).exp()
    return weight / scatter_sum(weight, index, n)[index]


class MessagePassingAttention(EagerAttention):
    """Attention over an edge list."""

    def forward(  # type: ignore[override]  # a layer is given the edges of its kind
        self, gene: Tensor, tokens: Tensor, center: Tensor, neighbor: Tensor, inputs: Tensor
    ) -> Tensor:
        """Gene expression [N, G], tokens [N, d] and :func:`edge_list` -> [N, d]."""
        n = len(tokens)
        query, key, value = self.query_key_value(tokens)
        edge = self.split_heads(self.edge_trans(inputs).mean(dim=0))
        gene_change = (gene[neighbor] - gene[center]).unsqueeze(1).expand(-1, self.n_heads, -1)
        logits = self.mlp_attn(torch.cat([query[center], key[neighbor], edge, gene_change], dim=-1)).squeeze(-1)
        attention = scatter_softmax(logits, center, n)
        attention = F.dropout(attention, self.attn_dropout, self.training).unsqueeze(-1)
        context = scatter_sum((attention * value[neighbor]).flatten(1), center, n)
        edge_context = scatter_sum((attention * edge).flatten(1), center, n)
        out: Tensor = self.W_output(torch.cat([context, edge_context], dim=-1))
        return out

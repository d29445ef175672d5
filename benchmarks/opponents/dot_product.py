"""A network of STFlow's shape with dot-product attention: what generic attention libraries would run in its place.

It is not the same function: attention weights come from queries and keys alone, without relative positions, frames,
edge MLP or attention MLP, and nothing drops attention weights out. The networks of the three kinds of attention have
the same parameters and differ in ``attend``, which maps queries, keys and values [1, H, N, d / H] to [1, H, N, d / H].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stflow_fast import DenoiserConfig
from stflow_fast.graph import MISSING, SpotGraph

from .eager_stflow import EagerGeneUpdate, EagerMLP, EagerTimeEmbedding

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# FlexAttention brings torch's compiler, whose import takes a second: it is imported where it is used.

SLIDE_SIZES = 64
"""Numbers of spots that FlexAttention is compiled for in one process; torch's own limit is 8."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

CUDA_BLOCK, CPU_BLOCK = 128, 32
"""Spots in a block of the mask. 128 is FlexAttention's default, which its kernels' tiles divide; on the CPU, 3,000
spots take 18 ms with 32 and 49 ms with 128."""


def dense_softmax(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every spot to every spot, as a materialised [1, H, N, N]; where ``mask`` [N, N] is given, to those it allows."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ value


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Every spot to every spot in linear memory. On a GPU, flash reads 16 bits; float32 goes to the memory-efficient
    kernel. The dense fallback is shut out."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        return F.scaled_dot_product_attention(query, key, value)


def neighbor_attention(graph: SpotGraph) -> Attend:
    """Every spot to its K neighbours, by FlexAttention over blocks of rows of the graph."""
    return functools.partial(_compiled_flex_attention(), block_mask=neighbor_block_mask(graph))


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Without compiling, FlexAttention materialises [N, N]; ``fullgraph`` makes every way back there an error.

    Compiled once for each number of spots: for a number that varies, torch 2.13 writes C++ that does not compile.
    """
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = max(SLIDE_SIZES, config.recompile_limit)
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def neighbor_block_mask(graph: SpotGraph) -> BlockMask:
    """Pairs (spot, neighbour) alone; memory is linear in the spots."""
    from torch.nn.attention.flex_attention import BlockMask

    device, (n, k) = graph.neighbors.device, graph.neighbors.shape
    size = CUDA_BLOCK if device.type == "cuda" else CPU_BLOCK
    n_blocks, table = -(-n // size), graph.neighbors.T.to(torch.int32).contiguous()
    row = torch.arange(n, device=device).unsqueeze(1).expand(-1, k)
    present = graph.neighbors != MISSING
    pairs = (row[present] // size * n_blocks + graph.neighbors[present] // size).unique()
    of_queries, of_keys = pairs // n_blocks, pairs % n_blocks

    def is_neighbor(batch: Tensor, head: Tensor, spot: Tensor, other: Tensor) -> Tensor:
        found = table[0][spot] == other
        for slot in range(1, k):
            found = found | (table[slot][spot] == other)
        return found

    return BlockMask(
        (n, n),
        *_block_table(of_queries, of_keys, n_blocks),
        None,
        None,
        *_block_table(of_keys, of_queries, n_blocks),
        None,
        None,
        BLOCK_SIZE=(size, size),
        mask_mod=is_neighbor,
    )


def _block_table(blocks: Tensor, partners: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    """Number of partners of each block [1, 1, B], and the partners, ascending, in the leading columns of [1, 1, B, B].

    That is the shape FlexAttention asks for on the CPU, though it reads the leading columns alone: the rows of the
    view overlap behind those, so what is stored is as wide as the longest row.
    """
    order = (blocks * n_blocks + partners).argsort()
    blocks, partners = blocks[order], partners[order]
    count = torch.bincount(blocks, minlength=n_blocks)
    width, slot = int(count.max()), torch.arange(len(blocks), device=blocks.device) - (count.cumsum(0) - count)[blocks]
    stored = torch.zeros(n_blocks * width + n_blocks, dtype=torch.int32, device=blocks.device)
    stored[blocks * width + slot] = partners.to(torch.int32)
    view = stored.as_strided((1, 1, n_blocks, n_blocks), (stored.numel(), stored.numel(), width, 1))
    return count.to(torch.int32).view(1, 1, -1), view


class DotProductBlock(nn.Module):
    """One layer: attention over tokens that were told the expression, MLP and gene head, as published otherwise."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        dim, mlp = config.hidden_dim, (config.activation, config.dropout)
        self.n_heads = config.n_heads
        self.gene_in = nn.Linear(config.n_genes, dim, bias=False)
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim))
        self.W_output = EagerMLP(dim, dim, dim, *mlp)
        self.mlp = EagerMLP(dim, 4 * dim, dim, *mlp)
        self.gene_updater = EagerGeneUpdate(config.n_genes, dim, config.non_negative, config.dropout)

    def forward(self, gene: Tensor, tokens: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """Expression [N, G] and tokens [N, d] to the next layer's."""
        qkv = self.layernorm_qkv(tokens + self.gene_in(gene))
        query, key, value = qkv.unflatten(-1, (3, 1, self.n_heads, -1)).permute(1, 2, 3, 0, 4)
        tokens = tokens + self.W_output(attend(query, key, value).squeeze(0).transpose(0, 1).flatten(1))
        tokens = tokens + self.mlp(tokens)
        return self.gene_updater(tokens), tokens


class DotProductDenoiser(nn.Module):
    """The denoiser of these layers."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.blks = nn.ModuleList(DotProductBlock(config) for _ in range(config.n_layers))
        self.fourier_proj = EagerTimeEmbedding(config.hidden_dim)
        self.image_transform = nn.Linear(config.feature_dim, config.hidden_dim)

    def forward(self, gene: Tensor, tokens: Tensor, attend: Attend) -> Tensor:
        """Expression [N, G], tokens [N, d] of image and time -> [N, G], the mean of the layers' gene heads."""
        heads = []
        for block in self.blks:
            gene, tokens = block(gene, tokens, attend)
            heads.append(gene)
        return torch.stack(heads).mean(dim=0)

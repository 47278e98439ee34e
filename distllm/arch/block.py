"""The transformer block: norm, attention, residual, norm, feed-forward, residual.

A block is put together from parts; an architecture chooses the parts. Stacks, embeddings and heads live beside it.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from distllm.layers.attention import attention
from distllm.layers.cache import KVCache
from distllm.layers.positions import Rotary, rotate


@dataclass(slots=True)
class Context:
    """What all blocks of one call share."""

    rotary: Rotary
    """(cos, sin) of the new tokens, each [1 or batch, seq, d_head]."""
    bias: Tensor | None = None
    """Additive attention bias [batch, 1, seq, kv_seq]; None = every query sees the keys up to its own column."""
    cache: KVCache | None = None
    """Keys and values of earlier calls; the new ones are appended."""


class Attention(nn.Module):
    """Multi-head self-attention with grouped key/value heads and rotary positions.

    Reference: Ainslie et al. 2023, arXiv 2305.13245 (grouped key/value heads).
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, layer: int
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.layer = layer
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.out_proj = nn.Linear(n_heads * d_head, d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix `x` [batch, seq, d_model] along seq."""
        q = self.q_proj(x).unflatten(-1, (self.n_heads, self.d_head))
        k = self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.d_head))
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.d_head))
        rotary: Rotary | None = context.rotary
        if context.cache is not None:
            q, k, rotary = rotate(q, rotary), rotate(k, rotary), None
            stored = context.cache.append(self.layer, k, v)
            if context.cache.length:
                k, v = stored
        mixed = attention(
            q,
            k,
            v,
            causal=q.shape[1] == k.shape[1],
            mask=context.bias,
            scale=self.d_head**-0.5,
            rotary=rotary,
        )
        return self.out_proj(mixed.flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)): normalisation before each part."""

    def __init__(
        self,
        *,
        attention_norm: nn.Module,
        attention: Attention,
        feed_forward_norm: nn.Module,
        feed_forward: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward
        self.dropout = dropout

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Transform the residual stream `x` [batch, seq, d_model]."""
        x = x + self._drop(self.attention(self.attention_norm(x), context))
        return x + self._drop(self.feed_forward(self.feed_forward_norm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

"""Scaled dot-product attention with grouped key/value heads. Masks come from `masks.py`, rotation from `positions.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.layers.blocked_attention import blocked_attention
from distllm.layers.positions import Rotary, rotate

_LONGEST_BLOCKED = 1024
"""Beyond this many tokens the kept probabilities cost too much memory."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None = None,
    scale: float,
    rotary: Rotary | None = None,
) -> Tensor:
    """Let every query gather values.

    Args:
        q: [batch, seq, n_heads, d_head].
        k: [batch, kv_seq, n_kv_heads, d_head]; n_heads is a multiple of n_kv_heads.
        v: as `k`.
        causal: queries see no later column. With as many keys as queries; a `mask` given too must agree.
        mask: additive bias, broadcast to [batch, n_heads, seq, kv_seq].
        scale: factor on the dot products.
        rotary: turn queries and keys first (cos, sin), each [1 or batch, seq, d_head].

    Returns:
        [batch, seq, n_heads, d_head].
    """
    if causal and _blocks_pay(q):
        return blocked_attention(q, k, v, rotary, mask, scale)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    if q.shape[1] == 1:
        return _one_query(q, k, v, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _blocks_pay(q: Tensor) -> bool:
    return q.device.type == "cpu" and 1 < q.shape[1] <= _LONGEST_BLOCKED


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend from one new token per row. The heads of a group share their keys as rows of one product: no copies."""
    batch, _, n_heads, d_head = q.shape
    n_kv_heads = k.shape[2]
    q = q.reshape(batch, n_kv_heads, n_heads // n_kv_heads, d_head) * scale
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.matmul(q, k.transpose(2, 3))
    if mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), v).reshape(batch, 1, n_heads, d_head)

"""Scaled dot-product attention with grouped key/value heads. Masks come from `masks.py`, rotation from `positions.py`."""

import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None, scale: float
) -> Tensor:
    """Let every query gather values.

    Args:
        q: [batch, seq, n_heads, d_head].
        k: [batch, kv_seq, n_kv_heads, d_head]; n_heads is a multiple of n_kv_heads.
        v: as `k`.
        causal: query i sees keys 0..i; only for seq == kv_seq, and only without `mask`.
        mask: additive bias, broadcast to [batch, n_heads, seq, kv_seq].
        scale: factor on the dot products.

    Returns:
        [batch, seq, n_heads, d_head].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)

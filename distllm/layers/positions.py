"""Rotary position embedding in the half-split layout: channel j is rotated together with j + d_head / 2.

Reference: Su et al. 2021, RoFormer, arXiv 2104.09864, equation 34. Departure: pairs are (j, j + d_head / 2) instead of
(2j, 2j + 1), as in Llama; the two differ by a fixed permutation of the query and key channels.
"""

import torch
from torch import Tensor

from distllm.layers.precision import wide

Rotary = tuple[Tensor, Tensor]
"""(cos, sin), each [1 or batch, seq, d_head]; the sign is in the table: the first half holds -sin."""


def rotary_tables(position_ids: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Compute cosines and sines of every position's angles.

    Args:
        position_ids: [1 or batch, seq] int64.
        d_head: width of one head, even.
        theta: base of the geometric series of wavelengths.
        dtype: dtype of the result; the angles are computed in float32 or wider.

    Returns:
        (cos, signed sin), each [1 or batch, seq, d_head].
    """
    precise = wide(dtype)
    device = position_ids.device
    channels = torch.arange(0, d_head, 2, dtype=precise, device=device)
    angles = position_ids.to(precise)[..., None] * (1.0 / theta ** (channels / d_head))
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each head of `x` [batch, seq, n_heads, d_head] by its position."""
    cos, sin = (table[:, :, None, :] for table in rotary)
    low, high = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((high, low), dim=-1), sin)

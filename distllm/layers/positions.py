"""How tokens know where they stand: rotary tables, fixed sinusoids, a learned bias per distance.

Frequencies and their stretching are in `rope_scaling.py`; position ids come from `masks.py`.

Reference: Su et al. 2021, RoFormer, arXiv 2104.09864, equation 34. Departure: by default pairs of channels are
(j, j + d / 2) instead of (2j, 2j + 1), as in Llama; the two differ by a fixed permutation of query and key channels.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distllm.layers.precision import wide
from distllm.layers.rope_scaling import frequencies

Rotary = tuple[Tensor, Tensor]
"""(cos, sin), each [1 or batch, seq, d_rotary]; the sign is in the table: the first half (the even channels, if pairs
are interleaved) holds -sin."""


def rotary_tables(
    position_ids: Tensor,
    dim: int,
    theta: float,
    dtype: torch.dtype,
    *,
    scaling: Mapping[str, Any] | None = None,
    sign: int = 1,
    interleaved: bool = False,
) -> Rotary:
    """Compute cosines and sines of every position's angles.

    Args:
        position_ids: [1 or batch, seq] int64.
        dim: how many channels of a head are rotated, even.
        theta: base of the geometric series of wavelengths.
        dtype: dtype of the result; the angles are computed in float32 or wider.
        scaling: see `rope_scaling.frequencies`.
        sign: -1 turns the other way.
        interleaved: pairs are (2j, 2j + 1).

    Returns:
        (cos, signed sin), each [1 or batch, seq, dim].
    """
    precise = wide(dtype)
    per_position, factor = frequencies(dim, theta, scaling or {}, precise, position_ids.device)
    angles = position_ids.to(precise)[..., None] * per_position
    cos, sin = angles.cos() * factor, angles.sin() * (factor * sign)
    if interleaved:
        cos, sin = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((cos, cos), (-sin, sin)))
        return cos.to(dtype), sin.to(dtype)
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: Tensor, rotary: Rotary, interleaved: bool = False) -> Tensor:
    """Rotate each head of `x` [batch, seq, n_heads, d_head] by its position; channels beyond the tables' width stay."""
    cos, sin = (table[:, :, None, :] for table in rotary)
    rest = None
    if cos.shape[-1] != x.shape[-1]:
        x, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
    if interleaved:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        low, high = x.chunk(2, dim=-1)
        swapped = torch.cat((high, low), dim=-1)
    turned = torch.addcmul(x * cos, swapped, sin)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def sinusoids(position_ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Compute fixed position vectors: sines in the first half of the channels, cosines in the second.

    Reference: Vaswani et al. 2017, arXiv 1706.03762, section 3.5. Departure: sines and cosines do not alternate.
    """
    precise = wide(dtype)
    per_position, _ = frequencies(dim, 10000.0, {}, precise, position_ids.device)
    angles = position_ids.to(precise)[..., None] * per_position
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)


class RelativeBias(nn.Module):
    """A learned number per head and distance bucket, added to the attention scores.

    Reference: Raffel et al. 2020, T5, arXiv 1910.10683, section 2.1: half of the buckets hold exact distances, the
    others grow logarithmically up to `max_distance`; keys ahead get buckets of their own where they can be seen.
    """

    def __init__(self, buckets: int, max_distance: int, n_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(buckets, n_heads))
        self.max_distance, self.bidirectional = max_distance, bidirectional

    def forward(self, seq: int, kv_seq: int, past: int = 0) -> Tensor:
        """Return the bias of queries in the columns from `past` on: [1, n_heads, seq, kv_seq]."""
        columns = torch.arange(kv_seq, device=self.weight.device)
        distance = columns[None, :] - columns[past : past + seq, None]
        return F.embedding(self.bucket(distance), self.weight).permute(2, 0, 1)[None]

    def bucket(self, distance: Tensor) -> Tensor:
        """Map key column minus query column to a row of the table."""
        half = len(self.weight) // 2 if self.bidirectional else len(self.weight)
        if self.bidirectional:
            ahead = (distance > 0).long() * half
            distance = distance.abs()
        else:
            ahead = torch.zeros_like(distance)
            distance = (-distance).clamp(min=0)
        exact = half // 2
        grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(
            self.max_distance / exact
        )
        far = (exact + (grown * (half - exact)).long()).clamp(max=half - 1)
        return ahead + torch.where(distance < exact, distance, far)

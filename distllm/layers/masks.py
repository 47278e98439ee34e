"""Who may see whom, worked out once per batch: positions, and one additive bias for all layers.

Padding and packing are the same thing here. Every token belongs to a segment and sees the earlier tokens of its own
segment; padding is segment 0. So no row of the attention matrix is ever empty, and padding can never make a NaN.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class Layout:
    """Where the tokens of one call stand."""

    position_ids: Tensor
    """[1 or batch, seq] int64."""
    bias: Tensor | None
    """[1 or batch, 1, seq, kv_seq]: 0 where a query sees a key, a large negative number elsewhere. None = plain causal."""


def lay_out(
    shape: tuple[int, int],
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    past: int,
    columns: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Layout:
    """Derive positions and the attention bias of a causal model.

    Right padding needs no bias: the pads come after the tokens that could see them. On the CPU the mask's values decide
    that; on other devices looking would wait for the queue, so any mask gets a bias there (leave the mask out when the
    rows are padded on the right only).

    Args:
        shape: (batch, seq) of the new tokens.
        attention_mask: [batch, past + seq], True on real tokens.
        position_ids: [1 or batch, seq]; None derives them from the mask or the segments.
        segment_ids: [batch, seq] int64, 0 = padding; positions restart in every segment.
        past: how many columns are in the cache already.
        columns: how many keys there are with `past` > 0: the cache's whole width, written or not.
        dtype: dtype of the bias.
        device: where to put new tensors.
    """
    batch, seq = shape
    if segment_ids is not None and past:
        raise ValueError("segment_ids mark packed rows, which cannot be continued from a cache")
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        if attention_mask.shape != (batch, past + seq):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, but must cover the cached and the new columns: "
                f"[{batch}, {past} + {seq}]"
            )
        if _is_right_padded(attention_mask):
            attention_mask = None if segment_ids is None else attention_mask
    if position_ids is None:
        position_ids = _positions(seq, attention_mask, segment_ids, past, device)
    segments = segment_ids
    if attention_mask is not None:
        segments = attention_mask.long() if segments is None else segments * attention_mask
    if segments is None and not past:
        return Layout(position_ids, None)
    unwritten = (columns or past + seq) - past - seq if past else 0
    return Layout(position_ids, _bias(segments, seq, past, unwritten, dtype, device))


def _is_right_padded(attention_mask: Tensor) -> bool:
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())


def _positions(
    seq: int,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    past: int,
    device: torch.device,
) -> Tensor:
    columns = torch.arange(past, past + seq, device=device)
    if segment_ids is not None:
        starts = torch.ones_like(segment_ids, dtype=torch.bool)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        return columns - torch.where(starts, columns, 0).cummax(dim=1).values
    if attention_mask is not None:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, past:]
    return columns[None]


def _bias(
    segments: Tensor | None,
    seq: int,
    past: int,
    unwritten: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    columns = torch.arange(past + seq + unwritten, device=device)
    hidden = (columns[None, :] > columns[past : past + seq, None])[None, None]
    if segments is not None:
        other = segments[:, past:, None] != segments[:, None, :]
        hidden = hidden | F.pad(other, (0, unwritten))[:, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
    return bias.masked_fill_(hidden, torch.finfo(dtype).min / 2)

"""Who may see whom, worked out once per batch: positions, and one mask per kind of layer, shared by all of its layers.

Padding and packing are the same thing here. Every token belongs to a segment and sees tokens of its own segment only;
padding is segment 0. So no row of the attention matrix is ever empty, and padding can never make a NaN.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.layers.attention_kernels import AUTO, reads
from distllm.layers.flex_attention import block_mask
from distllm.layers.pieces import Pieces, cut


@dataclass(slots=True)
class Mask:
    """Who sees whom in one layer."""

    causal: bool = False
    """Queries see no later column; there are as many keys as queries."""
    bias: Tensor | None = None
    """[1 or batch, 1 or n_heads, seq, kv_seq], added to the scores: 0 where a query sees a key, a large negative number
    elsewhere. It holds all there is to know; None = everything is seen, but for what `causal` hides."""
    pieces: Pieces | None = None
    """In place of `bias`, for kernels that read it; `causal` and `window` hold within each piece."""
    window: int | None = None
    block_mask: Any = None
    """In place of `bias`, for FlexAttention; then `bias` is what is added to the scores and hides nothing."""


@dataclass(slots=True)
class Layout:
    """Where the tokens of one call stand."""

    position_ids: Tensor
    """[1 or batch, seq] int64."""
    masks: dict[int | None, Mask]
    """Window -> mask; None = no window."""
    real: Tensor | None
    """[batch, seq] bool: which new tokens are no padding; None = all, as far as is known."""


def lay_out(
    shape: tuple[int, int],
    *,
    causal: bool = True,
    windows: Iterable[int | None] = (None,),
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_ids: Tensor | None,
    prefix_lengths: Tensor | None = None,
    past: int,
    columns: int | None = None,
    dtype: torch.dtype,
    device: torch.device,
    kernel: str = AUTO,
) -> Layout:
    """Derive positions and masks of a stack of self-attention layers.

    Causal layers need no bias for right padding: the pads come after the tokens that could see them. On the CPU the
    mask's values decide that; on other devices looking would wait for the queue, so any mask gets a bias there (leave
    the mask out when the rows are padded on the right only).

    Args:
        shape: (batch, seq) of the new tokens.
        causal: tokens see no later ones.
        windows: for each kind of layer, how far it looks: tokens less than this far away. None = all.
        attention_mask: [batch, past + seq], True on real tokens.
        position_ids: [1 or batch, seq]; None derives them from the mask or the segments.
        segment_ids: [batch, seq] int64, 0 = padding; positions restart in every segment.
        prefix_lengths: [batch], or [batch, seq] where every token carries the number of its segment: so many tokens at
            the start of the segment are seen by all of it, later ones causally.
        past: how many columns are in the cache already.
        columns: how many keys there are with `past` > 0: the cache's whole width, written or not.
        dtype: dtype of the bias.
        device: where to put new tensors.
        kernel: of `attention_kernels.KERNELS`: decides the form of the masks.
    """
    batch, seq = shape
    if segment_ids is not None and past:
        raise ValueError("segment_ids mark packed rows, which cannot be continued from a cache")
    real = None if segment_ids is None else segment_ids != 0
    if attention_mask is not None:
        attention_mask = attention_mask.bool()
        if attention_mask.shape != (batch, past + seq):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, but must cover the cached and the new columns: "
                f"[{batch}, {past} + {seq}]"
            )
        new = attention_mask[:, past:]
        real = new if real is None else real & new
        if segment_ids is None and _says_nothing(attention_mask, causal):
            attention_mask = None
    if position_ids is None:
        position_ids = _positions(seq, attention_mask, segment_ids, past, device)[:, past:]
    segments = segment_ids
    if attention_mask is not None:
        segments = attention_mask.long() if segments is None else segments * attention_mask
    prefix = _prefix(prefix_lengths, seq, attention_mask, segment_ids, past, device)
    unwritten = (columns or past + seq) - past - seq if past else 0
    masks = {}
    form = reads(kernel, device)
    for window in set(windows):
        if form != "bias" and not past:
            masks[window] = _structured(
                form, (batch, seq, seq), segments, segments, prefix, causal, window, device
            )
            continue
        within = None if window is None or window >= past + seq else window
        plain = segments is None and prefix is None and within is None and not past
        bias = (
            None
            if plain
            else _bias(segments, prefix, within, causal, seq, past, unwritten, dtype, device)
        )
        masks[window] = Mask(causal=causal and not past and prefix is None, bias=bias)
    return Layout(position_ids, masks, real)


def cross_mask(
    queries: Tensor | None,
    keys: Tensor | None,
    key_mask: Tensor | None,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int] | None = None,
    kernel: str = AUTO,
    device: torch.device | None = None,
) -> Mask:
    """Derive the mask of attention from one sequence to another.

    Args:
        queries: [batch, seq] segment ids of packed queries; None = all may see all.
        keys: [batch, kv_seq] segment ids of packed keys.
        key_mask: [batch, kv_seq], True on real keys.
        dtype: dtype of the bias.
        shape: (batch, seq, kv_seq), which kernels that read no bias want to know.
        kernel: of `attention_kernels.KERNELS`.
        device: where to put new tensors.
    """
    if shape is not None and device is not None and reads(kernel, device) != "bias":
        real_keys = keys
        if key_mask is not None:
            real_keys = key_mask.long() if keys is None else keys * key_mask
        form = reads(kernel, device)
        return _structured(form, shape, queries, real_keys, None, False, None, device)
    visible = None
    if queries is not None and keys is not None:
        visible = queries[:, :, None] == keys[:, None, :]
    if key_mask is not None and not _says_nothing(key_mask.bool(), causal=False):
        real = key_mask.bool()[:, None, :]
        visible = real if visible is None else visible & real
    return Mask(bias=None if visible is None else _additive(~visible[:, None], dtype))


def _structured(
    form: str,
    shape: tuple[int, int, int],
    queries: Tensor | None,
    keys: Tensor | None,
    prefix: Tensor | None,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Mask:
    """Say who sees whom without a number per pair."""
    if form == "pieces":
        found = cut(shape, queries, keys, prefix, device)
        return Mask(causal=causal, window=window, pieces=found)
    made = block_mask(shape, queries, keys, prefix, causal=causal, window=window, device=device)
    return Mask(causal=causal, window=window, block_mask=made)


def causal_bias(seq: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Write plain causality out as a bias [1, 1, seq, seq]."""
    return _bias(None, None, None, True, seq, 0, 0, dtype, device)


def _says_nothing(attention_mask: Tensor, causal: bool) -> bool:
    """True where the mask is known to hide nothing that the rest does not hide."""
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if causal:  # padded on the right only
        return not bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any())
    return bool(attention_mask.all())


def _positions(
    seq: int,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    past: int,
    device: torch.device,
) -> Tensor:
    """Number the tokens of every segment, cached columns included: [1 or batch, past + seq]."""
    columns = torch.arange(past + seq, device=device)
    if segment_ids is not None:
        starts = torch.ones_like(segment_ids, dtype=torch.bool)
        starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        return columns - torch.where(starts, columns, 0).cummax(dim=1).values
    if attention_mask is not None:
        return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return columns[None]


def _prefix(
    lengths: Tensor | None,
    seq: int,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    past: int,
    device: torch.device,
) -> Tensor | None:
    """Return which keys all of their segment may see: [batch, past + seq] bool."""
    if lengths is None:
        return None
    lengths = lengths[:, None] if lengths.ndim == 1 else lengths
    return _positions(seq, attention_mask, segment_ids, past, device) < lengths


def _bias(
    segments: Tensor | None,
    prefix: Tensor | None,
    window: int | None,
    causal: bool,
    seq: int,
    past: int,
    unwritten: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    columns = torch.arange(past + seq + unwritten, device=device)
    ahead = columns[None, :] - columns[past : past + seq, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal:
        hidden = ahead > 0
    elif unwritten:
        hidden = (columns >= past + seq).expand_as(ahead)
    hidden = hidden[None]
    if prefix is not None:
        hidden = hidden & ~F.pad(prefix, (0, unwritten))[:, None, :]
    if window is not None:
        hidden = hidden | (ahead.abs() >= window)
    if segments is not None:
        other = segments[:, past:, None] != segments[:, None, :]
        hidden = hidden | F.pad(other, (0, unwritten))
    return _additive(hidden[:, None], dtype)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return bias.masked_fill_(hidden, torch.finfo(dtype).min / 2)

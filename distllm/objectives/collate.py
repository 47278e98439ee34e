"""Ragged lists to rectangles, and several short sequences to a row; shared by the objectives and RL."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distllm.types import IGNORE_INDEX, Batch

ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this, so that few distinct shapes occur."""

_SOURCE = ("input_ids", "position_ids", "token_type_ids", "prefix_lengths")
"""Fields at the tokens of the input even where there is a decoder beside the encoder."""
_TARGET = (
    "decoder_input_ids",
    "labels",
    "response_index",
    "loss_mask",
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "advantages",
    "returns",
    "old_values",
)
"""Fields at the tokens of the target, which are those of the input where there is no decoder."""


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad `rows` on the right with `value`; return [len(rows), width] int64."""
    width = max(len(row) for row in rows)
    width = -(-width // ROW_MULTIPLE) * ROW_MULTIPLE
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)


def pack_rows(batch: Batch, pad_id: int, longest_row: int = 0) -> Batch:
    """Lay the sequences of a padded batch out again, several to a row, told apart by segments.

    The longest goes first, each into the first row with room on both sides of the model. Rows are as wide as the longest, or
    wider, up to `longest_row`, where that leaves less padding; the result depends on the lengths alone. Fields that are not per
    token stay as they are. Where no row is saved, the batch comes back unchanged.

    Args:
        batch: one sequence per row (beside an encoder's, one target), padded on the right, with `attention_mask`.
        pad_id: fills the rectangles.
        longest_row: most tokens of a row; 0 = those of the longest sequence.

    Returns:
        Batch with `segment_ids` (and `decoder_segment_ids`) in place of the masks.
    """
    masks = [batch.attention_mask, batch.decoder_attention_mask]
    sides = [m for m in masks if m is not None]
    lengths = torch.stack([m.sum(dim=1) for m in sides], dim=1)
    widths = [m.shape[1] for m in sides]
    row, segment, starts, widths = _tightest(lengths.tolist(), widths, longest_row)
    num_rows = int(row.max()) + 1
    if num_rows == len(row):
        return batch
    changed: dict[str, Tensor | None] = {"attention_mask": None, "decoder_attention_mask": None}
    for side, mask in enumerate(sides):
        which, column = mask.nonzero(as_tuple=True)
        to = row[which], starts[which, side] + column
        marks = torch.zeros(num_rows, widths[side], dtype=torch.int64)
        marks[to] = segment[which]
        changed["decoder_segment_ids" if side else "segment_ids"] = marks
        names = _TARGET if side else _SOURCE if len(sides) > 1 else (*_SOURCE, *_TARGET)
        fills = {"input_ids": pad_id, "decoder_input_ids": pad_id, "labels": IGNORE_INDEX}
        for name in names:
            field = getattr(batch, name)
            if field is None:
                continue
            if name == "prefix_lengths":
                field = field[:, None].expand(mask.shape)
            # The token's dim goes second, behind it what a token has several of (GLM's positions).
            field = field.movedim(-1, 1).expand(len(row), *field.movedim(-1, 1).shape[1:])
            out = field.new_full((num_rows, widths[side], *field.shape[2:]), fills.get(name, 0))
            out[to] = field[which, column]
            changed[name] = out.movedim(1, -1)
    return dataclasses.replace(batch, **changed)


def _tightest(
    lengths: Sequence[Sequence[int]], widths: Sequence[int], longest_row: int
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Try rows of `widths` and up to a quarter wider ones; return the layout with the least padding, as `_first_fit`, and its widths."""
    best, wide, least = None, list(widths), 0
    spare = min(max(widths) // 4, max(0, longest_row - max(widths)))
    for more in range(0, spare + 1, ROW_MULTIPLE):
        wider = [w + -(-more * w // max(widths) // ROW_MULTIPLE) * ROW_MULTIPLE for w in widths]
        found = _first_fit(lengths, wider)
        places = (max(found[0]) + 1) * sum(wider)
        if best is None or places < 0.99 * least:  # wider rows cost attention
            best, wide, least = found, wider, places
    assert best is not None
    row, segment, starts = (torch.tensor(x) for x in best)
    return row, segment, starts, wide


def _first_fit(
    lengths: Sequence[Sequence[int]], widths: Sequence[int]
) -> tuple[list[int], list[int], list[list[int]]]:
    """Give each sequence a row: its number, its segment there from 1, and where it starts on each side."""
    row, segment = [0] * len(lengths), [0] * len(lengths)
    starts: list[list[int]] = [[] for _ in lengths]
    used: list[list[int]] = [[] for _ in widths]  # side -> tokens in each row
    members: list[int] = []
    limits = list(zip(used, widths, strict=True))
    for i in sorted(range(len(lengths)), key=lambda i: -sum(lengths[i])):
        fits: Iterable[int] = range(len(members))
        for (side, width), length in zip(limits, lengths[i], strict=True):
            fits = filter(lambda k, s=side, w=width - length: s[k] <= w, fits)
        at = next(iter(fits), len(members))
        if at == len(members):
            members.append(0)
            for side in used:
                side.append(0)
        members[at] += 1
        row[i], segment[i], starts[i] = at, members[at], [side[at] for side in used]
        for side, length in zip(used, lengths[i], strict=True):
            side[at] += length
    return row, segment, starts

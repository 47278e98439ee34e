"""Ragged lists to rectangles, and several short sequences to a row; shared by the objectives and RL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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


def pack_rows(batch: Batch, pad_id: int) -> Batch:
    """Lay the sequences of a padded batch out again, several to a row of the same width, told apart by segments.

    The longest goes first, each into the first row with room on both sides of the model, so the result depends on the
    lengths alone. Fields that are not per token stay as they are. Where no row is saved, the batch comes back unchanged.

    Args:
        batch: one sequence per row (beside an encoder's, one target), padded on the right, with `attention_mask`.
        pad_id: fills the rectangles.

    Returns:
        Batch with `segment_ids` (and `decoder_segment_ids`) in place of the masks.
    """
    masks = [batch.attention_mask, batch.decoder_attention_mask]
    sides = [m for m in masks if m is not None]
    lengths = torch.stack([m.sum(dim=1) for m in sides], dim=1)
    row, segment, starts = _first_fit(lengths.tolist(), [m.shape[1] for m in sides])
    num_rows = int(row.max()) + 1
    if num_rows == len(row):
        return batch
    changed: dict[str, Tensor | None] = {"attention_mask": None, "decoder_attention_mask": None}
    for side, mask in enumerate(sides):
        which, column = mask.nonzero(as_tuple=True)
        to = row[which], starts[which, side] + column
        marks = torch.zeros(num_rows, mask.shape[1], dtype=torch.int64)
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
            out = field.new_full((num_rows, *field.shape[1:]), fills.get(name, 0))
            out[to] = field[which, column]
            changed[name] = out.movedim(1, -1)
    return dataclasses.replace(batch, **changed)


def _first_fit(
    lengths: Sequence[Sequence[int]], widths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each sequence a row: its number, its segment there from 1, and where it starts on each side [num, sides]."""
    row, segment = (torch.zeros(len(lengths), dtype=torch.int64) for _ in range(2))
    starts = torch.zeros(len(lengths), len(widths), dtype=torch.int64)
    filled: list[list[int]] = []
    members: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -sum(lengths[i])):
        ends = ([a + b for a, b in zip(used, lengths[i], strict=True)] for used in filled)
        fits = (all(e <= w for e, w in zip(end, widths, strict=True)) for end in ends)
        at = next((k for k, fit in enumerate(fits) if fit), len(filled))
        if at == len(filled):
            filled.append([0] * len(widths))
            members.append(0)
        members[at] += 1
        row[i], segment[i], starts[i] = at, members[at], torch.tensor(filled[at])
        filled[at] = [a + b for a, b in zip(filled[at], lengths[i], strict=True)]
    return row, segment, starts

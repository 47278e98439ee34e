"""How prompts and responses become the inputs of a model that reads them as one sequence; shared by architectures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distllm.types import IGNORE_INDEX, Batch


def join_behind(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
) -> Batch:
    """Write each response behind its prompt, padded on the right.

    Args:
        prompts: token ids, at least one per prompt.
        responses: token ids; may be empty.
        pad_id: fills the rectangle.

    Returns:
        Batch of `input_ids`, `attention_mask`, and `labels` at the positions that predict a response token.

    Raises:
        ValueError: a prompt is empty, so nothing predicts the first response token.
    """
    empty = [i for i, p in enumerate(prompts) if not len(p)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty; nothing could predict its response")
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    input_ids, attention_mask = pad_right(rows, pad_id)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        labels[row, start - 1 : end - 1] = input_ids[row, start:end]
    return Batch(input_ids=input_ids, labels=labels, attention_mask=attention_mask)


def pad_right(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Return (rows padded on the right, where they are real), each [batch, longest]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        mask[i, : len(row)] = True
    return ids, mask

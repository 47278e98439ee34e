"""Ragged lists to rectangles, shared by the objectives."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROW_MULTIPLE = 8
"""Rows are padded to a multiple of this, so that few distinct shapes occur."""


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Pad `rows` on the right with `value`; return [len(rows), width] int64."""
    width = max(len(row) for row in rows)
    width = -(-width // ROW_MULTIPLE) * ROW_MULTIPLE
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)

"""What the objectives that corrupt text share: rows of pieces, noise by sample and visit, one loss per hidden token.

How a piece is corrupted, and how long it becomes, is in one file per objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distllm.data.chunks import ChunkedDataset, RawRow
from distllm.data.vocabulary import Vocabulary
from distllm.objectives.clm import lm_loss
from distllm.objectives.noise import generator
from distllm.objectives.options import PretrainOptions
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model

EVALUATION = 1
"""Marks the noise of held-out text, which must not be that of training."""


class Denoising(ABC):
    """Sum of the negative log-probabilities of all labelled tokens, in nats; weight: their number."""

    coefficients: Mapping[str, float] = {"lm": 1.0}
    min_piece = 2
    """Fewest tokens that can be corrupted: one to hide and one to see."""

    def __init__(
        self,
        options: PretrainOptions,
        vocabulary: Vocabulary,
        model: Any,
        seq_len: int,
        *,
        seed: int = 0,
        evaluating: bool = False,
    ) -> None:
        """Set up the corruption.

        Args:
            options: of the stage.
            vocabulary: special ids.
            model: its layout is read, not its weights: `options` and `join`.
            seq_len: tokens of a row as the model reads it (its encoder, if it has two sides).
            seed: of the noise.
            evaluating: the noise and the rates are those of held-out text.
        """
        self.options, self.vocabulary, self.model = options, vocabulary, model
        self.seq_len, self.seed, self.evaluating = seq_len, seed, evaluating

    @abstractmethod
    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Return the most room that a piece takes on each side of the model."""

    def limits(self) -> tuple[int, ...]:
        """Return the room in a row on each side."""
        return (self.seq_len,)

    def dataset(self, documents: Sequence[Sequence[int]]) -> ChunkedDataset:
        """Lay documents out in rows that `collate` takes."""
        return ChunkedDataset(documents, self.sizes, self.limits(), min_piece=self.min_piece)

    @abstractmethod
    def collate(self, examples: Sequence[RawRow]) -> Batch:
        """Corrupt the rows and lay them out."""

    def rng(self, row: RawRow, piece: int) -> np.random.Generator:
        """Return the noise of one piece."""
        where = (EVALUATION, 0) if self.evaluating else (0, row.visit)
        return generator(self.seed, *where, row.sample_id, piece)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the labelled tokens."""
        assert batch.labels is not None
        return {"lm": (batch.labels != IGNORE_INDEX).sum().double()}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Sum the losses without ever holding all logits."""
        return lm_loss(model, batch, 0.0 if self.evaluating else self.options.z_loss)


class Rectangle:
    """Rows of one width that pieces are written into, with the piece's number as its segment."""

    def __init__(self, num_rows: int, width: int, fill: int) -> None:
        self.ids = np.full((num_rows, width), fill, dtype=np.int64)
        self.segments = np.zeros((num_rows, width), dtype=np.int64)
        self._ends = [0] * num_rows

    def write(self, row: int, ids: Sequence[int] | np.ndarray, segment: int) -> slice:
        """Write `ids` behind what is in `row`; return where they stand."""
        start = self._ends[row]
        place = slice(start, start + len(ids))
        if place.stop > self.ids.shape[1]:
            raise ValueError(f"row {row} has no room for {len(ids)} more tokens")
        self.ids[row, place] = ids
        self.segments[row, place] = segment
        self._ends[row] = place.stop
        return place


def sample_ids(examples: Sequence[RawRow]) -> Tensor:
    """Return the numbers of the rows, [batch]."""
    return torch.tensor([e.sample_id for e in examples])

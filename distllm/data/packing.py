"""Documents laid end to end and cut into rows of one length (tokenised in `datasets.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distllm.errors import DataError
from distllm.types import IGNORE_INDEX


@dataclass(slots=True)
class PackedRow:
    """One row; documents in it are told apart by `segment_ids`."""

    input_ids: Tensor
    """[seq_len] int64."""
    labels: Tensor
    """[seq_len] int64: the next token of the same document, or IGNORE_INDEX."""
    segment_ids: Tensor
    """[seq_len] int64: 1, 2, ... from the row's start; 0 on padding."""
    sample_id: int
    """The row's number."""


class PackedDataset:
    """Rows of `seq_len` tokens over documents, each of which is closed by `eos_id`.

    Every token but a document's first is the label of exactly one position. A document that is cut
    by a row's end goes on in the next row as a new segment: the last position of the row still
    predicts the token that opens the next row, which in turn sees nothing of what came before. Only
    the last row is padded.
    """

    def __init__(
        self,
        documents_ids: Sequence[Sequence[int] | np.ndarray],
        seq_len: int,
        *,
        eos_id: int,
        pad_id: int = 0,
        num_bytes: int = 0,
    ) -> None:
        if seq_len < 1:
            raise DataError(f"train.seq_len={seq_len} must be at least 1.")
        documents = [np.asarray(d, dtype=np.int32) for d in documents_ids if len(d)]
        if not documents:
            raise DataError("There is no text to pack: every document is empty.")
        self.seq_len = seq_len
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.num_bytes = num_bytes
        """UTF-8 bytes of the documents' text, end tokens not counted; 0 when unknown."""
        eos = np.array([eos_id], dtype=np.int32)
        self._tokens = np.concatenate([part for d in documents for part in (d, eos)])
        ends = np.cumsum([len(d) + 1 for d in documents])
        self._starts = np.concatenate([[0], ends[:-1]])

    def __len__(self) -> int:
        return math.ceil(self.num_tokens / self.seq_len)

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end tokens included, padding not."""
        return len(self._tokens)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones not counted."""
        return len(self._starts)

    @property
    def num_targets(self) -> int:
        """Positions that have a label: every token but the first of each document."""
        return self.num_tokens - self.num_documents

    @property
    def efficiency(self) -> float:
        """Share of the rows' positions that hold a token (the rest is padding)."""
        return self.num_tokens / (len(self) * self.seq_len)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Turn a mean loss over the labels into bits per byte of text.

        The first token of each document, which no position predicts, is charged at the mean; end
        tokens count as tokens but bring no bytes.
        """
        if not self.num_bytes:
            raise ValueError("num_bytes was not given, so bits per byte are unknown")
        return nats_per_token * self.num_tokens / (self.num_bytes * math.log(2))

    def documents(self) -> list[np.ndarray]:
        """Return each document's ids, its end token included."""
        return np.split(self._tokens, self._starts[1:])

    def __getitem__(self, index: int) -> PackedRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first = index * self.seq_len
        last = min(first + self.seq_len, self.num_tokens)
        size = last - first
        # One token further than the row, for its last label.
        tokens, owner = self._read(first, min(last + 1, self.num_tokens))
        input_ids = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        input_ids[:size] = tokens[:size]
        segment_ids = np.zeros(self.seq_len, dtype=np.int64)
        segment_ids[:size] = owner[:size] - owner[0] + 1
        labels = np.full(self.seq_len, IGNORE_INDEX, dtype=np.int64)
        following = tokens[1:]
        same = owner[1:] == owner[: len(following)]
        labels[: len(following)] = np.where(same, following, IGNORE_INDEX)
        return PackedRow(
            torch.from_numpy(input_ids),
            torch.from_numpy(labels),
            torch.from_numpy(segment_ids),
            index,
        )

    def _read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids at places first .. last - 1 and the number of the document that each belongs to."""
        owners = np.searchsorted(self._starts, np.arange(first, last), "right")
        return self._tokens[first:last], owners

"""Prefix language modelling: a text is cut at a random place; its first part is read from both sides, its last is said.

One piece per row, laid out by the model: prefix and suffix are one sequence with a prefix mask for a decoder or GLM, two
sequences for an encoder-decoder.

Reference: Raffel et al. 2020, arXiv 1910.10683, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distllm.data.chunks import ChunkedDataset, RawRow
from distllm.objectives.denoising import Denoising, sample_ids
from distllm.registry import register
from distllm.types import Batch


@register("objective")
class Prefix(Denoising):
    """Reads z_loss."""

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Beside the tokens there are an end, and what the model writes between the two parts."""
        return (num_tokens + len(self.vocabulary.closing) + 2,)

    def dataset(self, documents: Sequence[Sequence[int]]) -> ChunkedDataset:
        """One piece per row."""
        return ChunkedDataset(
            documents, self.sizes, self.limits(), min_piece=self.min_piece, pack=False
        )

    def collate(self, examples: Sequence[RawRow]) -> Batch:
        """Cut each piece at a place that is uniform over its inside."""
        prefixes, suffixes = [], []
        for row in examples:
            (piece,) = row.pieces
            cut = 1 + int(self.rng(row, 0).random() * (len(piece) - 1))
            prefixes.append(piece[:cut].tolist())
            suffixes.append([*piece[cut:].tolist(), *self.vocabulary.closing])
        batch = self.model.join(prefixes, suffixes, self.vocabulary.pad_id)
        if batch.decoder_input_ids is None and batch.position_ids is None:
            batch.prefix_lengths = torch.tensor([len(p) for p in prefixes])
        batch.sample_ids = sample_ids(examples)
        return batch

"""Masked language modelling: guess the hidden tokens of a text from both sides.

Reference: Devlin et al. 2019, arXiv 1810.04805, section 3.1 and appendix A.1 (15% chosen; of these 80% mask, 10% random,
10% kept; loss on the chosen ones only); whole words as in the authors' code. Masks are drawn anew at every visit, and
rows are packed with whole texts and no next-sentence task, as in Liu et al. 2019, arXiv 1907.11692. Random tokens are
never special ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.data.chunks import RawRow
from distllm.objectives.denoising import Denoising, Rectangle, sample_ids
from distllm.objectives.noise import pick
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch


@register("objective")
class MLM(Denoising):
    """Reads mask_rate, eval_mask_rate, mask_whole_words, mask_token_share, random_token_share, z_loss."""

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """A piece stands between a classification token and a separator."""
        return (num_tokens + len(self.vocabulary.opening) + len(self.vocabulary.closing),)

    def collate(self, examples: Sequence[RawRow]) -> Batch:
        """Hide tokens; `labels` holds what was there."""
        rows = Rectangle(len(examples), self.seq_len, self.vocabulary.pad_id)
        labels = np.full_like(rows.ids, IGNORE_INDEX)
        opening, closing = self.vocabulary.opening, self.vocabulary.closing
        for r, row in enumerate(examples):
            for p, piece in enumerate(row.pieces):
                corrupted, chosen = self.corrupt(piece, self.rng(row, p))
                place = rows.write(r, [*opening, *corrupted, *closing], p + 1)
                labels[r, place.start + len(opening) + chosen] = piece[chosen]
        return Batch(
            input_ids=torch.from_numpy(rows.ids),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(rows.segments),
            sample_ids=sample_ids(examples),
        )

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the text with tokens hidden, and the places of the chosen ones, sorted."""
        options = self.options
        rate = options.eval_mask_rate if self.evaluating else options.mask_rate
        wanted = min(len(ids), max(1, round(rate * len(ids))))
        if options.mask_whole_words:
            chosen = _whole_words(self.vocabulary.word_starts(ids), len(ids), wanted, rng)
        else:
            chosen = pick(rng, len(ids), wanted)
        fate = rng.random(len(chosen))
        random_ids = rng.choice(self.vocabulary.plain_ids, len(chosen))
        corrupted = ids.copy()
        masked = fate < options.mask_token_share
        swapped = ~masked & (fate < options.mask_token_share + options.random_token_share)
        corrupted[chosen[masked]] = self.vocabulary.mask_id
        corrupted[chosen[swapped]] = random_ids[swapped]
        return corrupted, chosen


def _whole_words(
    starts: np.ndarray, num_tokens: int, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Take words in random order as long as they fit into `wanted` tokens, at least one word."""
    lengths = np.diff(starts, append=num_tokens)
    chosen: list[int] = []
    for word in np.argsort(rng.random(len(starts)), kind="stable"):
        if not chosen or len(chosen) + lengths[word] <= wanted:
            chosen += range(starts[word], starts[word] + lengths[word])
        if len(chosen) >= wanted:
            break
    return np.sort(np.array(chosen))

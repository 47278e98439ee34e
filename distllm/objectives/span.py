"""T5's span corruption: spans of a text are replaced by sentinels, and the decoder says what they were.

    round(rate n) tokens in round(that / mean length) spans, all ways of cutting equally likely, the text first
    input:  text with sentinel k in place of span k, end;  target: sentinel 0, span 0, sentinel 1, span 1, ..., end

Reference: Raffel et al. 2020, arXiv 1910.10683, section 3.1.4, and the authors' `random_spans_noise_mask` (568 tokens give
512 on the input side and 114 on the target side). As there, and unlike the paper's figure 2, no sentinel closes the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distllm.data.chunks import RawRow
from distllm.errors import ConfigError
from distllm.objectives.denoising import Denoising, Rectangle, sample_ids
from distllm.objectives.noise import random_segmentation
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch

Pair = tuple[np.ndarray, np.ndarray]
"""Input and target ids of a piece."""


@register("objective")
class Span(Denoising):
    """Reads mask_rate, mean_span_length, z_loss."""

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Count input and target tokens of a piece, their end tokens included."""
        return self._sizes_of(num_tokens, self.options.mask_rate, self.options.mean_span_length)

    def _sizes_of(self, num_tokens: int, rate: float, mean_length: float) -> tuple[int, int]:
        noise, spans = noise_counts(num_tokens, rate, mean_length)
        if spans > len(self.vocabulary.sentinels):
            return (2**31, 2**31)  # such a piece fits nowhere: there are no names for its gaps
        end = len(self.vocabulary.closing)
        return num_tokens - noise + spans + end, noise + spans + end

    def limits(self) -> tuple[int, ...]:
        """Give the target side what the longest piece needs and a quarter more: short pieces need more per token."""
        longest = 1
        while self.sizes(longest + 1)[0] <= self.seq_len:
            longest += 1
        return self.seq_len, -(-self.sizes(longest)[1] * 5 // 4 // 8) * 8

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> Pair:
        """Return input and target."""
        counts = noise_counts(len(ids), self.options.mask_rate, self.options.mean_span_length)
        return self._hide(ids, random_spans(rng, len(ids), *counts))

    def _hide(self, ids: np.ndarray, spans: np.ndarray) -> Pair:
        """Replace `spans` [num, 2] (start, stop; sorted, apart) by sentinels."""
        sentinels, closing = self.vocabulary.sentinels, self.vocabulary.closing
        inputs: list[np.ndarray | list[int]] = []
        targets: list[np.ndarray | list[int]] = []
        done = 0
        for sentinel, (start, stop) in zip(sentinels, spans, strict=False):
            inputs += [ids[done:start], [sentinel]]
            targets += [[sentinel], ids[start:stop]]
            done = stop
        inputs += [ids[done:], closing]
        targets.append(closing)
        return _join(inputs), _join(targets)

    def collate(self, examples: Sequence[RawRow]) -> Batch:
        """Write both sides of every piece into one row each, told apart by segments."""
        start_id = _start_id(self.model)
        source_width, target_width = self.limits()
        source = Rectangle(len(examples), source_width, self.vocabulary.pad_id)
        target = Rectangle(len(examples), target_width, self.vocabulary.pad_id)
        labels = np.full_like(target.ids, IGNORE_INDEX)
        for r, row in enumerate(examples):
            for p, piece in enumerate(row.pieces):
                inputs, targets = self.corrupt(piece, self.rng(row, p))
                source.write(r, inputs, p + 1)
                place = target.write(r, np.concatenate([[start_id], targets[:-1]]), p + 1)
                labels[r, place] = targets
        return Batch(
            input_ids=torch.from_numpy(source.ids),
            segment_ids=torch.from_numpy(source.segments),
            decoder_input_ids=torch.from_numpy(target.ids),
            decoder_segment_ids=torch.from_numpy(target.segments),
            labels=torch.from_numpy(labels),
            sample_ids=sample_ids(examples),
        )


def noise_counts(num_tokens: int, rate: float, mean_length: float) -> tuple[int, int]:
    """Return how many of `num_tokens` are hidden, and in how many spans."""
    noise = min(max(round(num_tokens * rate), 1), max(num_tokens - 1, 1))
    spans = max(round(noise / mean_length), 1)
    return noise, min(spans, noise, max(num_tokens - noise, 1))


def random_spans(
    rng: np.random.Generator, num_tokens: int, num_noise: int, num_spans: int
) -> np.ndarray:
    """Draw spans, [num_spans, 2] of (start, stop), with text before each."""
    noise = random_segmentation(rng, num_noise, num_spans)
    text = random_segmentation(rng, num_tokens - num_noise, num_spans)
    stops = np.cumsum(noise + text)
    return np.stack([stops - noise, stops], axis=1)


def _join(parts: Sequence[np.ndarray | list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def _start_id(model: object) -> int:
    options = getattr(model, "options", None)
    if not hasattr(options, "decoder_start_id"):
        raise ConfigError(
            f"arch={getattr(options, 'name', '?')} has no decoder beside an encoder, which span corruption "
            "writes for. Set arch=t5_small (or another encoder-decoder), or stage.objective=auto."
        )
    return options.decoder_start_id  # type: ignore[union-attr]

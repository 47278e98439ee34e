"""GLM's autoregressive blank infilling: spans are cut out and said one by one, in shuffled order, behind the text.

    text x0..x7, spans {2} and {4 5}, order swapped:
    ids    x0 x1 [M] x3 [M] x6 x7 | sop x4 x5 | sop x2      labels  - ... - | x4 x5 eop | x2 eop
    place   0  1  2   3  4   5  6 |  4   4  4 |  2   2      in span     0   |  1  2  3  |  1  2

The text (part A) is seen by all; a span (part B) sees the text, the spans before it and its own beginning.

Reference: Du et al. 2022, arXiv 2103.10360, section 2.1, and the authors' code: lengths from Poisson(3) restricted to
1..39, drawn until int(0.15 n) tokens are reached; at least one token between spans. Departures: pieces never cross a
document's end, and length draws with far more spans than usual (beyond one in ten thousand) are drawn again, so that
rows have a fixed width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from distllm.data import vocabulary as names
from distllm.data.chunks import RawRow
from distllm.objectives.denoising import Denoising, Rectangle, sample_ids
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch

MAX_SPAN = 40
"""Token-level spans are shorter than this."""


class Piece(NamedTuple):
    """A corrupted piece; all fields are [seq] int64."""

    ids: np.ndarray
    places: np.ndarray
    """First position: the place in the corrupted text."""
    in_span: np.ndarray
    """Second position: 0 in the text, 1, 2, ... within a span."""
    labels: np.ndarray


@register("objective")
class Blank(Denoising):
    """Reads mask_rate, mean_span_length, sentence_share, document_share, min_document_span, z_loss."""

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """A span costs two tokens more than it hides: its mask and its start."""
        extra = len(self.vocabulary.opening) + len(self.vocabulary.closing)
        return (num_tokens + extra + 2 * self.max_spans(num_tokens),)

    def max_spans(self, num_tokens: int) -> int:
        """Return the most spans that a piece may have."""
        usual = self.options.mask_rate * num_tokens / self.options.mean_span_length
        return math.ceil(1.5 * usual) + 2

    @functools.cached_property
    def _length_shares(self) -> np.ndarray:
        """Cumulative probabilities of the lengths 1, 2, ..., MAX_SPAN - 1."""
        mean = self.options.mean_span_length
        logs = [n * math.log(mean) - mean - math.lgamma(n + 1) for n in range(1, MAX_SPAN)]
        shares = np.exp(logs)
        return np.cumsum(shares / shares.sum())

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> Piece:
        """Draw the kind of corruption, the spans and their order."""
        kind = rng.random()
        if kind < self.options.document_share:
            spans, mask = self._last_part(ids, rng), self.vocabulary.id_of(names.DOCUMENT_MASK)
        elif kind < self.options.document_share + self.options.sentence_share:
            spans, mask = self._sentences(ids, rng), self.vocabulary.id_of(names.SENTENCE_MASK)
        else:
            spans, mask = self._token_spans(ids, rng), self.vocabulary.mask_id
        return self.lay_out(ids, spans, mask, np.argsort(rng.random(len(spans)), kind="stable"))

    def _token_spans(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        lengths = self._draw_lengths(len(ids), rng)
        # As the authors do: places are drawn with repetition on the line of what stays visible.
        free = len(ids) - int(lengths.sum()) - len(lengths) + 1
        places = np.sort((rng.random(len(lengths)) * (free + 1)).astype(np.int64))
        starts = places + np.concatenate([[0], np.cumsum(lengths[:-1] + 1)])
        return np.stack([starts, starts + lengths], axis=1)

    def _draw_lengths(self, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        wanted = max(1, int(self.options.mask_rate * num_tokens))
        while True:
            draws = np.searchsorted(self._length_shares, rng.random(wanted), "right") + 1
            lengths = draws[: int(np.searchsorted(np.cumsum(draws), wanted)) + 1]
            if len(lengths) <= self.max_spans(num_tokens):
                break
        while len(lengths) > 1 and lengths.sum() + len(lengths) > num_tokens:
            lengths = lengths[:-1]  # a short piece has no room for all and a token between them
        return np.minimum(lengths, num_tokens - 1)

    def _sentences(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Hide whole sentences, drawn without order, until the rate is reached; never all of them."""
        starts = self.vocabulary.sentence_starts(ids)
        stops = np.append(starts[1:], len(ids))
        most = min(self.max_spans(len(ids)), len(starts) - 1)
        if most < 1:
            return self._token_spans(ids, rng)
        chosen: list[int] = []
        hidden = 0
        for sentence in np.argsort(rng.random(len(starts)), kind="stable"):
            if hidden >= self.options.mask_rate * len(ids) or len(chosen) == most:
                break
            chosen.append(sentence)
            hidden += stops[sentence] - starts[sentence]
        chosen.sort()
        return np.stack([starts[chosen], stops[chosen]], axis=1)

    def _last_part(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        low = self.options.min_document_span
        length = max(1, int(len(ids) * (low + (1 - low) * rng.random())))
        return np.array([[len(ids) - length, len(ids)]])

    def lay_out(
        self, ids: np.ndarray, spans: np.ndarray, mask_id: int, order: Sequence[int] | np.ndarray
    ) -> Piece:
        """Write part A and part B.

        Args:
            ids: [piece].
            spans: [num, 2] of (start, stop), sorted.
            mask_id: stands in the text for each span.
            order: in which the spans are said.
        """
        sop = self.vocabulary.id_of(names.START_OF_PIECE)
        eop = self.vocabulary.id_of(names.END_OF_PIECE)
        text: list[int] = list(self.vocabulary.opening)
        places: list[int] = []
        done = 0
        for start, stop in spans:
            text += ids[done:start].tolist()
            places.append(len(text))
            text.append(mask_id)
            done = stop
        text += [*ids[done:].tolist(), *self.vocabulary.closing]
        piece = [text, list(range(len(text))), [0] * len(text), [IGNORE_INDEX] * len(text)]
        for index in order:
            hidden = ids[slice(*spans[index])].tolist()
            for column, new in zip(
                piece,
                (
                    [sop, *hidden],
                    [places[index]] * (len(hidden) + 1),
                    range(1, len(hidden) + 2),
                    [*hidden, eop],
                ),
                strict=True,
            ):
                column.extend(new)
        return Piece(*(np.array(column, dtype=np.int64) for column in piece))

    def collate(self, examples: Sequence[RawRow]) -> Batch:
        """Corrupt and pack; positions have two rows, [batch, 2, seq]."""
        rows = Rectangle(len(examples), self.seq_len, self.vocabulary.pad_id)
        labels = np.full_like(rows.ids, IGNORE_INDEX)
        positions = np.zeros((len(examples), 2, self.seq_len), dtype=np.int64)
        for r, row in enumerate(examples):
            for p, ids in enumerate(row.pieces):
                piece = self.corrupt(ids, self.rng(row, p))
                place = rows.write(r, piece.ids, p + 1)
                labels[r, place] = piece.labels
                positions[r, 0, place] = piece.places
                positions[r, 1, place] = piece.in_span
        return Batch(
            input_ids=torch.from_numpy(rows.ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(positions),
            segment_ids=torch.from_numpy(rows.segments),
            sample_ids=sample_ids(examples),
        )

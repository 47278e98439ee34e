"""Documents cut into pieces that an objective rewrites, several pieces to a row (`packing.py` has rows for causal models).

How long a piece becomes is the objective's business: it says the most room that n tokens take on each side (input,
target), and rows are filled up to the limits. So a corruption that is drawn anew at every visit always fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distllm.errors import DataError

SMALLEST_CUT = 8
"""A document is cut to fill a row only where the piece has at least this many tokens."""

Sizes = Callable[[int], tuple[int, ...]]
"""Tokens of a piece -> the most room it takes on each side; never falls when the number grows."""


@dataclass(slots=True)
class RawRow:
    """The pieces of one row, before the objective works on them."""

    pieces: list[np.ndarray]
    """Token ids, [piece] int64 each; every piece lies within one document."""
    sample_id: int
    """The row's number."""
    visit: int = 0
    """Tells the times apart that the row is given out: its position in the run, 0 when it is only looked at."""


class ChunkedDataset:
    """Rows of pieces, in the documents' order, no token lost but those of documents that are too short."""

    def __init__(
        self,
        documents_ids: Sequence[Sequence[int] | np.ndarray],
        sizes: Sizes,
        limits: tuple[int, ...],
        *,
        min_piece: int = 1,
        pack: bool = True,
    ) -> None:
        """Lay out the rows.

        Args:
            documents_ids: token ids of each document, nothing added.
            sizes: room that a piece takes.
            limits: room in a row, per side.
            min_piece: pieces have at least this many tokens; shorter documents are left out.
            pack: several pieces per row.

        Raises:
            DataError: no document is long enough, or not even the shortest piece fits.
        """
        self.limits = limits
        table = _table(sizes, limits)
        self._longest = len(table) - 1
        if (
            self._longest < 2 * min_piece
        ):  # so that the end of a document can always be cut off well
            raise DataError(
                f"A row has room for {limits[0]} tokens, which holds a piece of {self._longest} at most; "
                f"{2 * min_piece} are needed. Raise train.seq_len."
            )
        documents = [np.asarray(d, dtype=np.int32) for d in documents_ids if len(d) >= min_piece]
        if not documents:
            raise DataError(f"No document has at least {min_piece} tokens.")
        self._tokens = np.concatenate(documents)
        self._starts, self._stops, self._rows, used = _fill(
            [len(d) for d in documents], table, limits, min_piece, pack
        )
        self.num_documents = len(documents)
        self.efficiency = tuple(
            side / (limit * len(self)) for side, limit in zip(used, limits, strict=True)
        )
        """Share of each side's room that is set aside for pieces (an upper bound of what is filled)."""

    def __len__(self) -> int:
        return len(self._rows) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> RawRow:
        return self.draw(index, 0)

    def draw(self, index: int, visit: int) -> RawRow:
        """Return row `index`, marked with what tells this time from others."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        first, last = self._rows[index], self._rows[index + 1]
        pieces = [
            self._tokens[start:stop].astype(np.int64)
            for start, stop in zip(self._starts[first:last], self._stops[first:last], strict=True)
        ]
        return RawRow(pieces, index, visit)


def _table(sizes: Sizes, limits: tuple[int, ...]) -> np.ndarray:
    """List the room of 0, 1, ... tokens, [longest + 1, sides], up to the longest piece that fits."""
    rows = [(0,) * len(limits)]
    while all(room <= limit for room, limit in zip(sizes(len(rows)), limits, strict=True)):
        rows.append(sizes(len(rows)))
    return np.array(rows)


def _fill(
    lengths: Sequence[int],
    table: np.ndarray,
    limits: tuple[int, ...],
    min_piece: int,
    pack: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return pieces (starts, stops), the first piece of each row and the end, and the room used per side."""
    starts, stops, rows = [], [], [0]
    columns = [np.ascontiguousarray(column) for column in table.T]
    left, used, offset = list(limits), np.zeros(len(limits), dtype=np.int64), 0
    for length in lengths:
        done = 0
        while done < length:
            rest = length - done
            fits = min(
                int(np.searchsorted(column, room, "right")) - 1
                for column, room in zip(columns, left, strict=True)
            )
            take = min(rest, fits)
            if 0 < rest - take < min_piece:  # the tail must not become too short to be a piece
                take = rest - min_piece
            opened = len(starts) > rows[-1]
            too_short = take < min_piece or (take < rest and take < SMALLEST_CUT)
            if opened and (too_short or not pack):
                rows.append(len(starts))
                left = list(limits)
                continue
            take = max(take, min_piece)
            starts.append(offset + done)
            stops.append(offset + done + take)
            room = table[take]
            left = [have - need for have, need in zip(left, room.tolist(), strict=True)]
            used += room
            done += take
        offset += length
    return np.array(starts), np.array(stops), np.array([*rows, len(starts)]), used

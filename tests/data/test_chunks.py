"""Rows of pieces: nothing lost, nothing over the limits, nothing across documents."""

import itertools
import random

import numpy as np
import pytest

from distllm.data.chunks import SMALLEST_CUT, ChunkedDataset
from distllm.errors import DataError


def grown(n):
    """Two sides, of which now one and now the other is the tighter."""
    return n - n // 5 + 3, n // 5 + n // 9 + 2


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_every_document_in_pieces_that_fit(pack):
    rng = random.Random(0)
    for limits in [(12, 9), (40, 14), (128, 40)]:
        lengths = [rng.randint(1, 200) for _ in range(60)]
        documents = [[1000 * d + i for i in range(n)] for d, n in enumerate(lengths)]
        rows = ChunkedDataset(documents, grown, limits, min_piece=2, pack=pack)
        read = []
        for index in range(len(rows)):
            row = rows[index]
            assert row.sample_id == index and row.visit == 0
            assert len(row.pieces) == 1 or pack
            for side, limit in enumerate(limits):
                assert sum(grown(len(p))[side] for p in row.pieces) <= limit
            for piece in row.pieces:
                assert piece.dtype == np.int64 and len(piece) >= 2
                assert len({t // 1000 for t in piece.tolist()}) == 1
                read += piece.tolist()
        assert read == [t for d in documents if len(d) >= 2 for t in d]
        assert rows.num_tokens == len(read)


def test_rows_are_well_filled():
    rng = random.Random(1)
    documents = [list(range(rng.randint(20, 400))) for _ in range(200)]
    rows = ChunkedDataset(documents, lambda n: (n + 2,), (128,))
    used = sum(len(p) + 2 for i in range(len(rows)) for p in rows[i].pieces)
    assert rows.efficiency == (used / (128 * len(rows)),)
    assert rows.efficiency[0] > 0.95
    pieces = [p.tolist() for i in range(len(rows)) for p in rows[i].pieces]
    cut = [p for p, following in itertools.pairwise(pieces) if following[0] != 0]
    assert len(cut) > 100 and min(map(len, cut)) >= SMALLEST_CUT


def test_visits_do_not_change_the_text():
    rows = ChunkedDataset([[1, 2, 3]], lambda n: (n,), (8,))
    assert rows.draw(0, 5).visit == 5 and rows.draw(0, 5).pieces[0].tolist() == [1, 2, 3]
    with pytest.raises(IndexError):
        rows.draw(1, 0)


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(DataError, match=r"room for 6 tokens.*Raise train\.seq_len"):
        ChunkedDataset([[1, 2, 3]], lambda n: (n + 4,), (6,), min_piece=2)
    with pytest.raises(DataError, match="at least 3 tokens"):
        ChunkedDataset([[1, 2]], lambda n: (n,), (64,), min_piece=3)

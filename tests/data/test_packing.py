"""Packing against a token-by-token reading of the same documents, and as the bigram counts that a
model would see."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from distllm.data.packing import PackedDataset
from distllm.errors import DataError
from distllm.types import IGNORE_INDEX

EOS, PAD = 1, 0


def random_documents(rng, num_documents, longest):
    return [
        [rng.randint(2, 30) for _ in range(rng.randint(1, longest))] for _ in range(num_documents)
    ]


def packed(documents, seq_len, **kwargs):
    return PackedDataset(documents, seq_len, eos_id=EOS, pad_id=PAD, **kwargs)


@pytest.mark.parametrize("seq_len", [1, 2, 5, 16, 1000])
def test_rows_read_back_as_the_documents(seq_len):
    rng = random.Random(seq_len)
    for _ in range(20):
        documents = random_documents(rng, rng.randint(1, 8), 40)
        rows = packed(documents, seq_len)
        read, targets, last_segment = [], Counter(), None
        for index in range(len(rows)):
            row = rows[index]
            assert row.sample_id == index
            assert [t.dtype for t in (row.input_ids, row.labels, row.segment_ids)] == [
                torch.int64
            ] * 3
            assert [len(t) for t in (row.input_ids, row.labels, row.segment_ids)] == [seq_len] * 3
            segments = row.segment_ids.tolist()
            real = [s for s in segments if s]
            assert segments == real + [0] * (seq_len - len(real))
            assert len(real) == seq_len or index == len(rows) - 1
            assert real[0] == 1
            assert all(b - a in (0, 1) for a, b in itertools.pairwise(real))
            for position, segment in enumerate(segments):
                token, label = int(row.input_ids[position]), int(row.labels[position])
                if segment == 0:
                    assert (token, label) == (PAD, IGNORE_INDEX)
                    continue
                # A segment ends after an end token and nowhere else inside a row.
                if position and segment != segments[position - 1]:
                    assert last_segment == EOS
                elif position:
                    assert last_segment != EOS
                last_segment = token
                read.append(token)
                if label != IGNORE_INDEX:
                    targets[token, label] += 1
        stream = [t for d in documents for t in [*d, EOS]]
        assert read == stream
        # Every pair of neighbours inside a document is a target exactly once, none across
        # documents.
        expected = Counter()
        for document in documents:
            closed = [*document, EOS]
            expected.update(itertools.pairwise(closed))
        assert targets == expected
        assert rows.num_targets == sum(expected.values())
        assert rows.num_tokens == len(stream)
        assert rows.efficiency == len(stream) / (len(rows) * seq_len)
        assert len(rows) == math.ceil(len(stream) / seq_len)
        assert [d.tolist() for d in rows.documents()] == [[*d, EOS] for d in documents]


def test_a_cut_document_goes_on_as_a_new_segment():
    rows = packed([[5, 6, 7, 8], [9]], 3)
    assert [r.input_ids.tolist() for r in (rows[0], rows[1], rows[2])] == [
        [5, 6, 7],
        [8, EOS, 9],
        [EOS, PAD, PAD],
    ]
    assert [r.labels.tolist() for r in (rows[0], rows[1], rows[2])] == [
        [6, 7, 8],
        [EOS, IGNORE_INDEX, EOS],
        [IGNORE_INDEX] * 3,
    ]
    assert [r.segment_ids.tolist() for r in (rows[0], rows[1], rows[2])] == [
        [1, 1, 1],
        [1, 1, 2],
        [1, 0, 0],
    ]


def test_end_tokens_inside_a_document_do_not_split_it():
    """Boundaries come from lengths, never from token values."""
    row = packed([[5, EOS, 6], [7]], 8)[0]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 2, 2, 0, 0]
    assert row.labels.tolist() == [EOS, 6, EOS, IGNORE_INDEX, EOS] + [IGNORE_INDEX] * 3


def test_pad_equal_to_eos_changes_no_mask():
    same = PackedDataset([[5, 6]], 5, eos_id=EOS, pad_id=EOS)[0]
    other = PackedDataset([[5, 6]], 5, eos_id=EOS, pad_id=PAD)[0]
    assert torch.equal(same.labels, other.labels)
    assert torch.equal(same.segment_ids, other.segment_ids)


def test_bits_per_byte():
    # 3 tokens with their end over 8 bytes at ln 4 nats: 3 x 2 bits / 8.
    rows = packed([[5, 6]], 4, num_bytes=8)
    assert rows.bits_per_byte(math.log(4)) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="num_bytes"):
        packed([[5, 6]], 4).bits_per_byte(1.0)


def test_rows_are_lazy_and_compact():
    rows = packed([np.full(1_000_000, 7)], 128)
    assert rows._tokens.dtype == np.int32
    assert len(rows) == 7813
    assert rows[7812].segment_ids.sum() == 1_000_001 - 7812 * 128
    with pytest.raises(IndexError, match="7813"):
        rows[7813]


def test_nothing_to_pack_is_refused():
    with pytest.raises(DataError, match="every document is empty"):
        packed([[], []], 4)
    with pytest.raises(DataError, match=r"train\.seq_len=0"):
        packed([[1]], 0)

"""GLM's blank infilling: the worked case of its layout, the lengths' distribution, and that spans can be put back."""

import math
from collections import Counter

import numpy as np
import pytest
from patched import with_bug

from distllm.data import vocabulary as names
from distllm.objectives import blank as blank_module
from distllm.objectives.blank import MAX_SPAN, Blank
from distllm.objectives.noise import generator
from distllm.types import IGNORE_INDEX

X = np.arange(10, 18)
NO = IGNORE_INDEX


class Bare:
    """A vocabulary that adds nothing around a text."""

    def __init__(self, vocabulary):
        self.opening, self.closing, self.mask_id = [], [], vocabulary.mask_id
        self.id_of, self.sentence_starts = vocabulary.id_of, vocabulary.sentence_starts


def bare(objective):
    objective.vocabulary = Bare(objective.vocabulary)
    return objective


def worked_cases(objective):
    """Lay out two cases worked by hand; return (got, expected)."""
    objective = bare(objective)
    mask = objective.vocabulary.mask_id
    sop, eop = map(objective.vocabulary.id_of, (names.START_OF_PIECE, names.END_OF_PIECE))
    first = objective.lay_out(X, np.array([[2, 3], [4, 6]]), mask, order=[1, 0])
    second = objective.lay_out(X, np.array([[1, 3], [5, 6]]), mask, order=[0, 1])
    got = [[column.tolist() for column in piece] for piece in (first, second)]
    return got, [
        [
            [10, 11, mask, 13, mask, 16, 17, sop, 14, 15, sop, 12],
            [0, 1, 2, 3, 4, 5, 6, 4, 4, 4, 2, 2],
            [*[0] * 7, 1, 2, 3, 1, 2],
            [*[NO] * 7, 14, 15, eop, 12, eop],
        ],
        [
            [10, mask, 13, 14, mask, 16, 17, sop, 11, 12, sop, 15],
            [0, 1, 2, 3, 4, 5, 6, 1, 1, 1, 4, 4],
            [*[0] * 7, 1, 2, 3, 1, 2],
            [*[NO] * 7, 11, 12, eop, 15, eop],
        ],
    ]


def test_the_worked_cases(build):
    got, expected = worked_cases(build(Blank))
    assert got == expected


@pytest.mark.parametrize(
    "old, new",
    [
        ("range(1, len(hidden) + 2)", "range(len(hidden) + 1)"),
        ("[places[index]] * (len(hidden) + 1)", "[int(spans[index][0])] * (len(hidden) + 1)"),
        ("[*hidden, eop]", "[sop, *hidden]"),
        ("for index in order:", "for index in sorted(order):"),
    ],
    ids=["in_span from 0", "place in the whole text", "labels not shifted", "not shuffled"],
)
def test_the_worked_cases_would_notice(build, old, new):
    got, expected = worked_cases(build(with_bug(blank_module, old, new).Blank))
    assert got != expected


def test_lengths_are_poisson_without_zero(build):
    objective = build(Blank)
    # A huge text, so that the draw that is cut off by reaching the rate hardly matters.
    lengths = np.concatenate([objective._draw_lengths(20000, generator(i)) for i in range(20)])
    weights = np.array([3.0**n / math.factorial(n) for n in range(1, MAX_SPAN)])
    expected = weights / weights.sum() * len(lengths)
    counts = np.bincount(lengths, minlength=MAX_SPAN)[1:MAX_SPAN]
    tail = 10  # lengths from here on are rare: one class
    found = np.append(counts[:tail], counts[tail:].sum())
    want = np.append(expected[:tail], expected[tail:].sum())
    assert ((found - want) ** 2 / want).sum() < 29.6  # 0.1%, 10 degrees of freedom
    assert abs(lengths.mean() - 3 / (1 - math.exp(-3))) < 0.05


def test_at_least_15_percent_in_spans_that_do_not_touch(build):
    objective = bare(build(Blank))
    for length in [2, 3, 5, 9, 30, 400]:
        ids = np.arange(20, 20 + length)
        for visit in range(30):
            rng = generator(length, visit)
            spans = objective._token_spans(ids, rng)
            assert (spans[:, 1] > spans[:, 0]).all() and spans[0, 0] >= 0
            assert spans[-1, 1] <= length and (spans[1:, 0] > spans[:-1, 1]).all()
            hidden = int((spans[:, 1] - spans[:, 0]).sum())
            assert hidden < length
            if length >= 30:
                assert int(0.15 * length) <= hidden < int(0.15 * length) + MAX_SPAN
            piece = objective.corrupt(ids, generator(length, visit, 1))
            assert len(piece.ids) <= objective.sizes(length)[0]


def test_the_text_comes_back_and_the_order_is_shuffled(build, tok):
    objective = build(Blank, sentence_share=0.3, document_share=0.2)
    vocabulary = objective.vocabulary
    text = "One fox jumps over. Is it the lazy dog? Twelve boxers hunt! A user asks. Good. "
    ids = np.array(tok((text * 3).strip(), add_special_tokens=False)["input_ids"])
    kinds = Counter()
    shuffled = 0
    for visit in range(400):
        piece = objective.corrupt(ids, generator(visit))
        split = int((piece.in_span == 0).sum())
        assert (piece.in_span[:split] == 0).all() and (piece.labels[:split] == NO).all()
        starts = np.flatnonzero(piece.in_span == 1)
        order, spans = [], {}
        for start, stop in zip(starts, [*starts[1:], len(piece.ids)], strict=True):
            (place,) = set(piece.places[start:stop].tolist())
            spans[place] = piece.ids[start + 1 : stop].tolist()
            order.append(place)
        masks = {int(piece.ids[p]) for p in spans}
        assert len(masks) == 1
        kind = masks.pop()
        kinds[kind] += 1
        shuffled += order != sorted(order)
        read = []
        for place, token in enumerate(piece.ids[:split].tolist()):
            read += spans.get(place, [token])
        assert read == [*vocabulary.opening, *ids.tolist(), *vocabulary.closing]
        hidden = sum(map(len, spans.values()))
        if kind == vocabulary.id_of(names.DOCUMENT_MASK):
            assert 0.5 * len(ids) - 1 <= hidden <= len(ids) and len(spans) == 1
        if kind == vocabulary.id_of(names.SENTENCE_MASK):
            assert hidden >= 0.15 * len(ids)
            for span in spans.values():
                assert tok.decode(span).strip()[-1] in ".!?"
    assert shuffled > 200
    want = {names.MASK: 200, names.SENTENCE_MASK: 120, names.DOCUMENT_MASK: 80}
    for name, count in want.items():
        share = count / 400
        assert abs(kinds[vocabulary.id_of(name)] - count) < 4 * math.sqrt(400 * share * (1 - share))


def test_a_batch_has_two_rows_of_positions(build):
    objective = build(Blank, seq_len=96)
    documents = [generator(i).integers(6, 260, 4 + 15 * i).tolist() for i in range(9)]
    rows = objective.dataset(documents)
    batch = objective.collate([rows[i] for i in range(len(rows))])
    assert batch.position_ids.shape == (len(rows), 2, 96)
    labelled = batch.labels != IGNORE_INDEX
    assert bool((labelled == (batch.position_ids[:, 1] > 0)).all())
    assert int(batch.segment_ids.max()) > 1
    assert bool((batch.position_ids[:, 0][:, 0] == 0).all())
    assert min(rows.efficiency) > 0.8

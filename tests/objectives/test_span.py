"""T5's and UL2's corruptions against the papers' numbers, and against putting the spans back."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from patched import with_bug

from distllm.data.chunks import RawRow
from distllm.errors import ConfigError
from distllm.objectives import span as span_module
from distllm.objectives.noise import generator, random_segmentation
from distllm.objectives.span import Span, noise_counts
from distllm.objectives.ul2 import DENOISERS, UL2
from distllm.types import IGNORE_INDEX


def restore(inputs, targets, sentinels, closing):
    """Put the spans of a target where the input has their sentinels."""
    rank = {s: i for i, s in enumerate(sentinels)}
    assert inputs[-1:] == closing and targets[-1:] == closing
    spans, order = {}, []
    for token in targets[:-1]:
        if token in rank:
            order.append(rank[token])
            spans[token] = []
        else:
            spans[order and sentinels[order[-1]]].append(token)
    assert order == list(range(len(order)))
    text = []
    for token in inputs[:-1]:
        text += spans.pop(token) if token in rank else [token]
    assert not spans
    return text


def test_t5_counts_568_tokens_as_512_and_114(build):
    assert noise_counts(568, 0.15, 3.0) == (85, 28)
    objective = build(Span)
    assert objective.sizes(568) == (512, 114) and objective.sizes(569)[0] == 513
    assert objective.limits()[0] == 512 and 114 <= objective.limits()[1] <= 144
    ids = np.arange(6, 300).repeat(2)[:568]
    inputs, targets = objective.corrupt(ids, generator(0))
    assert (len(inputs), len(targets)) == (512, 114)
    vocabulary = objective.vocabulary
    assert [t for t in inputs.tolist() if t in vocabulary.sentinels] == vocabulary.sentinels[:28]
    assert inputs[0] == 6  # the text comes first
    assert targets[0] == vocabulary.sentinels[0] == vocabulary.size - 1


@pytest.mark.parametrize("cls", [Span, UL2])
def test_the_text_comes_back(build, cls):
    objective = build(cls)
    closing, sentinels = objective.vocabulary.closing, objective.vocabulary.sentinels
    for length in [2, 3, 4, 7, 20, 100, 280]:
        ids = generator(length).integers(6, 300, length)
        for visit in range(8):
            inputs, targets = objective.corrupt(ids, generator(visit))
            room = objective.sizes(length)
            assert len(inputs) <= room[0] and len(targets) <= room[1]
            text = inputs.tolist()
            if cls is UL2:
                mode, *text = text
                assert mode in {objective.vocabulary.id_of(d.mode) for d in DENOISERS}
            assert restore(text, targets.tolist(), sentinels, closing) == ids.tolist()


def test_every_way_of_cutting_is_equally_likely():
    """Six items in three parts: C(5, 2) = 10 ways."""
    rng, draws = generator(0), 6000
    counts = Counter(tuple(random_segmentation(rng, 6, 3).tolist()) for _ in range(draws))
    ways = [w for w in itertools.product(range(1, 5), repeat=3) if sum(w) == 6]
    assert set(counts) == set(ways) and len(ways) == 10
    chi2 = sum((counts[w] - draws / 10) ** 2 / (draws / 10) for w in ways)
    assert chi2 < 27.9  # 0.1% of fair draws exceed it with 9 degrees of freedom


def test_ul2_mixes_seven_denoisers_with_their_rates(build):
    """Each is told apart by its mode and the number and share of hidden tokens at one length."""
    objective = build(UL2)
    length, draws = 256, 4200
    ids = np.arange(6, 6 + length)
    sentinels = set(objective.vocabulary.sentinels)
    kinds = Counter()
    for visit in range(draws):
        inputs, targets = objective.corrupt(ids, generator(5, visit))
        hidden = [t for t in targets[:-1].tolist() if t not in sentinels]
        spans = len(targets) - 1 - len(hidden)
        kinds[int(inputs[0]), len(hidden), spans] += 1
        if (len(hidden), spans) == (64, 1) and inputs[0] == objective.vocabulary.id_of("[S2S]"):
            assert hidden == ids[-64:].tolist()
    expected = {}
    for denoiser in DENOISERS:
        noise = round(denoiser.rate * length)
        spans = max(1, round(noise / denoiser.mean_length)) if denoiser.mean_length else 1
        key = (objective.vocabulary.id_of(denoiser.mode), noise, spans)
        expected[key] = expected.get(key, 0) + draws / len(DENOISERS)
    assert set(kinds) == set(expected) and len(expected) == 7
    chi2 = sum((kinds[k] - n) ** 2 / n for k, n in expected.items())
    assert chi2 < 22.5  # 0.1%, 6 degrees of freedom
    assert {(d.mean_length, d.rate) for d in DENOISERS if d.mode == "[NLG]"} == {
        (3, 0.5), (8, 0.5), (64, 0.15), (64, 0.5)
    }  # fmt: skip


def test_both_sides_of_a_batch_belong_together(build):
    objective = build(Span, seq_len=64)
    documents = [generator(i).integers(6, 300, 5 + 17 * i).tolist() for i in range(12)]
    rows = objective.dataset(documents)
    batch = objective.collate([rows[i] for i in range(len(rows))])
    vocabulary = objective.vocabulary
    read = []
    for r in range(len(rows)):
        segments = batch.decoder_segment_ids[r]
        assert set(segments.tolist()) - {0} == set(batch.segment_ids[r].tolist()) - {0}
        for number in range(1, int(segments.max()) + 1):
            source = batch.input_ids[r][batch.segment_ids[r] == number].tolist()
            target = batch.labels[r][segments == number].tolist()
            given = batch.decoder_input_ids[r][segments == number].tolist()
            assert given == [0, *target[:-1]]
            read += restore(source, target, vocabulary.sentinels, vocabulary.closing)
    assert read == [t for d in documents for t in d]
    assert bool(((batch.labels == IGNORE_INDEX) == (batch.decoder_segment_ids == 0)).all())
    assert objective.weights(batch)["lm"] == (batch.decoder_segment_ids != 0).sum()


def test_an_architecture_without_a_decoder_beside_is_refused(build):
    from types import SimpleNamespace

    objective = build(Span)
    objective.model = SimpleNamespace(options=SimpleNamespace(name="decoder"))
    with pytest.raises(ConfigError, match=r"arch=decoder .* Set arch="):
        objective.collate([RawRow([np.arange(6, 20)], 0)])


def test_the_counting_would_notice_other_rates(build):
    wrong = with_bug(
        span_module, "spans = max(round(noise / mean_length), 1)", "spans = noise // 4"
    )
    assert wrong.noise_counts(568, 0.15, 3.0) != (85, 28)
    assert math.isclose(85 / 568, 0.15, abs_tol=1e-3)

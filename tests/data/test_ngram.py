"""Kneser-Ney against a brute-force reading of the paper's equations, against sums to one, and
against the literature."""

import math
import random
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from distllm.data.ngram import KneserNey, baselines, unigram_entropy

EOS = 0
WIKITEXT = Path(__file__).parents[2].parent / "shared" / "data" / "wikitext2"


class BruteForce:
    """Interpolated modified Kneser-Ney over tuples and dictionaries, straight from Chen and
    Goodman's definitions."""

    def __init__(self, documents, order, vocab_size):
        self.order, self.vocab_size = order, vocab_size
        raw = defaultdict(Counter)
        for document in documents:
            text = [EOS, *document, EOS]
            for end in range(1, len(text)):
                for length in range(1, min(end + 1, order) + 1):
                    raw[length][tuple(text[end - length + 1 : end + 1])] += 1
        self.counts = {order: raw[order]}
        for length in range(1, order):
            before = defaultdict(set)
            for gram in raw[length + 1]:
                before[gram[1:]].add(gram[0])
            # An n-gram that only opens documents has nothing before it and keeps its raw count.
            self.counts[length] = Counter(
                {g: len(before[g]) if g in before else n for g, n in raw[length].items()}
            )
        self.discounts = {}
        for length, counts in self.counts.items():
            n = Counter(counts.values())
            if all(n[k] for k in (1, 2, 3, 4)):
                y = n[1] / (n[1] + 2 * n[2])
                found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
                self.discounts[length] = [min(max(d, 0), k) for k, d in enumerate(found, 1)]
            else:
                self.discounts[length] = [0.5, 1.0, 1.5]

    def probability(self, word, context):
        lower = 1 / self.vocab_size if not context else self.probability(word, context[1:])
        length = len(context) + 1
        following = {g[-1]: n for g, n in self.counts[length].items() if g[:-1] == context}
        total = sum(following.values())
        if not total:
            return lower
        d = self.discounts[length]
        count = following.get(word, 0)
        kept = count - d[min(count, 3) - 1] if count else 0
        freed = sum(d[min(n, 3) - 1] for n in following.values())
        return kept / total + freed / total * lower

    def logprobs(self, document, first):
        text = [EOS, *document, EOS]
        return [
            math.log(self.probability(text[i], tuple(text[max(0, i - self.order + 1) : i])))
            for i in range(first, len(text))
        ]


def random_documents(rng, num_documents, vocab_size):
    """Markov-like text, so that all counts of counts exist."""
    documents = []
    for _ in range(num_documents):
        tokens = [rng.randrange(1, vocab_size)]
        while rng.random() < 0.9:
            step = rng.choices([1, 2, 3], [8, 3, 1])[0]
            tokens.append(1 + (tokens[-1] * step) % (vocab_size - 1))
        documents.append(tokens)
    return documents


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_equals_brute_force(order):
    rng = random.Random(order)
    vocab_size = 12
    train = random_documents(rng, 60, vocab_size)
    heldout = random_documents(rng, 10, vocab_size)
    model = KneserNey(5).fit(train, vocab_size, EOS)
    oracle = BruteForce(train, order, vocab_size)
    for score_first in (False, True):
        ours = model.logprobs(heldout, score_first=score_first)[order]
        theirs = [p for d in heldout for p in oracle.logprobs(d, 1 if score_first else 2)]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_orders_share_counts_without_mixing():
    """A model of order 3 alone and the order-3 part of one of order 5 are the same model."""
    rng = random.Random(7)
    train, heldout = random_documents(rng, 50, 10), random_documents(rng, 5, 10)
    three, five = (KneserNey(n).fit(train, 10, EOS).logprobs(heldout) for n in (3, 5))
    np.testing.assert_array_equal(three[3], five[3])
    assert KneserNey(3).fit(train, 10, EOS).nats_per_token(heldout) == -three[3].mean()


def test_documents_do_not_see_each_other_even_if_they_hold_end_tokens():
    train = [[1, EOS, EOS, 2, 3], [2, EOS, EOS, 2, 3], [3, 1, 2]] * 5
    heldout = [[2, 3], [2, 3, 1], [1, 2]]
    model = KneserNey(5).fit(train, 4, EOS)
    together = model.logprobs(heldout, score_first=True)
    for order in range(1, 6):
        alone = [model.logprobs([d], score_first=True)[order] for d in heldout]
        np.testing.assert_array_equal(together[order], np.concatenate(alone))


@pytest.mark.parametrize("num_documents", [1, 3, 80])
def test_probabilities_sum_to_one(num_documents):
    rng = random.Random(num_documents)
    vocab_size = 9
    model = KneserNey(4).fit(random_documents(rng, num_documents, vocab_size), vocab_size, EOS)
    for context in ([3], [1, 2], [8, 8, 8, 8], random_documents(rng, 1, vocab_size)[0]):
        total = np.zeros(5)
        for word in range(vocab_size):
            document = context if word == EOS else [*context, word]
            logprobs = model.logprobs([document], score_first=True)
            for order in range(1, 5):
                total[order] += math.exp(logprobs[order][len(context)])
        np.testing.assert_allclose(total[1:], 1.0, rtol=1e-12)


def test_higher_orders_help_where_context_does():
    rng = random.Random(1)
    train, heldout = random_documents(rng, 300, 30), random_documents(rng, 30, 30)
    found = baselines(train, heldout, 30, EOS)
    assert list(found) == ["unigram", *(f"kneser_ney_{n}" for n in (2, 3, 4, 5))]
    assert found["kneser_ney_2"] < 0.7 * found["unigram"]


def test_unigram_by_hand():
    # 1, 1, 2, end, with one added to each of 4 ids: 1/8, 3/8, 2/8 ... of 8; held out: 2 then the
    # end.
    nats = unigram_entropy([[1, 1, 2]], [[1, 2]], 4, EOS)
    assert nats == pytest.approx(-(math.log(2 / 8) + math.log(2 / 8)) / 2)
    first = unigram_entropy([[1, 1, 2]], [[1, 2]], 4, EOS, score_first=True)
    assert first == pytest.approx(-(math.log(3 / 8) + 2 * math.log(2 / 8)) / 3)


@pytest.mark.slow
@pytest.mark.skipif(not WIKITEXT.is_dir(), reason=f"{WIKITEXT} is not there")
def test_wikitext2_perplexity_equals_the_literature():
    words: dict[str, int] = {"<eos>": EOS}

    def read(name):
        lines = (WIKITEXT / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        stream = [w for line in lines for w in [*line.split(), "<eos>"]]
        return [
            [words.setdefault(w, len(words)) for w in stream[:-1]]
        ]  # its last end closes the document

    train, valid, test = read("train"), read("valid"), read("test")
    assert (len(words), len(valid[0]) + 1, len(test[0]) + 1) == (33278, 217646, 245569)
    model = KneserNey(5).fit(train, len(words), EOS)
    for documents, expected in (
        (valid, [284.7, 240.7, 233.9, 232.5]),
        (test, [264.0, 224.4, 219.1, 217.8]),
    ):
        logprobs = model.logprobs(documents, score_first=True)
        perplexities = [math.exp(-logprobs[n].mean()) for n in (2, 3, 4, 5)]
        assert perplexities == pytest.approx(expected, abs=0.06)

"""Statistical language models to compare with: unigram, and modified Kneser-Ney n-grams.

Every document is read as `end, tokens..., end`: the end token opens it as context and closes it as
a target. As in packed rows, a document's first token is not scored unless asked for. Counting is
sorting: each position of the text gets the number of the n-gram that ends there, so all orders come
out of one pass and share their work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Documents = Sequence[Sequence[int] | np.ndarray]
"""Token ids of each document, without end tokens."""


def unigram_entropy(
    train: Documents, heldout: Documents, vocab_size: int, eos_id: int, *, score_first: bool = False
) -> float:
    """Return the nats per held-out token of the training frequencies, one added to every count."""
    tokens, depth = _lay_out(train, eos_id)
    counts = np.bincount(tokens[depth > 0], minlength=vocab_size) + 1.0
    tokens, depth = _lay_out(heldout, eos_id)
    targets = tokens[depth >= (1 if score_first else 2)]
    return float(-np.log(counts / counts.sum())[targets].mean())


def baselines(
    train: Documents, heldout: Documents, vocab_size: int, eos_id: int, max_order: int = 5
) -> dict[str, float]:
    """Return nats per held-out token of `unigram`, `kneser_ney_2`, ... `kneser_ney_<max_order>`."""
    found = {"unigram": unigram_entropy(train, heldout, vocab_size, eos_id)}
    model = KneserNey(max_order).fit(train, vocab_size, eos_id)
    for order, logprobs in model.logprobs(heldout).items():
        if order > 1:
            found[f"kneser_ney_{order}"] = -float(logprobs.mean())
    return found


@dataclass(slots=True)
class _Level:
    """The n-grams of one length. An n-gram's number is its rank among `keys`."""

    keys: np.ndarray
    """[n-grams] int64, sorted: number of the context's (n-1)-gram x vocab_size + last token."""
    raw: np.ndarray
    """[n-grams] how often each occurs."""
    continuation: np.ndarray
    """[n-grams] how many different tokens precede each; where nothing can, the raw count."""


class KneserNey:
    """Interpolated modified Kneser-Ney models of every order up to `order`.

    p_k(w | context) = max(c - D(c), 0) / total + gamma(context) p_{k-1}(w | shorter context), down
    to the uniform distribution. c is the raw count at the highest level of a model and the
    continuation count below it. A context never seen hands over to the shorter one.

    Reference: Chen and Goodman 1998, TR-10-98, equations 24-26 (D1, D2, D3+ from n1..n4).
        Departure: where one of n1..n4 is zero (tiny corpora), the discounts of that level are 0.5,
        1 and 1.5.
    """

    def __init__(self, order: int) -> None:
        if order < 1:
            raise ValueError(f"order={order} must be at least 1")
        self.order = order
        self.vocab_size = 0
        self.eos_id = -1
        self._levels: list[_Level] = []

    def fit(self, documents: Documents, vocab_size: int, eos_id: int) -> KneserNey:
        """Count the n-grams of `documents`, whose ids are below `vocab_size`."""
        self.vocab_size, self.eos_id = vocab_size, eos_id
        tokens, depth = _lay_out(documents, eos_id)
        raw = np.bincount(tokens[depth > 0], minlength=vocab_size)
        self._levels = [_Level(np.arange(vocab_size), raw, raw)]
        # Number of the n-gram that ends at each position; -1 where it would precede the opening.
        numbers = tokens
        for length in range(2, self.order + 1):
            real = np.flatnonzero(depth >= length - 1)
            keys, first, inverse, counts = np.unique(
                numbers[real - 1] * vocab_size + tokens[real],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            below = self._levels[-1]
            preceded = np.bincount(numbers[real][first], minlength=len(below.keys))
            below.continuation = np.where(preceded > 0, preceded, below.raw)
            self._levels.append(_Level(keys, counts, counts))
            numbers = np.full(len(tokens), -1)
            numbers[real] = inverse
        return self

    def logprobs(self, documents: Documents, *, score_first: bool = False) -> dict[int, np.ndarray]:
        """Return, for the model of each order 1..`order`, the log-probability of every target.

        Targets stand in the documents' order: tokens after the first (or all, with `score_first`),
        then the end.
        """
        tokens, depth = _lay_out(documents, self.eos_id)
        targets = np.flatnonzero(depth >= (1 if score_first else 2))
        lower = np.full(len(tokens), 1.0 / self.vocab_size)
        numbers = tokens
        contexts = np.zeros(
            len(tokens), dtype=np.int64
        )  # before the first token: the one empty context
        found = {}
        for length, level in enumerate(self._levels, start=1):
            if length > 1:
                contexts = np.roll(numbers, 1)
                contexts[depth < length - 1] = -1
                numbers = _look_up(level.keys, contexts, tokens, self.vocab_size)
            found[length] = np.log(
                self._interpolate(length, level.raw, contexts, numbers, lower)[targets]
            )
            if length < self.order:
                lower = self._interpolate(length, level.continuation, contexts, numbers, lower)
        return found

    def nats_per_token(self, documents: Documents, *, score_first: bool = False) -> float:
        """Return the mean cost of the targets under the model of the highest order."""
        return -float(self.logprobs(documents, score_first=score_first)[self.order].mean())

    def _interpolate(
        self,
        length: int,
        counts: np.ndarray,
        contexts: np.ndarray,
        numbers: np.ndarray,
        lower: np.ndarray,
    ) -> np.ndarray:
        """Mix one level's discounted counts with the probabilities of the level below.

        Args:
            counts: [n-grams] raw or continuation counts of the level.
            contexts: [positions] number of the context's n-gram, -1 if never seen.
            numbers: [positions] number of the whole n-gram, -1 if never seen.
            lower: [positions] probabilities of the level below.
        """
        level = self._levels[length - 1]
        discounts = np.array([0.0, *_discounts(counts)])
        if length == 1:
            owners, num_contexts = np.zeros(len(counts), dtype=np.int64), 1
        else:
            owners = level.keys // self.vocab_size
            num_contexts = len(self._levels[length - 2].keys)
        taken = discounts[np.minimum(counts, 3)]
        totals = np.bincount(owners, weights=counts, minlength=num_contexts)
        freed = np.bincount(owners, weights=taken, minlength=num_contexts)
        known = contexts >= 0
        known[known] = totals[contexts[known]] > 0
        total = totals[contexts[known]]
        number = numbers[known]
        share = np.where(number >= 0, (counts - taken)[number], 0.0) / total
        mixed = lower.copy()
        mixed[known] = share + freed[contexts[known]] / total * lower[known]
        return mixed


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Return D1, D2 and D3+ of one level."""
    n1, n2, n3, n4 = (int((counts == n).sum()) for n in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return 0.5, 1.0, 1.5
    y = n1 / (n1 + 2 * n2)
    found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    low, middle, high = (min(max(d, 0.0), float(n)) for n, d in enumerate(found, start=1))
    return low, middle, high


def _look_up(
    keys: np.ndarray, contexts: np.ndarray, tokens: np.ndarray, vocab_size: int
) -> np.ndarray:
    """Return the rank of each n-gram among `keys`, -1 where it or its context is unknown."""
    wanted = np.where(contexts >= 0, contexts * vocab_size + tokens, -1)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, places, -1)


def _lay_out(documents: Documents, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all documents as one stream `end, tokens, end, end, tokens, end, ...` and each token's
    place in its own.

    Returns:
        tokens and depth, both [positions] int64; depth 0 is the opening, which is context only.
    """
    pieces = [np.concatenate([[eos_id], d, [eos_id]]).astype(np.int64) for d in documents if len(d)]
    return np.concatenate(pieces), np.concatenate([np.arange(len(p)) for p in pieces])

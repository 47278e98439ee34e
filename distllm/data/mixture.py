"""Mixtures: records of several parts in one list, and the order in which samples of weighted parts come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from distllm.data.sampler import Sampler
from distllm.errors import DataError


@dataclass(frozen=True, slots=True)
class Share:
    """A stretch of samples that belong together, and their weight among the other stretches."""

    size: int
    weight: float


class Records(list):
    """A list of records that knows its parts; an unweighted one has none."""

    shares: tuple[Share, ...] = ()

    @classmethod
    def join(cls, parts: Iterable[tuple[Sequence[Any], float]]) -> Records:
        """Lay parts end to end."""
        parts = list(parts)
        found = cls(record for part, _ in parts for record in part)
        if any(weight for _, weight in parts):
            found.shares = tuple(Share(len(part), weight) for part, weight in parts)
        return found

    def spread(self, change: Callable[[Any], Sequence[Any]]) -> Records:
        """Replace each record by what `change` makes of it, in the same part."""
        made = [change(record) for record in self]
        found = Records(new for several in made for new in several)
        found.shares = recount(self.shares, [len(several) for several in made])
        return found


def recount(shares: Sequence[Share], counts: Sequence[int]) -> tuple[Share, ...]:
    """Return the shares after sample i has become `counts[i]` samples."""
    found, at = [], 0
    for share in shares:
        found.append(Share(sum(counts[at : at + share.size]), share.weight))
        at += share.size
    return tuple(found)


class Joined:
    """Rows of several packed data sets, one after the other."""

    def __init__(self, parts: Sequence[tuple[Any, float]]) -> None:
        self.parts = [part for part, _ in parts]
        shares = tuple(Share(len(part), weight) for part, weight in parts)
        self.shares = shares if any(weight for _, weight in parts) else ()
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        return replace(self.parts[part][index - first], sample_id=index)

    def draw(self, index: int, visit: int) -> Any:
        """Return row `index`, marked with what tells this time from others, where the parts have a use for it."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part - 1]) if part else 0
        found = self.parts[part]
        if not hasattr(found, "draw"):
            return self[index]
        return replace(found.draw(index - first, visit), sample_id=index)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Turn a mean loss over the labels into bits per byte of text, as `PackedDataset` does."""
        tokens = sum(part.num_tokens for part in self.parts)
        return nats_per_token * tokens / (sum(part.num_bytes for part in self.parts) * math.log(2))

    def documents(self) -> list[np.ndarray]:
        """Return each document's ids, its end token included."""
        return [document for part in self.parts for document in part.documents()]


class MixedSampler(Sampler):
    """Order samples so that each part has its share of every epoch.

    An epoch has as many positions as there are samples, of which a part gets its weight's share
    (rounded; the rest goes to the largest remainders). Each part goes through its own samples in
    permutations of its own that go on from epoch to epoch, so that none is seen twice before all
    have been seen. A pure function of (seed, position), as every sampler.
    """

    def __init__(self, shares: Sequence[Share], seed: int, shuffle: bool = True) -> None:
        super().__init__(sum(share.size for share in shares), seed, shuffle)
        empty = [n for n, share in enumerate(shares) if not share.size]
        if empty:
            raise DataError(f"data.mix[{empty[0]}] holds no sample for training.")
        total = sum(share.weight for share in shares)
        exact = [self.num_samples * share.weight / total for share in shares]
        counts = [int(x) for x in exact]
        by_remainder = sorted(range(len(shares)), key=lambda n: counts[n] - exact[n])
        for n in by_remainder[: self.num_samples - sum(counts)]:
            counts[n] += 1
        self.counts = counts
        """Samples of each part in an epoch."""
        self._firsts = np.cumsum([0, *(share.size for share in shares)])
        self._parts = [Sampler(share.size, seed + 1 + n, shuffle) for n, share in enumerate(shares)]
        self._mixed = (-1, np.empty(0, dtype=np.int64))

    def indices(self, start: int, count: int) -> list[int]:
        """Return the samples at positions start .. start + count - 1 (a pure function of both)."""
        if start < 0 or count < 0:
            raise ValueError(f"start={start} and count={count} must not be negative")
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), self.num_samples)
            found += self._epoch_order(epoch)[offset : offset + count - len(found)].tolist()
        return found

    def _epoch_order(self, epoch: int) -> np.ndarray:
        known, order = self._mixed
        if known != epoch:
            taken = [
                first + np.asarray(part.indices(epoch * count, count), dtype=np.int64)
                for first, part, count in zip(self._firsts, self._parts, self.counts, strict=False)
            ]
            order = np.concatenate(taken)
            if self.shuffle:
                order = order[self._permutation(epoch)]
            self._mixed = epoch, order
        return order


def make_sampler(dataset: Any, seed: int, shuffle: bool = True) -> Sampler:
    """Return the sampler that a data set needs: a mixed one where it has weighted `shares`."""
    shares = getattr(dataset, "shares", ())
    return MixedSampler(shares, seed, shuffle) if shares else Sampler(len(dataset), seed, shuffle)

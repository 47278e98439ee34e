"""Which sample comes at which position of a run; the position itself is kept by the loop."""

from typing import Protocol, TypeVar

import numpy as np

from distllm.errors import DataError

T_co = TypeVar("T_co", covariant=True)


class Samples(Protocol[T_co]):
    """Data by number: a list, or what encodes or reads a sample when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


class Sampler:
    """Order samples into endless epochs, each a permutation that (seed, epoch) alone decides.

    Global position p belongs to epoch p // num_samples. All ranks ask for the same positions and
    take their share, so the order does not depend on how many ranks there are, nor on where a run
    was stopped.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool = True) -> None:
        if num_samples < 1:
            raise DataError("The training data holds no sample. Check data.path and the split.")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def indices(self, start: int, count: int) -> list[int]:
        """Return the samples at positions start .. start + count - 1 (a pure function of both)."""
        if start < 0 or count < 0:
            raise ValueError(f"start={start} and count={count} must not be negative")
        if not self.shuffle:
            return [position % self.num_samples for position in range(start, start + count)]
        found: list[int] = []
        while len(found) < count:
            epoch, offset = divmod(start + len(found), self.num_samples)
            order = self._permutation(epoch)
            found += order[offset : offset + count - len(found)].tolist()
        return found

    def _permutation(self, epoch: int) -> np.ndarray:
        """Return epoch's order [num_samples], keeping the latest one.

        Sorting raw generator output: numpy promises that stream, but not the stream of
        `Generator.permutation`.
        """
        if epoch != self._epoch:
            bits = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            self._order = np.argsort(bits.random_raw(self.num_samples), kind="stable")
            self._epoch = epoch
        return self._order

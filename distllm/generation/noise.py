"""Random numbers that depend on what is sampled, not on when or beside what.

The noise of a token is a hash of (seed, prompt index, sample index, position). So a response comes
out the same alone, in any batch, after any other call and on any number of processes, up to the
rounding of the model itself. Python's, numpy's and torch's generators are neither read nor moved.

Reference: Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators" (SplitMix64).
"""

from collections.abc import Sequence

import numpy as np

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's: 2^64 / golden ratio, made odd
_BITS = 40  # of a uniform: finer than float32 probabilities, and u * total < total in float64


def derive_seed(*parts: int) -> int:
    """Hash integers, in order, to one seed: `derive_seed(run_seed, step)` differs for each step."""
    return int(_keys(*(np.asarray([part]) for part in parts))[0] >> np.uint64(1))


def uniforms(
    seed: int, prompt_indices: Sequence[int], sample_indices: Sequence[int], num_positions: int
) -> np.ndarray:
    """Return one number in (0, 1) per row and position, float64 `[rows, num_positions]`.

    Row i is the SplitMix64 stream whose state is the hash of (seed, prompt index, sample index).
    """
    prompts, samples = np.asarray(prompt_indices), np.asarray(sample_indices)
    keys = _keys(np.full(prompts.shape, seed), prompts, samples)
    positions = np.arange(1, num_positions + 1, dtype=np.uint64)
    bits = _mix(keys[:, None] + positions[None, :] * _INCREMENT) >> np.uint64(64 - _BITS)
    return (bits.astype(np.float64) + 0.5) * 2.0**-_BITS


def _keys(*columns: np.ndarray) -> np.ndarray:
    """Hash the rows of integer columns `[rows]` to uint64 `[rows]`; their order matters."""
    keys = np.zeros(columns[0].shape, dtype=np.uint64)
    for column in columns:
        keys = _mix((keys ^ column.astype(np.int64).view(np.uint64)) + _INCREMENT)
    return keys


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: a bijection; each input bit moves half the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

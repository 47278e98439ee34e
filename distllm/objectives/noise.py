"""Random numbers of the corruptions: a function of (seed, sample, visit, piece) alone, so that a resumed run meets the
same corrupted texts, whatever the number of processes."""

import numpy as np


def generator(seed: int, *numbers: int) -> np.random.Generator:
    """Return a generator whose stream depends on the arguments and their order only."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *numbers])))


def pick(rng: np.random.Generator, num_items: int, num_picked: int) -> np.ndarray:
    """Draw `num_picked` of `num_items` places without replacement, sorted."""
    return np.sort(np.argsort(rng.random(num_items), kind="stable")[:num_picked])


def random_segmentation(rng: np.random.Generator, num_items: int, num_segments: int) -> np.ndarray:
    """Cut `num_items` into `num_segments` lengths of at least 1, every way equally likely: [num_segments] int64."""
    cuts = pick(rng, num_items - 1, num_segments - 1) + 1
    return np.diff(cuts, prepend=0, append=num_items)

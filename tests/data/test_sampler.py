"""The sampler: every sample once an epoch over any stops; (seed, position) alone decides."""

import random
from collections import Counter

import pytest

from distllm.data.sampler import Sampler
from distllm.errors import DataError


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_samples", [1, 7, 100])
def test_every_sample_comes_once_an_epoch_over_any_stops(num_samples, shuffle):
    rng = random.Random(0)
    for seed in range(3):
        whole = Sampler(num_samples, seed, shuffle).indices(0, 4 * num_samples)
        for epoch in range(4):
            part = whole[epoch * num_samples : (epoch + 1) * num_samples]
            assert sorted(part) == list(range(num_samples))
        taken, position = [], 0
        while position < len(whole):
            # A new sampler each time, as after a restart; strides larger than an epoch too.
            count = min(rng.randint(0, 2 * num_samples), len(whole) - position)
            taken += Sampler(num_samples, seed, shuffle).indices(position, count)
            position += count
        assert taken == whole


def test_order_depends_on_seed_and_epoch_and_only_when_shuffled():
    first, second = Sampler(50, 1), Sampler(50, 2)
    assert first.indices(0, 50) != second.indices(0, 50)
    assert first.indices(0, 50) != first.indices(50, 50)
    assert Sampler(50, 1, shuffle=False).indices(45, 10) == [45, 46, 47, 48, 49, 0, 1, 2, 3, 4]


def test_order_does_not_depend_on_what_was_asked_before():
    used = Sampler(20, 3)
    used.indices(70, 15)
    used.indices(5, 40)
    assert used.indices(33, 20) == Sampler(20, 3).indices(33, 20)


def test_first_places_are_uniform():
    """Chi-squared over which of 8 samples opens an epoch, 4000 epochs: below the 99.9% quantile for
    7 degrees."""
    sampler = Sampler(8, 11)
    counts = Counter(sampler.indices(8 * epoch, 1)[0] for epoch in range(4000))
    statistic = sum((counts[i] - 500) ** 2 / 500 for i in range(8))
    assert statistic < 24.3


def test_order_is_stable_across_versions():
    """Written down once: a run resumed with another numpy must go on in the same order."""
    assert Sampler(10, 0).indices(0, 10) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]


def test_no_samples_is_refused():
    with pytest.raises(DataError, match="no sample"):
        Sampler(0, 0)
    with pytest.raises(ValueError, match="start=-1"):
        Sampler(3, 0).indices(-1, 2)

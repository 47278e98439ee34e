"""The random state as tensors: after putting it back, every generator draws the same again."""

import random

import numpy as np
import pytest
import torch

from distllm.errors import CheckpointError
from distllm.train.rng import rng_state, seed_all, set_rng_state


def draw() -> list[object]:
    return [
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.nn.functional.dropout(torch.ones(50)).tolist(),
        [random.random(), random.gauss(0, 1), random.getrandbits(70)],
        [np.random.rand(), np.random.normal(), np.random.permutation(9).tolist()],
    ]


@pytest.mark.parametrize("waiting", [False, True])
def test_draws_repeat(waiting):
    seed_all(5)
    if waiting:  # both keep the second of two normal deviates for the next call
        random.gauss(0, 1), np.random.normal(), torch.randn(1)
    state = rng_state()
    assert state["python.gauss"][0] == state["numpy.gauss"][0] == float(waiting)
    python, numpy = random.getstate(), np.random.get_state()
    first = draw()
    assert draw() != first
    set_rng_state({name: tensor.clone() for name, tensor in state.items()})
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert draw() == first


def test_taking_the_state_draws_nothing():
    seed_all(5)
    first = draw()
    seed_all(5)
    rng_state()
    assert draw() == first


def test_seeds_differ():
    seed_all(5)
    first = draw()
    seed_all(6)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def test_an_incomplete_state_is_refused():
    state = rng_state()
    del state["torch.cpu"]
    with pytest.raises(CheckpointError, match=r"lacks torch\.cpu"):
        set_rng_state(state)

"""The sampler's noise: a known generator, uniform, and a function of its four keys alone."""

import numpy as np
import torch

from distllm.generation.noise import _INCREMENT, _mix, derive_seed, uniforms


def test_stream_is_splitmix64():
    """The published first outputs of SplitMix64 from state 1234567."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * _INCREMENT
    assert _mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_each_key_matters_and_nothing_else():
    prompts, samples = [3, 3, 7, 12], [0, 1, 0, 5]
    whole = uniforms(11, prompts, samples, 20)
    assert whole.shape == (4, 20) and whole.dtype == np.float64
    for row in range(4):
        alone = uniforms(11, [prompts[row]], [samples[row]], 9)
        assert (alone[0] == whole[row, :9]).all()
    everything = [
        uniforms(seed, [prompt], [sample], 20)[0].tolist()
        for seed in (0, 1, -1, 2**63 - 1)
        for prompt in (0, 1, 2, 2**40)
        for sample in (0, 1, 2)
    ]
    assert len({value for row in everything for value in row}) == 4 * 4 * 3 * 20


def test_uniform_and_uncorrelated():
    """Kolmogorov-Smirnov at 1e-6 (critical value 2.7 / sqrt(n)); correlations within 5 sigma."""
    grid = uniforms(5, np.repeat(np.arange(100), 10), np.tile(np.arange(10), 100), 100)
    assert grid.min() > 0 and grid.max() < 1
    ordered = np.sort(grid.ravel())
    n = len(ordered)
    distance = np.abs(ordered - (np.arange(n) + 0.5) / n).max()
    assert distance < 2.7 / n**0.5
    centred = (grid - 0.5) * 12**0.5
    for shifted in (
        centred[1:] * centred[:-1],
        centred[10:] * centred[:-10],
        centred[:, 1:] * centred[:, :-1],
    ):
        assert abs(shifted.mean()) < 5 / shifted.size**0.5


def test_derived_seeds_differ_and_depend_on_order():
    seeds = {derive_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_global_generators_are_left_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    uniforms(1, [0, 1], [0, 0], 8)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()

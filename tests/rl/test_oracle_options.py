"""The options that all algorithms share, on the enumerated world: dual clip, truncated responses, shaped rewards, the KL's
controller, and rewards that are all equal."""

import numpy as np
import pytest
import torch
from checklist import noticed
from oracle import (
    END,
    LENGTH,
    RESPONSES,
    Table,
    World,
    expected_gradient,
    groups,
    make,
    reward,
    rollout_of,
)
from patched import planted

from distllm import registry
from distllm.rl import advantages, shaping, surrogate
from distllm.rl.shaping import shape_rewards

CLOSE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def policy():
    return Table(seed=1)


@pytest.fixture(scope="module")
def world(policy):
    return World(policy)


def is_cut(response):
    return response[-1] != END


def shaped_gradient(policy, world, name="rloo", whole=False, **options):
    """E[gradient], the rewards shaped by the real code from the scores of the world."""
    if name == "rloo":
        options = {"kl_coef": 0.0, **options}
    algorithm, engines = make(name, policy, num_samples=2, **options)
    shape = lambda rollouts: shape_rewards(rollouts, algorithm.options, LENGTH)  # noqa: E731
    return expected_gradient(algorithm, engines, world, whole=whole, shape=shape)


SHAPES = {
    "kept": ({"truncated": "keep"}, reward),
    "penalised": (
        {"truncated": "penalise", "truncated_penalty": 0.5},
        lambda r: reward(r) - 0.5 * is_cut(r),
    ),
    "clipped, then scaled": (
        {"reward_clip": 0.3, "reward_scale": 2.0},
        lambda r: 2.0 * np.clip(reward(r), -0.3, 0.3),
    ),
    "penalised by length": (
        {"overlong_buffer": 0.5, "overlong_penalty": 0.8},
        lambda r: reward(r) - 0.8 * np.clip((len(r) - 1.5) / 1.5, 0.0, 1.0),
    ),
}


def check_shape(policy, world, name):
    options, stated = SHAPES[name]
    found = shaped_gradient(policy, world, **options)
    np.testing.assert_allclose(found, -world.objective_gradient(stated), **CLOSE)


@pytest.mark.parametrize("name", SHAPES)
def test_a_shaped_reward_has_the_exact_gradient_of_its_expectation(policy, world, name):
    assert any(map(is_cut, RESPONSES)) and not all(map(is_cut, RESPONSES))
    check_shape(policy, world, name)


def test_a_clip_behind_the_scale_would_be_noticed(policy, world):
    scale = "    reward *= options.reward_scale\n"
    clip = "    reward = max(-options.reward_clip, min(options.reward_clip, reward))\n"
    noticed(
        lambda: check_shape(policy, world, "clipped, then scaled"), shaping, scale, scale + clip
    )
    is_cut = 'rollout.finish_reason == "length"'
    noticed(
        lambda: check_shape(policy, world, "penalised"),
        shaping,
        is_cut,
        is_cut.replace("length", "stop"),
    )


def test_masked_responses_leave_the_gradient_of_the_others(policy, world):
    """-P^2 dE[r | ended]/d table, where P is the probability to end: both of a pair must have ended to be compared."""
    found = shaped_gradient(policy, world, truncated="mask")
    mass = world.expect(lambda r: float(not is_cut(r)))
    total = world.expect(lambda r: (not is_cut(r)) * reward(r))
    d_mass = world.objective_gradient(lambda r: float(not is_cut(r)))
    d_total = world.objective_gradient(lambda r: (not is_cut(r)) * reward(r))
    np.testing.assert_allclose(found, -(d_total * mass - total * d_mass), **CLOSE)
    assert np.abs(found + world.objective_gradient(reward)).max() > 1e-2
    masked = '        elif options.truncated == "mask":\n            reward = math.nan\n'
    with planted(shaping, masked, masked.replace("math.nan", "0.0")):
        wrong = shaped_gradient(policy, world, truncated="mask")
    assert np.abs(wrong - found).max() > 1e-3


def test_whitened_rewards_are_divided_by_the_spread_of_the_batch(policy, world):
    """Biased: the spread holds the response itself. The batch is a pair here, and the deviation has the divisor n."""
    found = shaped_gradient(policy, world, "dr_grpo", whole=True, whiten_rewards=True)
    stated = 0.0
    for mass, pair in groups(world, 2):
        texts = [tuple(r.response_ids) for r in pair]
        r = np.array([reward(t) for t in texts])
        scaled = (r - r.mean()) / np.sqrt(r.var() + 1e-8)
        for text, a in zip(texts, scaled, strict=True):
            stated = stated - mass * a * world.score_function(text) / (2 * LENGTH)
    np.testing.assert_allclose(found, stated, **CLOSE)
    plain = -world.objective_gradient(reward) / 2 / LENGTH
    assert np.abs(found - plain).max() > 1e-3


CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def clipped_gradient(dual):
    """Return (E[gradient] off policy, what the equation gives token by token, how many tokens the dual clip stops)."""
    policy, end = Table(seed=1), Table(seed=3, scale=1.5)
    old, new = World(Table(seed=1)), World(end)

    def move():
        with torch.no_grad():
            policy.table.copy_(end.table)

    algorithm, engines = make("dr_grpo", policy, num_samples=2, dual_clip=dual, **CLIP)
    found = expected_gradient(algorithm, engines, old, move=move)
    stated, stopped = 0.0, 0
    for mass, pair in groups(old, 2):
        texts = [tuple(r.response_ids) for r in pair]
        mean = sum(map(reward, texts)) / 2
        for text in texts:
            a, ratio = reward(text) - mean, np.exp(new.logprobs(text) - old.logprobs(text))
            # max(-a rho, -a clip(rho)) follows rho unless the clip is worse; below dual x |a| where a is negative.
            follows = ratio <= 1 + CLIP["clip_high"] if a > 0 else ratio >= 1 - CLIP["clip_low"]
            beyond = (ratio > dual) if a < 0 and dual else np.zeros(len(text), dtype=bool)
            stopped += (follows & beyond).sum()
            coefficient = -a * ratio * follows * ~beyond / (2 * LENGTH)
            stated = stated + mass * np.tensordot(coefficient, new.token_gradients(text), 1)
    return found, stated, stopped


def test_the_dual_clip_bounds_what_a_negative_advantage_can_push():
    """Ye et al. 2019: the loss of a bad token stops at dual |A|, so a ratio beyond it has no gradient."""
    found, stated, stopped = clipped_gradient(1.5)
    np.testing.assert_allclose(found, stated, **CLOSE)
    assert stopped > 10
    without, stated, stopped = clipped_gradient(0.0)
    np.testing.assert_allclose(without, stated, **CLOSE)
    assert stopped == 0 and np.abs(found - without).max() > 1e-4
    bound = "torch.minimum(loss, -dual * advantages)"
    with planted(surrogate, bound, "torch.minimum(loss, dual * advantages)"):
        wrong, *_ = clipped_gradient(1.5)
    assert np.abs(wrong - found).max() > 1e-4


def test_the_controller_measures_the_divergence_and_moves_by_its_equation(policy, world):
    """coef' = coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), with the mean log-ratio of the batch for the KL."""
    reference = Table(seed=2)
    other = World(reference)

    def gap(response):
        return (world.logprobs(response) - other.logprobs(response)).sum()

    exact = world.expect(gap)
    by_state = sum(
        mass * (p * np.log(p / other.distribution(prefix))).sum()
        for prefix, mass in world.prefixes()
        for p in [world.distribution(prefix)]
    )
    assert exact == pytest.approx(by_state, abs=1e-12), "its expectation is the divergence"
    seen = set()
    for text in RESPONSES:
        algorithm, engines = make("rloo", policy, reference, num_samples=2, kl_coef=0.3, target_kl=0.2, kl_horizon=50)  # fmt: skip
        pair = [rollout_of(t, world) for t in (text, RESPONSES[0])]
        algorithm.prepare(pair, engines)
        error = np.clip((gap(text) + gap(RESPONSES[0])) / 2 / 0.2 - 1, -0.2, 0.2)
        assert algorithm.policy.kl_coef == pytest.approx(0.3 * (1 + error * 2 / 50), rel=1e-10)
        seen.add(float(np.sign(error)))
    assert seen == {1.0, -1.0}


@pytest.mark.slow
def test_the_controller_brings_the_divergence_to_its_target():
    """Exact gradient steps on E[reward] - coef KL: from half and from three times the coefficient that does it, which both find."""
    ends = []
    for start in (1.0, 6.0):
        policy, reference = Table(seed=2), Table(seed=2)
        other = World(reference)
        algorithm, engines = make(
            "remax", policy, reference, kl_coef=start, target_kl=0.1, kl_horizon=40, kl_in="reward"
        )
        kl = 0.0
        for _ in range(50):
            world = World(policy)
            kl = world.expect(
                lambda r, world=world, other=other: (world.logprobs(r) - other.logprobs(r)).sum()
            )
            coefficient = algorithm.policy.kl_coef
            gradient = expected_gradient(algorithm, engines, world, size=1)
            algorithm.policy.kl_coef = coefficient
            algorithm._steer(kl, 15)
            with torch.no_grad():
                policy.table -= 3.0 * torch.from_numpy(gradient)
        assert kl == pytest.approx(0.1, rel=0.03), start
        ends.append(algorithm.policy.kl_coef)
    assert ends[0] == pytest.approx(ends[1], rel=0.01)


QUIET = {"kl_coef": 0.0}
"""Switched off, the KL pushes no response; where it is on by default, it would."""


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_rewards_that_are_all_equal_push_nowhere(name, policy, world):
    """In each pair by itself, not only on average."""
    values = None
    if name == "ppo":
        values = Table("value")
        with torch.no_grad():
            values.table.fill_(0.7)
    options = {"num_samples": 2} if name != "remax" else {}
    algorithm, engines = make(name, policy, value=values, **options, **QUIET)

    def largest(value):
        drawn = [rs for _, rs in groups(world, 2, reward=lambda r: value(r), baseline=0.7)][::7]
        found, objective = 0.0, algorithm.objectives()["policy"]
        for pair in drawn:
            algorithm.prepare(pair, engines)
            batch = objective.collate(pair)
            engines["policy"].forward_backward(objective, [batch], objective.weights(batch))
            found = max(found, float(policy.table.grad.abs().max()))
            engines["policy"].discard()
        return found

    assert largest(lambda r: 0.7) < 1e-12
    assert largest(lambda r: 0.7 + 0.1 * len(r)) > 1e-3, "it would notice"


def test_rounding_of_equal_rewards_is_no_spread():
    """Divided by a deviation that rounding made, a group of equal rewards would push with full force."""
    rows = torch.full((1, 3), 0.1)
    assert not advantages.group_advantages(rows, eps=0.0)[0].any()

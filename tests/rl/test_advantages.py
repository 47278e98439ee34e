"""Advantages and KL estimators against hand-computed cases and brute force in fp64.

Each `check_*` takes the module under test, so that it runs once on ours and once on a copy with a
known bug written in, where it must fail.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from patched import with_bug

from distllm.errors import ConfigError
from distllm.rl import advantages

F64 = torch.float64


def refused(check, old, new):
    """Assert that `check` notices the bug `old` -> `new`."""
    with pytest.raises(AssertionError):
        check(with_bug(advantages, old, new))


def check_gae_by_hand(module):
    # gamma 0.5, lambda 0.5; r = (0, 0, 1), V = (0.5, 1, 0.25).
    # delta_3 = 1 - 0.25 = 0.75;  delta_2 = 0.125 - 1 = -0.875;  delta_1 = 0.5 - 0.5 = 0
    # A_3 = 0.75;  A_2 = -0.875 + 0.1875 = -0.6875;  A_1 = 0 - 0.171875
    rewards = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    values = torch.tensor([0.5, 1.0, 0.25], dtype=F64)
    result, returns = module.gae(rewards, values, 0.5, 0.5)
    assert result.dtype == F64
    assert result.tolist() == [-0.171875, -0.6875, 0.75]
    assert returns.tolist() == [0.328125, 0.3125, 1.0]


def gae_by_definition(rewards, values, gamma, lam, last_value):
    """A_t = sum_k (gamma lam)^k delta_{t+k}, the sum written out."""
    following = np.append(values[1:], last_value)
    deltas = rewards + gamma * following - values
    size = len(deltas)
    return np.array(
        [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)]
    )


def check_gae_by_definition(module):
    noise = np.random.default_rng(0)
    for size, gamma, lam, last in itertools.product(
        (1, 2, 7), (1.0, 0.9), (0.0, 0.95, 1.0), (0.0, 0.7)
    ):
        rewards, values = noise.normal(size=size), noise.normal(size=size)
        result, returns = module.gae(
            torch.from_numpy(rewards), torch.from_numpy(values), gamma, lam, last
        )
        expected = gae_by_definition(rewards, values, gamma, lam, last)
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(returns.numpy(), expected + values, rtol=1e-12, atol=1e-12)


GAE_BUGS = [
    ("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    ("delta = carried + gamma * next_value", "delta = carried + next_value"),
    ("return result, result + values.to(dtype)", "return result, result"),
    ("next_advantage, carried = last_value, 0.0, 0.0", "next_advantage, carried = 0.5, 0.0, 0.0"),
    ("next_value, carried = value_list[t], 0.0", "next_value, carried = value_list[0], 0.0"),
]


@pytest.mark.parametrize("check", [check_gae_by_hand, check_gae_by_definition])
def test_gae(check):
    check(advantages)
    for old, new in GAE_BUGS:
        refused(check, old, new)


def check_gae_steps_over_what_was_not_sampled(module):
    """Tokens of an environment are no time steps: the rest comes out as if they were not there."""
    mask = [True, True, False, False, True, False, True]
    kept = torch.tensor(mask)
    noise = np.random.default_rng(1)
    rewards, values = torch.from_numpy(noise.normal(size=(2, 7)))
    rewards[~kept] = 0.0
    for gamma, lam in ((1.0, 1.0), (0.9, 0.8)):
        whole, returns = module.gae(rewards, values, gamma, lam, 0.3, mask)
        alone, alone_returns = module.gae(rewards[kept], values[kept], gamma, lam, 0.3)
        torch.testing.assert_close(whole[kept], alone, rtol=0, atol=1e-12)
        torch.testing.assert_close(returns[kept], alone_returns, rtol=0, atol=1e-12)
        assert whole[~kept].tolist() == [0.0] * 3
    late = rewards.clone()
    late[5] = 2.0  # an environment's verdict counts for the token that led to it
    moved = rewards.clone()
    moved[4] += 2.0
    torch.testing.assert_close(
        module.gae(late, values, 0.9, 0.8, 0.0, mask),
        module.gae(moved, values, 0.9, 0.8, 0.0, mask),
    )


def test_gae_steps_over_what_was_not_sampled():
    check_gae_steps_over_what_was_not_sampled(advantages)
    check = check_gae_steps_over_what_was_not_sampled
    refused(check, "if mask is not None and not mask[t]:", "if False:")
    refused(
        check,
        "            continue\n",
        "            next_advantage *= gamma * lam\n            continue\n",
    )
    refused(check, "carried += reward_list[t]", "carried = reward_list[t]")


def test_gae_of_whole_return_is_reward_to_go():
    """With gamma = lambda = 1 the value cancels: A_t + V_t = sum of the rewards from t on."""
    rewards = torch.randn(9, dtype=F64, generator=torch.Generator().manual_seed(1))
    values = torch.randn(9, dtype=F64, generator=torch.Generator().manual_seed(2))
    _, returns = advantages.gae(rewards, values, 1.0, 1.0)
    torch.testing.assert_close(returns, rewards.flip(0).cumsum(0).flip(0), rtol=0, atol=1e-12)


def test_gae_promotes_half_precision():
    rewards, values = torch.ones(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    result, returns = advantages.gae(rewards, values, 0.99, 0.95)
    assert result.dtype == returns.dtype == torch.float32


def check_group_by_hand(module):
    # mean 2, deviations (-1, 1, 0, 0), unbiased variance 2/3.
    rewards = torch.tensor([[1.0, 3.0, 2.0, 2.0]], dtype=F64)
    plain, fraction = module.group_advantages(rewards, scale_by_std=False)
    assert plain.tolist() == [[-1.0, 1.0, 0.0, 0.0]] and fraction == 0.0
    scaled, _ = module.group_advantages(rewards, scale_by_std=True, eps=1e-4)
    unit = 1 / (math.sqrt(2 / 3) + 1e-4)
    np.testing.assert_allclose(scaled.numpy(), [[-unit, unit, 0, 0]], rtol=0, atol=1e-12)


def check_group_against_numpy(module):
    rewards = np.random.default_rng(3).normal(size=(5, 8)) * 4 + 1
    expected = rewards - rewards.mean(axis=1, keepdims=True)
    plain, _ = module.group_advantages(torch.from_numpy(rewards), scale_by_std=False)
    np.testing.assert_allclose(plain.numpy(), expected, rtol=0, atol=1e-12)
    expected /= rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    scaled, _ = module.group_advantages(torch.from_numpy(rewards))
    np.testing.assert_allclose(scaled.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("check", [check_group_by_hand, check_group_against_numpy])
def test_group_advantages(check):
    check(advantages)
    refused(check, "keepdim=True) / (count - 1).clamp(min=1)", "keepdim=True) / count")
    refused(check, "(variance.sqrt() + eps)", "(variance + eps)")


def check_trap_17_zero_spread(module):
    """A group of equal rewards gives exact zeros, even where the rounded deviation is not zero."""
    rewards = torch.tensor([[0.1] * 7, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert rewards[0].std() > 0, "the case must be one where rounding leaves a deviation"
    result, fraction = module.group_advantages(rewards, scale_by_std=True, eps=0.0)
    assert result[0].tolist() == [0.0] * 7
    assert result[1].abs().max() < 3 and result[1, 0] > 0
    assert fraction == 0.5


def test_item_17_zero_spread():
    check_trap_17_zero_spread(advantages)
    refused(
        check_trap_17_zero_spread,
        "spread = highest > lowest",
        "spread = centred.abs().amax(1, keepdim=True) > 0",
    )
    refused(check_trap_17_zero_spread, "float((~spread).sum())", "float(spread.sum()) * 0")


def test_item_17_group_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"num_samples=1: .* at least 2\. Set num_samples=8"):
        advantages.group_advantages(torch.tensor([[1.0], [2.0]]))
    lax = with_bug(advantages, "if num_samples < 2:", "if num_samples < 1:")
    lax.group_advantages(torch.tensor([[1.0], [2.0]]))  # without the rule nothing would stop it


def check_trap_18_unscorable(module):
    """A reward that is not finite leaves the baseline and the deviation as if it were not there."""
    nan, inf = math.nan, math.inf
    rewards = torch.tensor(
        [[1.0, nan, 3.0, 5.0], [nan, nan, 2.0, nan], [nan] * 4, [0.0, 1.0, inf, -inf]], dtype=F64
    )
    for scale in (False, True):
        result, fraction = module.group_advantages(rewards, scale_by_std=scale)
        siblings, _ = module.group_advantages(
            torch.tensor([[1.0, 3.0, 5.0]], dtype=F64), scale_by_std=scale
        )
        pair, _ = module.group_advantages(torch.tensor([[0.0, 1.0]], dtype=F64), scale_by_std=scale)
        torch.testing.assert_close(result[0, [0, 2, 3]], siblings[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(result[3, :2], pair[0], rtol=0, atol=1e-12)
        unscored = torch.cat([result[0, 1:2], result[1], result[2], result[3, 2:]])
        assert unscored.tolist() == [0.0] * 11
        assert fraction == 0.5


def test_item_18_unscorable():
    check_trap_18_unscorable(advantages)
    refused(
        check_trap_18_unscorable, "scored = torch.isfinite(rewards)", "scored = rewards == rewards"
    )
    refused(
        check_trap_18_unscorable,
        "count = scored.sum(dim=1, keepdim=True)",
        "count = scored.sum(dim=1, keepdim=True) * 0 + num_samples",
    )
    refused(check_trap_18_unscorable, "(known - mean).masked_fill(~scored, 0.0)", "(known - mean)")


def check_whiten(module):
    x = torch.randn(3, 50, dtype=F64, generator=torch.Generator().manual_seed(4)) * 3 + 5
    array = x.numpy()
    whitened = module.whiten(x)
    np.testing.assert_allclose(
        whitened.numpy(), (array - array.mean()) / np.sqrt(array.var() + 1e-8), rtol=0, atol=1e-12
    )
    assert whitened.var(correction=0).item() == pytest.approx(1.0, abs=1e-8)
    kept = module.whiten(x, shift_mean=False)
    assert kept.mean().item() == pytest.approx(array.mean(), rel=1e-12)
    assert kept.var(correction=0).item() == pytest.approx(1.0, abs=1e-8)


def test_whiten():
    check_whiten(advantages)
    refused(check_whiten, 'second["squares"] / count', 'second["squares"] / (count - 1)')
    refused(check_whiten, "scaled if shift_mean else scaled + mean", "scaled")


def test_whiten_keeps_digits_of_a_large_mean_and_bears_a_single_element():
    x = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=F64)
    expected = [-math.sqrt(1.5), 0.0, math.sqrt(1.5)]
    np.testing.assert_allclose(advantages.whiten(x).numpy(), expected, rtol=0, atol=1e-7)
    assert advantages.whiten(torch.tensor([3.0])).tolist() == [0.0]
    assert advantages.whiten(torch.ones(4, dtype=torch.bfloat16)).dtype == torch.float32


def check_trap_16_statistics_are_global(module):
    """Two processes that hold unequal parts get the numbers of the whole."""
    x = torch.randn(40, dtype=F64, generator=torch.Generator().manual_seed(5)).square()
    parts = [x[:31], x[31:]]
    whole = module.whiten(x)
    for mine, other, rows in [
        (parts[0], parts[1], slice(0, 31)),
        (parts[1], parts[0], slice(31, 40)),
    ]:
        calls = iter(["first", "second"])

        def all_sum(scalars, other=other, calls=calls):
            if next(calls) == "first":
                return {
                    "sum": scalars["sum"] + other.sum(),
                    "count": scalars["count"] + len(other),
                }
            squares = (other - x.mean()).square().sum()
            return {"squares": scalars["squares"] + squares}

        result = module.whiten(mine, all_sum=all_sum)
        torch.testing.assert_close(result, whole[rows], rtol=0, atol=1e-12)
        assert next(calls, None) is None


def test_item_16_statistics_are_global():
    check_trap_16_statistics_are_global(advantages)
    refused(
        check_trap_16_statistics_are_global,
        "totals = all_sum or (lambda parts: parts)",
        "totals = lambda parts: parts",
    )


def distributions(size=5):
    noise = torch.Generator().manual_seed(6)
    logits = torch.randn(size, dtype=F64, generator=noise)
    reference = torch.randn(size, dtype=F64, generator=noise)
    return logits, reference.log_softmax(0)


def check_kl_values(module):
    """Over the whole vocabulary k1 and k3 average to the divergence; k2 to E[d^2] / 2."""
    logits, reference = distributions()
    logprobs = logits.log_softmax(0)
    p, q = logprobs.exp().numpy(), reference.exp().numpy()
    exact = float((p * np.log(p / q)).sum())
    averages = {
        kind: float((p * module.kl_estimate(logprobs, reference, kind).numpy()).sum())
        for kind in ("k1", "k2", "k3")
    }
    assert averages["k1"] == pytest.approx(exact, abs=1e-12)
    assert averages["k3"] == pytest.approx(exact, abs=1e-12)
    assert averages["k2"] == pytest.approx(float((p * np.log(p / q) ** 2).sum()) / 2, abs=1e-12)
    assert (module.kl_estimate(logprobs, reference, "k3") >= 0).all()
    by_hand = module.kl_estimate(
        torch.tensor([-1.0], dtype=F64), torch.tensor([-1.0 - math.log(2)], dtype=F64), "k3"
    )
    assert by_hand.item() == pytest.approx(0.5 - 1 + math.log(2), abs=1e-12)


def test_kl_values():
    check_kl_values(advantages)
    refused(
        check_kl_values,
        "torch.expm1(-difference) + difference",
        "torch.expm1(difference) - difference",
    )
    refused(check_kl_values, "(logprobs - ref_logprobs).clamp", "(ref_logprobs - logprobs).clamp")
    refused(check_kl_values, "difference.square() / 2", "difference.square()")


def test_kl_of_equal_policies_is_zero_and_of_far_ones_finite():
    same = torch.randn(4, generator=torch.Generator().manual_seed(7))
    for kind in ("k1", "k2", "k3"):
        assert advantages.kl_estimate(same, same, kind).tolist() == [0.0] * 4
        far = advantages.kl_estimate(torch.tensor([-500.0]), torch.tensor([0.0]), kind)
        assert torch.isfinite(far).all()
    with pytest.raises(ConfigError, match=r"kl_kind=k4 is unknown\. Known: k1, k2, k3"):
        advantages.kl_estimate(same, same, "k4")


def check_trap_32_gradient(module):
    """The expected gradient of the loss is that of the divergence over the whole vocabulary."""
    logits, reference = distributions()
    exact_logits = logits.clone().requires_grad_()
    logprobs = exact_logits.log_softmax(0)
    (logprobs.exp() * (logprobs - reference)).sum().backward()
    for kind in ("k1", "k2", "k3"):
        mine = logits.clone().requires_grad_()
        logprobs = mine.log_softmax(0)
        loss = module.kl_loss(logprobs, reference, kind)
        # The sampler draws token v with probability p_v, and that draw carries no gradient.
        (logprobs.exp().detach() * loss).sum().backward()
        torch.testing.assert_close(mine.grad, exact_logits.grad, rtol=0, atol=1e-12)
        shown = module.kl_estimate(logprobs, reference, kind)
        torch.testing.assert_close(loss, shown, rtol=0, atol=1e-12)


def test_item_32_kl_as_a_loss_has_the_gradient_of_the_divergence():
    check_trap_32_gradient(advantages)
    for naive in ("k1", "k3"):
        refused(
            check_trap_32_gradient,
            'kl_estimate(logprobs, ref_logprobs, "k2")',
            f'kl_estimate(logprobs, ref_logprobs, "{naive}")',
        )
    refused(check_trap_32_gradient, "value + (carrier - carrier.detach())", "carrier")

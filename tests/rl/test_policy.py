"""The policy and value losses, and what the algorithms make of rollouts, against sums done by hand."""

import math
from unittest import mock

import numpy as np
import pytest
import torch

from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.rl.algorithms.ppo import PPOOptions, ValueObjective
from distllm.rl.layout import collate_rollouts
from distllm.rl.objective import effective_sample_size
from distllm.rl.scoring import explained_variance, score_logprobs, summarise
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.tiny import PAD_ID, VOCAB_SIZE, single_engine, tiny_decoder
from distllm.types import IGNORE_INDEX, ModelOutput

END = VOCAB_SIZE - 1


class Scripted:
    """A model whose log-probabilities at the labels are given."""

    def __init__(self, logprobs, entropy=None):
        self.values, self.entropy = logprobs, entropy
        self.head = self

    def __call__(self, input_ids, **rest):
        return ModelOutput(last_hidden_state=input_ids)

    def logprobs(self, hidden, labels, temperature):
        return self._place(labels, self.values), self._place(labels, self.entropy or [0.0] * 9)

    def _place(self, labels, values):
        out = torch.zeros(labels.shape, dtype=torch.float64)
        mask = labels != IGNORE_INDEX
        out[mask] = torch.tensor(values[: int(mask.sum())], dtype=torch.float64)
        return out


def objective(**options):
    return make_algorithm("grpo", tiny_decoder(), **options).policy


def test_three_tokens_by_hand():
    """rho = 1.5, 0.5, 1.1 with A = 1, -1, 2 and clips 0.2 / 0.3: each case of the clip occurs."""
    old = [-1.0, -2.0, -3.0]
    new = [o + math.log(r) for o, r in zip(old, (1.5, 0.5, 1.1), strict=True)]
    r = make_rollout(
        [1, 2],
        [3, 4, 5],
        old_logprobs=old,
        advantages=[1.0, -1.0, 2.0],
        ref_logprobs=[-1.5, -2.0, -2.5],
    )
    loss = objective(clip_low=0.2, clip_high=0.3, kl_coef=0.1, kl_kind="k1", entropy_coef=0.01)
    batch = loss.collate([r])
    out = loss.loss(Scripted(new, [0.5, 0.25, 0.25]), batch)
    # max(-1.5, -1.3) = -1.3; max(0.5, 0.8) = 0.8; max(-2.2, -2.2) = -2.2
    assert out.losses["policy"].item() == pytest.approx(-1.3 + 0.8 - 2.2)
    assert out.losses["kl"].item() == pytest.approx(sum(new) - (-6.0))
    assert out.losses["entropy"].item() == pytest.approx(1.0)
    assert loss.coefficients == {"policy": 1.0, "kl": 0.1, "entropy": -0.01}
    assert loss.weights(batch)["policy"].item() == 3
    clipped, count = out.metrics["rl/clip_fraction"]
    assert (clipped / count).item() == pytest.approx(2 / 3)


def test_sequence_aggregation_weighs_each_response_once():
    one = make_rollout([1], [2], advantages=[1.0], old_logprobs=[-1.0])
    four = make_rollout([1], [2, 3, 4, 5], advantages=[2.0] * 4, old_logprobs=[-1.0] * 4)
    loss = objective(aggregation="sequence")
    batch = loss.collate([one, four])
    out = loss.loss(Scripted([-1.0] * 5), batch)
    assert out.losses["policy"].item() / loss.weights(batch)["policy"].item() == pytest.approx(-1.5)
    by_token = objective(aggregation="token")
    out = by_token.loss(Scripted([-1.0] * 5), batch)
    assert out.losses["policy"].item() / by_token.weights(batch)["policy"].item() == pytest.approx(
        -9 / 5
    )


def test_an_unscorable_response_adds_nothing_and_is_not_counted():
    good = make_rollout([1], [2, 3], advantages=[1.0, 1.0], old_logprobs=[-1.0, -1.0], reward=1.0)
    bad = make_rollout(
        [1], [2, 3, 4], advantages=[5.0] * 3, old_logprobs=[-1.0] * 3, reward=math.nan
    )
    loss = objective()
    batch = loss.collate([good, bad])
    assert loss.weights(batch)["policy"].item() == 2
    assert loss.loss(Scripted([-1.0] * 5), batch).losses["policy"].item() == pytest.approx(-2.0)


def test_the_first_update_has_ratio_one_and_yet_a_gradient():
    model = tiny_decoder().double()
    engine = single_engine(model)
    rollouts = [
        make_rollout([1, 2, 3], [4, 5, END], advantages=[1.0, 1.0, 1.0]),
        make_rollout([1, 2], [7, END], advantages=[-1.0, -1.0]),
    ]
    for r, old in zip(
        rollouts, score_logprobs(engine, rollouts, model.join, PAD_ID, 0.8, 2), strict=True
    ):
        r.old_logprobs = old.double()
    loss = make_algorithm("grpo", model, temperature=0.8).policy
    batch = loss.collate(rollouts)
    out = loss.loss(model, batch)
    for name in ("rl/clip_fraction", "rl/approx_kl"):
        assert out.metrics[name][0].item() == pytest.approx(0.0, abs=1e-9)
    assert out.losses["policy"].item() == pytest.approx(-1.0, abs=1e-5)  # -(3 - 2)
    out.losses["policy"].backward()
    assert sum(p.grad.abs().sum() for p in model.parameters()) > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_sampling_and_scoring_use_one_distribution(temperature):
    model = tiny_decoder().double().eval()
    engine = single_engine(model, trained=False)
    options = GenerationOptions(max_new_tokens=7, temperature=temperature)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    rollouts = generate(
        model, prompts, options, end_ids=[END], pad_id=PAD_ID, num_samples=3, seed=3
    )
    scored = score_logprobs(engine, rollouts, model.join, PAD_ID, temperature, 4)
    for r, logprobs in zip(rollouts, scored, strict=True):
        torch.testing.assert_close(r.rollout_logprobs, logprobs, atol=1e-5, rtol=0)
    if temperature != 1.0:  # the bug: scores without the temperature
        wrong = score_logprobs(engine, rollouts, model.join, PAD_ID, 1.0, 4)
        assert any(
            (r.rollout_logprobs - w).abs().max() > 1e-2
            for r, w in zip(rollouts, wrong, strict=True)
        )


def ppo(**options):
    model = tiny_decoder()
    algorithm = make_algorithm("ppo", model, **options)
    engines = {
        "policy": single_engine(model),
        "value": single_engine(tiny_decoder("value", seed=1)),
        "reference": single_engine(tiny_decoder(seed=2), trained=False),
    }
    with torch.no_grad():
        engines["value"].model.head.weight.normal_()
    return algorithm, engines


def numpy_advantages(rewards, values, gamma, lam):
    """Sum of discounted errors, written as the double sum of the definition."""
    steps = len(rewards)
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    return np.array(
        [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, steps)) for t in range(steps)]
    )


def test_ppo_prepares_advantages_and_returns_as_defined():
    algorithm, engines = ppo(kl_coef=0.3, gamma=0.9, gae_lambda=0.8)
    rollouts = [
        make_rollout([1, 2], [3, 4, 5, END], reward=2.0),
        make_rollout([1, 2, 6], [7, END], reward=-1.0),
    ]
    algorithm.prepare(rollouts, engines)
    raw = []
    for r in rollouts:
        token_rewards = -0.3 * (r.old_logprobs - r.ref_logprobs).double().numpy()
        token_rewards[-1] += r.reward  # on the last generated token, which is the end token
        values = r.old_values.double().numpy()
        expected = numpy_advantages(token_rewards, values, 0.9, 0.8)
        np.testing.assert_allclose(r.returns.numpy(), expected + values, atol=1e-5)
        raw.append(expected)
    flat = np.concatenate(raw)
    white = (flat - flat.mean()) / flat.std()  # over the whole batch, biased variance
    np.testing.assert_allclose(
        torch.cat([r.advantages for r in rollouts]).numpy(), white, atol=1e-4
    )
    assert not np.allclose(raw[0], (raw[0] - raw[0].mean()) / raw[0].std())


def test_grpo_compares_within_each_prompt():
    model = tiny_decoder()
    algorithm = make_algorithm("grpo", model, num_samples=2)
    rewards = [1.0, 0.0, 5.0, 5.0]
    rollouts = [make_rollout([1], [2, END], reward=r) for r in rewards]
    metrics = algorithm.prepare(rollouts, {"policy": single_engine(model)})
    found = [r.advantages[0].item() for r in rollouts]
    std = math.sqrt(0.5)  # of 1 and 0, divisor n - 1
    assert found == pytest.approx([0.5 / (std + 1e-4), -0.5 / (std + 1e-4), 0.0, 0.0])
    assert metrics["rl/zero_spread"] == 0.5
    assert all(torch.equal(r.advantages, r.advantages[:1].expand(2)) for r in rollouts)


def test_the_value_loss_takes_the_worse_of_clipped_and_free():
    model = tiny_decoder("value").double()
    r = make_rollout([1, 2], [3, END], old_values=[0.0, 1.0], returns=[2.0, 0.0])
    loss = ValueObjective(PPOOptions(value_clip=0.2), model.join, PAD_ID)
    batch = loss.collate([r])
    with torch.no_grad():
        model.head.bias.fill_(
            1.0
        )  # every value is 1: free errors 1 and 1, clipped (0.2-2)^2 and (1-0)^2
    out = loss.loss(model, batch)
    assert out.losses["value"].item() == pytest.approx(0.5 * (1.8**2 + 1.0))
    assert loss.weights(batch)["value"].item() == 2


def test_fields_land_on_the_tokens_they_belong_to():
    join = tiny_decoder().join
    rollouts = [
        make_rollout([1, 2, 3], [4, 5], old_logprobs=[-0.1, -0.2]),
        make_rollout([6], [7, 8, 9], old_logprobs=[-0.3, -0.4, -0.5]),
    ]
    batch = collate_rollouts(rollouts, join, PAD_ID)
    for row, r in enumerate(rollouts):
        for t, (token, value) in enumerate(zip(r.response_ids, r.old_logprobs, strict=True)):
            place = len(r.prompt_ids) - 1 + t  # logits at t - 1 predict token t
            assert batch.labels[row, place] == token
            assert batch.old_logprobs[row, place] == value
    with mock.patch.object(batch, "labels", batch.labels.roll(1, dims=1)):  # the bug: off by one
        assert batch.labels[0, 2] != 4


def test_the_controller_moves_towards_its_target():
    algorithm, engines = ppo(kl_coef=0.1, target_kl=1e-6, kl_horizon=100)
    rollouts = [make_rollout([1], [2, 3, END], reward=1.0) for _ in range(4)]
    before = algorithm.policy.kl_coef
    algorithm.prepare(rollouts, engines)
    kl = sum(algorithm.token_kl(r, "k1").sum().item() for r in rollouts) / 4
    error = max(-0.2, min(0.2, kl / 1e-6 - 1))
    assert algorithm.policy.kl_coef == pytest.approx(before * (1 + error * 4 / 100))
    state = algorithm.state()
    other, _ = ppo(kl_coef=0.1)
    other.load_state(state)
    assert other.policy.kl_coef == algorithm.policy.kl_coef


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == pytest.approx(1.0)
    assert explained_variance(torch.full((3,), 2.0), returns) == pytest.approx(0.0)


def test_the_effective_sample_size_is_that_of_the_weights():
    weights = torch.tensor([4.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    found = effective_sample_size(
        {"rl/ratio_mean": weights.mean().item(), "rl/ratio_square": weights.square().mean().item()}
    )
    assert found["rl/effective_sample_size"] == pytest.approx(36 / 18 / 4)  # (sum w)^2 / sum w^2
    assert effective_sample_size({"rl/ratio_mean": 1.0, "rl/ratio_square": 1 - 1e-9}) == {
        "rl/effective_sample_size": 1.0
    }


def test_groups_without_spread_are_counted_whatever_the_algorithm():
    scores = [1.0, 1.0, 0.0, 1.0, float("nan"), 2.0, 3.0, 5.0]
    rollouts = [make_rollout([1], [2] * (i + 1), score=s) for i, s in enumerate(scores)]
    found = summarise(rollouts, 2)
    assert found["rl/zero_spread"] == 0.5  # two equal ones, and a lone one beside the unscored
    assert found["rl/reward_group_std"] == pytest.approx((0 + 0.5 + 0 + 1) / 4)
    known = [(s, i + 1) for i, s in enumerate(scores) if s == s]
    expected = np.corrcoef(np.array(known).T)[0, 1]
    assert found["rl/reward_length_correlation"] == pytest.approx(expected)
    assert "rl/zero_spread" not in summarise(rollouts, 1)

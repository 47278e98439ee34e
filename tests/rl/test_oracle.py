"""Every algorithm's expected gradient against exact enumeration: unbiased where it claims to be, else off by what it states.

No sampling: the expectation runs over every group of responses, so the tolerance is that of fp64.
"""

import itertools

import numpy as np
import pytest
import torch
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
    row_of,
)

from distllm.rl.advantages import gae, group_advantages, leave_one_out
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.types import IGNORE_INDEX

CLOSE = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def policy():
    return Table(seed=1)


@pytest.fixture(scope="module")
def world(policy):
    return World(policy)


@pytest.fixture(scope="module")
def reference():
    return Table(seed=2)


def kl_of(world, other, response):
    return float((world.logprobs(response) - other.logprobs(response)).sum())


def test_the_world_is_complete(world):
    assert len(RESPONSES) == 15
    assert world.expect(lambda r: 1.0) == pytest.approx(1.0, abs=1e-14)
    np.testing.assert_allclose(world.objective_gradient(lambda r: 1.0), 0.0, atol=1e-14)
    # The gradient by hand against a numerical one.
    moved = Table(seed=1)
    gradient = world.objective_gradient(reward)
    row, column = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
    step = 1e-6
    with torch.no_grad():
        moved.table[row, column] += step
    slope = (World(moved).expect(reward) - world.expect(reward)) / step
    assert slope == pytest.approx(gradient[row, column], rel=1e-4)


def test_rloo_is_unbiased(policy, world):
    algorithm, engines = make("rloo", policy, num_samples=2, kl_coef=0.0)
    found = expected_gradient(algorithm, engines, world)
    np.testing.assert_allclose(found, -world.objective_gradient(reward), **CLOSE)


def test_a_baseline_of_two_others_is_unbiased(world):
    """3,375 groups of three."""
    drawn = list(groups(world, 3))
    rows = torch.tensor([[r.reward for r in g] for _, g in drawn], dtype=torch.float64)
    scores = {r: world.score_function(r) for r in RESPONSES}
    found = sum(
        mass * sum(a * scores[tuple(r.response_ids)] for a, r in zip(row, g, strict=True)) / 3
        for (mass, g), row in zip(drawn, leave_one_out(rows)[0].numpy(), strict=True)
    )
    np.testing.assert_allclose(found, world.objective_gradient(reward), **CLOSE)


def test_a_transformer_gets_the_exact_policy_gradient():
    """Vocabulary 5, up to 4 tokens: 341 responses through the real model, each weighed by its probability."""
    model = tiny_decoder(vocab_size=5, n_layers=1).double()
    texts = [
        (*body, end)
        for size in range(4)
        for body in itertools.product(range(1, 5), repeat=size)
        for end in ([0] if size < 3 else range(5))
    ]
    assert len(texts) == 341
    batch = model.join([[1, 2]] * 341, [list(t) for t in texts], 0)
    logprobs = model(batch.input_ids, batch.attention_mask).logits.log_softmax(-1)
    taken = logprobs.gather(-1, batch.labels.clamp(min=0)[..., None])[..., 0]
    mass = (taken * (batch.labels != IGNORE_INDEX)).sum(1).exp()
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-12)
    rewards = torch.tensor([reward(t) for t in texts], dtype=torch.float64)
    exact = torch.autograd.grad((mass * rewards).sum(), list(model.parameters()))

    algorithm = make_algorithm("remax", model, pad_id=0, max_response_tokens=4, kl_coef=0.0)
    engine = single_engine(model)
    rollouts = [make_rollout([1, 2], t, reward=reward(t), baseline=0.4) for t in texts]
    algorithm.prepare(rollouts, {"policy": engine})
    for rollout, p in zip(rollouts, mass.tolist(), strict=True):
        rollout.advantages *= p * 4 * 341  # the loss divides by 341 responses of at most 4 tokens
    objective = algorithm.policy
    batch = objective.collate(rollouts)
    engine.forward_backward(objective, [batch], objective.weights(batch))
    for parameter, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, -gradient, rtol=0, atol=1e-10)


def test_rloo_with_kl_in_the_reward_is_unbiased(policy, world, reference):
    algorithm, engines = make("rloo", policy, reference, num_samples=2, kl_coef=0.3)
    found = expected_gradient(algorithm, engines, world)
    other = World(reference)
    # d KL / d table = E[KL of the response x score function]: the estimator k1 itself has no expected gradient.
    exact = world.objective_gradient(lambda r: reward(r) - 0.3 * kl_of(world, other, r))
    np.testing.assert_allclose(found, -exact, **CLOSE)


def test_remax_is_unbiased_up_to_its_constant(policy, world, reference):
    other = World(reference)
    for kl_coef in (0.0, 0.3):
        algorithm, engines = make("remax", policy, reference, kl_coef=kl_coef)
        found = expected_gradient(algorithm, engines, world, size=1, baseline=0.7)
        exact = world.objective_gradient(
            lambda r, kl_coef=kl_coef: reward(r) - kl_coef * kl_of(world, other, r)
        )
        np.testing.assert_allclose(found, -exact / LENGTH, **CLOSE)


def test_dr_grpo_is_unbiased_up_to_its_constants(policy, world):
    """(n - 1) / n, because the mean holds the response itself, and 1 / L."""
    algorithm, engines = make("dr_grpo", policy, num_samples=2)
    found = expected_gradient(algorithm, engines, world)
    np.testing.assert_allclose(found, -world.objective_gradient(reward) / 2 / LENGTH, **CLOSE)


def by_equation(world, weigh):
    """E[sum_i sum_t c_it d l_it] with the coefficients c that `weigh(rewards, lengths)` gives for a pair, in numpy."""
    gradients = {r: world.token_gradients(r) for r in RESPONSES}
    total = 0.0
    for mass, pair in groups(world, 2):
        texts = [tuple(r.response_ids) for r in pair]
        coefficients = weigh([reward(t) for t in texts], [len(t) for t in texts])
        for text, c in zip(texts, coefficients, strict=True):
            total = total + mass * np.tensordot(np.broadcast_to(c, len(text)), gradients[text], 1)
    return total


def group_scaled(rewards):
    r = np.array(rewards)
    return (r - r.mean()) / (r.std(ddof=1) + 1e-4) if r.std() > 0 else r * 0


def test_grpo_is_what_its_equation_says(policy, world):
    """Biased: each group is divided by its own spread, and a token's share falls with the tokens of the batch."""
    algorithm, engines = make("grpo", policy, num_samples=2)
    found = expected_gradient(algorithm, engines, world)
    stated = by_equation(world, lambda r, n: -group_scaled(r) / sum(n))
    np.testing.assert_allclose(found, stated, **CLOSE)
    exact = -world.objective_gradient(reward)
    cosine = (found * exact).sum() / np.linalg.norm(found) / np.linalg.norm(exact)
    assert 0.5 < cosine < 0.999, "biased, but not against the gradient"


def test_grpo_as_in_the_paper(policy, world):
    algorithm, engines = make("grpo", policy, num_samples=2, aggregation="sequence")
    found = expected_gradient(algorithm, engines, world)
    stated = by_equation(world, lambda r, n: -group_scaled(r) / np.array(n) / 2)
    np.testing.assert_allclose(found, stated, **CLOSE)


@pytest.mark.parametrize("name", ["dapo", "cispo"])
def test_on_policy_dapo_and_cispo_have_the_gradient_of_grpo(policy, world, name):
    algorithm, engines = make(name, policy, num_samples=2)
    found = expected_gradient(algorithm, engines, world)
    stated = by_equation(world, lambda r, n: -group_scaled(r) / sum(n))
    np.testing.assert_allclose(found, stated, **CLOSE)


def test_gspo_on_policy(policy, world):
    """Biased by 1 / length as well: the ratio is a geometric mean."""
    algorithm, engines = make("gspo", policy, num_samples=2)
    found = expected_gradient(algorithm, engines, world)
    stated = by_equation(world, lambda r, n: -group_scaled(r) / np.array(n) / 2)
    np.testing.assert_allclose(found, stated, **CLOSE)


def test_reinforce_pp_is_what_its_equation_says(policy, world):
    """Biased: the mean and deviation of the batch hold the response itself, and long responses count more in both."""

    def weigh(rewards, lengths):
        tokens = np.repeat(rewards, lengths)
        white = (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-8)
        return np.split(-white / len(tokens), np.cumsum(lengths)[:-1])

    algorithm, engines = make("reinforce_pp", policy, kl_coef=0.0)
    found = expected_gradient(algorithm, engines, world, whole=True)
    np.testing.assert_allclose(found, by_equation(world, weigh), **CLOSE)


def test_ppo_is_what_its_equation_says(policy, world):
    values = Table("value", seed=5)

    def weigh_pair(pair):
        advantages, lengths = [], []
        for response in pair:
            n = len(response)
            v = [values.table[row, 0].item() for row in rows_of(response)]
            r = [0.0] * (n - 1) + [reward(response)]
            delta = [r[t] + 0.9 * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
            advantages += [sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]  # fmt: skip
            lengths.append(n)
        a = np.array(advantages)
        white = (a - a.mean()) / np.sqrt(a.var() + 1e-8)
        return np.split(-white / len(a), np.cumsum(lengths)[:-1])

    algorithm, engines = make("ppo", policy, value=values, kl_coef=0.0, gamma=0.9, gae_lambda=0.8)
    found = expected_gradient(algorithm, engines, world, whole=True)
    gradients = {r: world.token_gradients(r) for r in RESPONSES}
    stated = 0.0
    for mass, pair in groups(world, 2):
        texts = [tuple(r.response_ids) for r in pair]
        for text, c in zip(texts, weigh_pair(texts), strict=True):
            stated = stated + mass * np.tensordot(c, gradients[text], 1)
    np.testing.assert_allclose(found, stated, **CLOSE)


def rows_of(response):
    return [row_of(response[:t]) for t in range(len(response))]


def test_gae_with_exact_values_is_the_exact_advantage(world):
    """E[A_t | prefix, token] = Q - V for every lambda when V is exact; with any V when lambda is 1."""
    for lam in (0.0, 0.5, 0.95, 1.0):
        for wrong in (0.0, 3.0) if lam == 1.0 else (0.0,):
            sums, masses = {}, {}
            for r in RESPONSES:
                n, p = len(r), world.probability(r)
                v = [world.value(reward, r[:t]) + wrong * t for t in range(n)]
                v = torch.tensor(v, dtype=torch.float64)
                rewards = torch.zeros(n, dtype=torch.float64)
                rewards[-1] = reward(r)
                advantages, _ = gae(rewards, v, 1.0, lam)
                for t in range(n):
                    key = r[: t + 1]
                    sums[key] = sums.get(key, 0.0) + p * advantages[t].item()
                    masses[key] = masses.get(key, 0.0) + p
            for key, total in sums.items():
                # Q(prefix, token) = V of the longer prefix, or the reward where that is a whole response.
                q = reward(key) if key in RESPONSES else world.value(reward, key)
                shift = wrong * (len(key) - 1)
                exact = q - world.value(reward, key[:-1]) - shift
                assert total / masses[key] == pytest.approx(exact, abs=1e-10), (lam, key)


def test_gae_advantages_make_an_unbiased_gradient(world):
    """sum_t A_t d l_t: unbiased with exact values for any lambda, and with wrong ones only for lambda = 1."""
    exact = world.objective_gradient(reward)

    def gradient(lam, wrong):
        def one(r):
            v = [world.value(reward, r[:t]) + wrong * (t + 1) for t in range(len(r))]
            v = torch.tensor(v, dtype=torch.float64)
            rewards = torch.zeros(len(r), dtype=torch.float64)
            rewards[-1] = reward(r)
            advantages, _ = gae(rewards, v, 1.0, lam)
            return np.tensordot(advantages.numpy(), world.token_gradients(r), 1)

        return world.expect(one)

    for lam in (0.0, 0.95, 1.0):
        np.testing.assert_allclose(gradient(lam, 0.0), exact, **CLOSE)
    np.testing.assert_allclose(gradient(1.0, 2.0), exact, **CLOSE)
    assert np.abs(gradient(0.5, 2.0) - exact).max() > 1e-2, "a wrong value model biases lambda < 1"


def test_the_value_model_learns_the_expected_return(policy, world):
    """The value loss is least at V: there its expected gradient is zero, elsewhere not."""
    exact = Table("value", seed=6)
    with torch.no_grad():
        for prefix, _ in world.prefixes():
            exact.table[rows_of((*prefix, 0))[-1], 0] = world.value(reward, prefix)
    for values, is_exact in ((exact, True), (Table("value", seed=7), False)):
        algorithm, engines = make(
            "ppo", policy, value=values, kl_coef=0.0, gae_lambda=1.0, value_clip=0.0
        )
        found = expected_gradient(algorithm, engines, world, size=1, role="value")
        # By hand: 1/T sum_t (V - R) on the visited rows.
        stated = np.zeros_like(found)
        for r in RESPONSES:
            for row in rows_of(r):
                v = values.table[row, 0].item()
                stated[row, 0] += world.probability(r) * (v - reward(r)) / len(r)
        np.testing.assert_allclose(found, stated, **CLOSE)
        if is_exact:  # weighed by length: the token mean is not the mean over states
            plain = world.expect(lambda r, values=values: sum_rows(values, r))
            np.testing.assert_allclose(plain, 0.0, atol=1e-10)


def sum_rows(values, response):
    out = np.zeros(len(values.table))
    for row in rows_of(response):
        out[row] += values.table[row, 0].item() - reward(response)
    return out


class Moves:
    """A policy that samples as one table and then becomes another."""

    def __init__(self, start, end):
        self.policy = Table(seed=start)
        self.sampled, self.end = World(Table(seed=start)), Table(seed=end, scale=0.7)

    def move(self):
        with torch.no_grad():
            self.policy.table.copy_(self.end.table)


def test_rloo_stays_unbiased_off_policy(reference):
    """Its ratio is that of the whole response, so samples of an older policy give the gradient of the present one."""
    moves = Moves(1, 3)
    algorithm, engines = make(
        "rloo", moves.policy, num_samples=2, kl_coef=0.0, clip_low=1.0, clip_high=1e6
    )
    found = expected_gradient(algorithm, engines, moves.sampled, move=moves.move)
    exact = World(moves.end).objective_gradient(reward)
    np.testing.assert_allclose(found, -exact, **CLOSE)


def test_a_ratio_per_token_is_biased_off_policy():
    """It leaves out how often the older policy came to the prefix: stated in the equation, and so it is."""
    moves = Moves(1, 3)
    algorithm, engines = make("dr_grpo", moves.policy, num_samples=2, clip_low=1.0, clip_high=1e6)
    found = expected_gradient(algorithm, engines, moves.sampled, move=moves.move)
    old, new = moves.sampled, World(moves.end)
    stated = 0.0
    for mass, pair in groups(old, 2):
        texts = [tuple(r.response_ids) for r in pair]
        mean = sum(map(reward, texts)) / 2
        for text in texts:
            ratio = np.exp(new.logprobs(text) - old.logprobs(text))
            coefficient = -(reward(text) - mean) * ratio / (2 * LENGTH)
            stated = stated + mass * np.tensordot(coefficient, new.token_gradients(text), 1)
    np.testing.assert_allclose(found, stated, **CLOSE)
    exact = -new.objective_gradient(reward) / 2 / LENGTH
    assert np.abs(found - exact).max() > 1e-3


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_in_the_loss_has_the_gradient_of_the_divergence_at_each_state(world, reference, kind):
    """For samples of this policy and of an older one; the states' own frequencies carry no gradient (documented)."""
    other = World(reference)
    for end in (1, 3):
        moves = Moves(1, end)
        if end == 1:
            moves.end = Table(seed=1)
        now = World(moves.end)
        algorithm, engines = make(
            "dr_grpo", moves.policy, reference, num_samples=2, kl_coef=1.0, kl_kind=kind
        )
        found = expected_gradient(
            algorithm, engines, moves.sampled, move=moves.move, reward=lambda r: 1.0
        )
        stated = np.zeros_like(found)
        for prefix, mass in moves.sampled.prefixes():
            p, q = now.distribution(prefix), other.distribution(prefix)
            d = np.log(p / q)
            # d/dz of sum_v p_v (log p_v - log q_v), through the softmax's Jacobian.
            stated[rows_of((*prefix, 0))[-1]] += mass * p * (d - (p * d).sum())
        np.testing.assert_allclose(found, stated / LENGTH, **CLOSE)


def test_the_naive_losses_have_another_gradient(world, reference):
    """What the correction is for: k1 as a loss pulls nowhere, k3 pulls along the reverse divergence."""
    other, by_kind = World(reference), {}
    for kind, slope in (
        ("k1", lambda d: 1.0),
        ("k3", lambda d: 1 - np.exp(-d)),
        ("k2", lambda d: d),
    ):
        by_kind[kind] = world.expect(
            lambda r, slope=slope: np.tensordot(
                np.broadcast_to(slope(world.logprobs(r) - other.logprobs(r)), len(r)),
                world.token_gradients(r),
                1,
            )
        )
    np.testing.assert_allclose(by_kind["k1"], 0.0, atol=1e-12)
    assert np.abs(by_kind["k3"] - by_kind["k2"]).max() > 1e-2


def test_kl_in_the_reward_is_exact_for_k1_only(policy, world, reference):
    """k2 and k3 as a reward miss the gradient of the estimator itself, E[d k]; k1's is zero."""
    other = World(reference)
    exact = world.objective_gradient(lambda r: kl_of(world, other, r))
    slopes = {"k1": lambda d: 1.0 + 0 * d, "k2": lambda d: d, "k3": lambda d: 1 - np.exp(-d)}
    values = {"k1": lambda d: d, "k2": lambda d: d**2 / 2, "k3": lambda d: np.exp(-d) - 1 + d}
    for kind in ("k1", "k2", "k3"):
        algorithm, engines = make(
            "rloo", policy, reference, num_samples=2, kl_coef=1.0, kl_kind=kind
        )
        found = expected_gradient(algorithm, engines, world, reward=lambda r: 0.0)

        def gap(r):
            return world.logprobs(r) - other.logprobs(r)

        missing = world.expect(
            lambda r, kind=kind: np.tensordot(slopes[kind](gap(r)), world.token_gradients(r), 1)
        )
        whole = missing + world.objective_gradient(lambda r, kind=kind: values[kind](gap(r)).sum())
        np.testing.assert_allclose(found, whole - missing, **CLOSE)
        is_exact = np.abs(found - exact).max() < 1e-10
        assert is_exact == (kind == "k1"), kind


def test_the_entropy_bonus_has_the_gradient_of_the_entropy(policy, world):
    algorithm, engines = make("dr_grpo", policy, num_samples=2, entropy_coef=0.5)
    found = expected_gradient(algorithm, engines, world, reward=lambda r: 1.0)
    stated = np.zeros_like(found)
    for prefix, mass in world.prefixes():
        p = world.distribution(prefix)
        entropy = -(p * np.log(p)).sum()
        stated[rows_of((*prefix, 0))[-1]] += mass * -p * (np.log(p) + entropy)
    np.testing.assert_allclose(found, -0.5 * stated / LENGTH, **CLOSE)


def test_the_sequence_weight_corrects_a_sampler_that_differs():
    """Samples of another policy, weighed by the product of l_old - l_rollout, give the exact gradient; bounds bias it."""
    policy, sampler = Table(seed=1), World(Table(seed=4, scale=0.8))
    exact = -World(policy).objective_gradient(reward)
    free = {"num_samples": 2, "kl_coef": 0.0}
    algorithm, engines = make(
        "rloo", policy, **free, off_policy="sequence_truncate", off_policy_high=1e9
    )
    np.testing.assert_allclose(expected_gradient(algorithm, engines, sampler), exact, **CLOSE)
    algorithm, engines = make("rloo", policy, **free)
    assert np.abs(expected_gradient(algorithm, engines, sampler) - exact).max() > 1e-2


@pytest.mark.parametrize(
    "kind", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
def test_bounded_weights_have_the_bias_that_their_bounds_say(kind):
    policy, sampler = Table(seed=1), World(Table(seed=4, scale=0.8))
    now = World(policy)
    algorithm, engines = make(
        "rloo",
        policy,
        num_samples=2,
        kl_coef=0.0,
        off_policy=kind,
        off_policy_low=0.7,
        off_policy_high=1.4,
    )
    found = expected_gradient(algorithm, engines, sampler)
    stated = 0.0
    for mass, pair in groups(sampler, 2):
        texts = [tuple(r.response_ids) for r in pair]
        for text, rival in zip(texts, reversed(texts), strict=True):
            w = np.exp(now.logprobs(text) - sampler.logprobs(text))
            if kind.startswith("sequence"):
                w = np.full(len(text), w.prod())
            w = np.minimum(w, 1.4) if kind.endswith("truncate") else w * ((w >= 0.7) & (w <= 1.4))
            # The response is one action: its ratio carries the gradient of all its tokens, the weights their mean.
            scale = -(reward(text) - reward(rival)) * w.mean() / 2
            stated = stated + mass * scale * now.score_function(text)
    np.testing.assert_allclose(found, stated, **CLOSE)


def test_sampled_gradients_agree_with_the_exact_one(world, policy):
    """4,000 sampled pairs: within 4 standard errors of the exact gradient in every coordinate that moves."""
    noise = np.random.default_rng(0)
    mass = np.array([world.probability(r) for r in RESPONSES])
    picks = noise.choice(len(RESPONSES), size=(4000, 2), p=mass)
    scores = [world.score_function(r) for r in RESPONSES]
    rows = torch.tensor(
        [[reward(RESPONSES[i]) for i in pair] for pair in picks], dtype=torch.float64
    )
    advantages = group_advantages(rows, scale_by_std=False)[0].numpy()
    samples = np.array(
        [
            sum(a * scores[i] for a, i in zip(row, pair, strict=True))
            for row, pair in zip(advantages, picks, strict=True)
        ]
    )
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    exact = world.objective_gradient(reward)  # (n - 1) / n x 2 responses
    moves = error > 0
    z = (samples.mean(axis=0) - exact)[moves] / error[moves]
    # 4 standard errors: about 1 in 16,000 per coordinate, 21 coordinates.
    assert np.abs(z).max() < 4
    assert np.abs((samples.mean(axis=0) - 1.3 * exact)[moves] / error[moves]).max() > 4


def test_the_rollouts_of_the_world_are_what_they_seem(world):
    rollout = rollout_of((1, END), world)
    assert (
        rollout.finish_reason == "stop" and rollout_of((1, 2, 1), world).finish_reason == "length"
    )
    assert rollout.rollout_logprobs.exp().prod().item() == pytest.approx(
        world.probability((1, END))
    )

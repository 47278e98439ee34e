"""One case by hand for every algorithm: rewards 3 and 1, responses of two tokens and one, ratios 1.5, 0.8 and 2.

l_old = (-1, -2 | -1), l_ref = (-1.5, -2 | -1), so the KL by k1 is (0.5, 0 | 0); clips 0.2 below and 0.3 above; the KL weighs
0.2 where it is part of the reward; at most 8 tokens; the greedy response is worth 2; V = (0.5, 1 | 0), gamma 1, lambda 0.5.
"""

import math

import pytest
import torch
from checklist import noticed
from test_policy import Scripted

from distllm import registry
from distllm.rl import advantages
from distllm.rl import algorithm as base
from distllm.rl.algorithms import cispo, gspo, ppo, remax
from distllm.testing.rl import make_algorithm, make_rollout
from distllm.testing.tiny import tiny_decoder

OLD, REF, VALUES = [[-1.0, -2.0], [-1.0]], [[-1.5, -2.0], [-1.0]], [[0.5, 1.0], [0.0]]
RATIOS = [1.5, 0.8, 2.0]
NEW = [old + math.log(ratio) for old, ratio in zip([-1.0, -2.0, -1.0], RATIOS, strict=True)]
IN_REWARD = {"kl_coef": 0.2}

a = 1 / (math.sqrt(2) + 1e-4)
"""GRPO: (3 - 2) / (std of 3 and 1 + 1e-4); the other response has -a."""

# name -> (settings, advantages per token, loss)
HAND = {
    # max(-1.5a, -1.3a) = -1.3a;  -0.8a;  max(2a, 1.3a) = 2a;  over 3 tokens
    "grpo": ({}, [a, a, -a], (-1.3 - 0.8 + 2) * a / 3),
    # the same with advantages 1 and -1, over 2 responses x 8 tokens
    "dr_grpo": ({}, [1, 1, -1], (-1.3 - 0.8 + 2) / 16),
    "dapo": ({}, [a, a, -a], (-1.3 - 0.8 + 2) * a / 3),
    # rho = sqrt(1.5 x 0.8) inside the clip, and 2;  over 2 responses
    "gspo": ({}, [a, a, -a], (-math.sqrt(1.2) + 2) * a / 2),
    # weights 1.3, 0.8, 1.3, times log-probabilities
    "cispo": ({}, [a, a, -a], -(1.3 * NEW[0] + 0.8 * NEW[1] - 1.3 * NEW[2]) * a / 3),
    # r = 3 - 0.2 x 0.5 = 2.9 against 1;  rho = 1.2 and 2;  over 2 responses
    "rloo": (IN_REWARD, [1.9, 1.9, -1.9], (-1.9 * 1.2 + 1.9 * 2) / 2),
    # G = (-0.1 + 3, 3 | 1), mean 2.3, variance (0.36 + 0.49 + 1.69) / 3
    "reinforce_pp": (
        IN_REWARD,
        [x / math.sqrt(2.54 / 3) for x in (0.6, 0.7, -1.3)],
        (-1.3 * 0.6 - 0.8 * 0.7 + 2 * 1.3) / math.sqrt(2.54 / 3) / 3,
    ),
    # G - 2 = (0.9, 1 | -1);  over 2 responses x 8 tokens
    "remax": (IN_REWARD, [0.9, 1.0, -1.0], (-1.3 * 0.9 - 0.8 + 2) / 16),
    # delta = (-0.1 + 1 - 0.5, 3 - 1 | 1);  A = (0.4 + 0.5 x 2, 2 | 1), mean 22/15
    "ppo": (
        IN_REWARD | {"gae_lambda": 0.5},
        [x / math.sqrt(0.38 / 2.25) for x in (-1 / 15, 8 / 15, -7 / 15)],
        (1.5 / 15 - 0.8 * 8 / 15 + 2 * 7 / 15) / math.sqrt(0.38 / 2.25) / 3,
    ),
}  # fmt: skip


def tensors(rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def check_by_hand(name, monkeypatch):
    settings, expected, loss = HAND[name]
    made = make_algorithm(
        name, tiny_decoder(), num_samples=2, clip_low=0.2, clip_high=0.3, **settings
    )
    known = {"policy": OLD, "reference": REF, "value": VALUES}
    for module in (base, ppo):
        for scorer in ("score_logprobs", "score_values"):
            if hasattr(module, scorer):
                monkeypatch.setattr(module, scorer, lambda engine, *_: tensors(known[engine]))
    rollouts = [
        make_rollout([1], [3, 4], reward=3.0, baseline=2.0),
        make_rollout([1], [5], reward=1.0, baseline=2.0),
    ]
    made.prepare(rollouts, {name: name for name in known})
    found = torch.cat([r.advantages for r in rollouts])
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    batch = made.policy.collate(rollouts)
    out = made.policy.loss(Scripted(NEW), batch)
    value = out.losses["policy"] / made.policy.weights(batch)["policy"]
    assert value.item() == pytest.approx(loss, abs=1e-6)
    if name == "ppo":
        returns = [r.returns.tolist() for r in rollouts]
        assert returns[0] == pytest.approx([1.9, 3.0]) and returns[1] == pytest.approx([1.0])


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_by_hand(name, monkeypatch):
    check_by_hand(name, monkeypatch)


BUGS = {
    # NeMo's reading of REINFORCE++: only the token's own KL, no return-to-go.
    "reinforce_pp": (advantages, "out[t] = following = reward + gamma * following", "out[t] = reward"),
    "rloo": (advantages, "centred * count / (count - 1).clamp(min=1)", "centred"),
    "dr_grpo": (advantages, "centred = centred / (variance.sqrt() + eps)", "pass"),
    # verl's reading: from below as well, and at the bound itself.
    "cispo": (cispo, "low, high = 1 - self.options.clip_low, 1 + self.options.clip_high", "low, high = 1.0, self.options.clip_high"),
    "gspo": (gspo, "mean=True", "mean=False"),
    "remax": (remax, "returns_to_go(rewards, self.options.gamma) - rollout.baseline", "returns_to_go(rewards, self.options.gamma)"),
    "ppo": (advantages, "gamma * lam * next_advantage", "gamma * next_advantage"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_item_27_same_name_same_mathematics(name, monkeypatch):
    """REINFORCE++, RLOO, Dr. GRPO and CISPO mean what their card says, not what another framework does."""
    check_by_hand(name, monkeypatch)
    module, old, new = BUGS[name]
    if name == "dr_grpo":  # the bug is to divide: switch the division on, as TRL's loss_type does
        monkeypatch.setitem(HAND, name, (HAND[name][0] | {"scale_by_std": True}, *HAND[name][1:]))
        with pytest.raises(AssertionError):
            check_by_hand(name, monkeypatch)
        return
    noticed(lambda: check_by_hand(name, monkeypatch), module, old, new)

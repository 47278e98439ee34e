"""ReMax: the baseline of a response is the reward of the greedy response to the same prompt.

    A_t = (sum over s >= t of r_s) - reward of the greedy response

Reference: Li et al. 2023, arXiv 2310.10505.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distllm.engines.base import Engine
from distllm.registry import register
from distllm.rl.advantages import returns_to_go
from distllm.rl.algorithm import Algorithm
from distllm.rl.card import Card
from distllm.rl.options import RLOptions
from distllm.types import Rollout


@dataclass(kw_only=True, slots=True)
class ReMaxOptions(RLOptions):
    """ReMax: a greedy baseline."""

    name: str = "remax"
    num_samples: int = 1
    kl_coef: float = 0.05
    kl_in: str = "reward"
    aggregation: str = "constant"
    gamma: float = 1.0
    """Discount per token."""


@register("algorithm")
class ReMax(Algorithm):
    """Policy only; one more, greedy, response per prompt."""

    Options = ReMaxOptions
    samples_greedy = True
    options: ReMaxOptions
    card = Card(
        equation="""
r_t = -kl_coef (l_old_t - l_ref_t), and the reward on the last sampled token
G_t = r_t + gamma G_{t+1}
A_t = G_t - b, b = the reward of the greedy response to the prompt, without KL
rho_t = exp(l_t - l_old_t)
loss = sum over tokens of max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high))
       / (responses x generation.max_new_tokens)
a prompt whose greedy response could not be scored is left out""",
        paper="Li et al. 2023, arXiv 2310.10505",
        expectation="The exact policy gradient on policy, divided by generation.max_new_tokens, also with the KL in the "
        "reward (k1).",
        sources={
            "num_samples": "arXiv 2310.10505: one, beside the greedy one",
            "kl_coef": "as TRL's PPO and RLOO: 0.05",
            "kl_in": "arXiv 2310.10505: per token, in the reward",
            "aggregation": "arXiv 2310.10505: a sum over tokens, up to a constant",
            "gamma": "1, as in every framework compared",
        },
        differences={
            "verl": "has ReMax; its loss is a mean over tokens unless told otherwise.",
            "TRL": "has no ReMax.",
            "OpenRLHF": "has no ReMax.",
        },
    )

    def set_advantages(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Compare the returns with the greedy response's reward."""
        baselines = []
        for rollout in rollouts:
            if not math.isfinite(rollout.baseline):
                rollout.reward = math.nan
            rewards = self.token_rewards(rollout)
            advantages = returns_to_go(rewards, self.options.gamma) - rollout.baseline
            if not math.isfinite(rollout.reward):
                advantages = torch.zeros_like(advantages)
            else:
                baselines.append(rollout.baseline)
            rollout.advantages = advantages.to(rollout.rollout_logprobs.dtype)
        mean = sum(baselines) / len(baselines) if baselines else 0.0
        return {"rl/greedy_reward": mean}

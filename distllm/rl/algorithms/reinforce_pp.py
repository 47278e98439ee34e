"""REINFORCE++: no value model and no groups; returns are whitened over the whole batch.

    A_t = whitened (sum over s >= t of r_s), where r_s is the KL penalty, plus the reward on the last token

Reference: Hu et al. 2025, arXiv 2501.03262.
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
from distllm.rl.algorithms.ppo import whiten_advantages
from distllm.rl.card import Card
from distllm.rl.options import RLOptions
from distllm.types import Rollout


@dataclass(kw_only=True, slots=True)
class ReinforcePPOptions(RLOptions):
    """REINFORCE++: whitened returns."""

    name: str = "reinforce_pp"
    num_samples: int = 1
    kl_coef: float = 0.01
    kl_in: str = "reward"
    gamma: float = 1.0
    """Discount per token."""


@register("algorithm")
class ReinforcePP(Algorithm):
    """Policy only; the batch is the baseline."""

    Options = ReinforcePPOptions
    options: ReinforcePPOptions
    card = Card(
        equation="""
r_t = -kl_coef (l_old_t - l_ref_t), and the reward on the last sampled token
G_t = r_t + gamma G_{t+1}
A_t = (G_t - mean of G) / std of G, over all tokens of the batch (divisor n)
rho_t = exp(l_t - l_old_t)
loss = mean over tokens of max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high))""",
        paper="Hu et al. 2025, arXiv 2501.03262",
        expectation="Biased: the batch's mean and deviation hold the response itself, and long responses count more in "
        "both.",
        sources={
            "num_samples": "one response per prompt: the batch is the baseline",
            "kl_coef": "OpenRLHF: 0.01",
            "kl_in": "arXiv 2501.03262: per token, in the reward",
            "gamma": "1, as in every framework compared",
        },
        differences={
            "OpenRLHF": "the same return-to-go; so have verl and slime.",
            "NeMo": "subtracts each token's own KL from the reward instead of the return-to-go: another estimator "
            "under the same name.",
            "TRL": "has no REINFORCE++.",
        },
    )

    def set_advantages(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Whiten the returns over the batch."""
        for rollout in rollouts:
            rewards = self.token_rewards(rollout)
            if not math.isfinite(rollout.reward):
                rewards = torch.zeros_like(rewards)
            returns = returns_to_go(rewards, self.options.gamma)
            rollout.advantages = returns.to(rollout.rollout_logprobs.dtype)
        whiten_advantages(rollouts)
        return {}

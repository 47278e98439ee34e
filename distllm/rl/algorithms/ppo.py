"""Proximal policy optimization with a separate value model.

    token reward = -kl_coef * (l_old - l_ref), plus the response's reward on its last token
    A by generalised advantage estimation, whitened over the whole batch;  R = A + V before whitening
    value loss = 1/2 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)

Reference: Schulman et al. 2017, arXiv 1707.06347; for language models Ouyang et al. 2022, arXiv 2203.02155.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.engines.base import Engine
from distllm.registry import register
from distllm.rl.advantages import gae, whiten
from distllm.rl.algorithm import Algorithm
from distllm.rl.card import Card
from distllm.rl.layout import Join, collate_rollouts, response_tokens
from distllm.rl.options import RLOptions
from distllm.rl.scoring import explained_variance, score_last_values, score_values, token_values
from distllm.types import Batch, LossOutput, Model, Objective, Rollout


@dataclass(kw_only=True, slots=True)
class PPOOptions(RLOptions):
    """PPO: advantages from a learned value model."""

    name: str = "ppo"
    num_samples: int = 1
    num_epochs: int = 2
    kl_coef: float = 0.05
    kl_in: str = "reward"
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """0 trusts the value model, 1 the sampled return."""
    bootstrap_truncated: bool = False
    """Where a response was cut by the token budget, let the value of its last state stand for what would have
    followed; otherwise it counts as ended."""
    value_clip: float = 0.2
    """Values may move by at most this from those before the update; 0 switches the clip off."""
    value_lr: float = 0.0
    """Learning rate of the value model; 0 takes `optim.lr`."""
    value_warmup_steps: int = 0
    """Steps at the start in which only the value model learns."""


class ValueObjective:
    """Clipped squared error of the values, halved; weight: the response tokens that are learned from."""

    coefficients: Mapping[str, float] = {"value": 1.0}

    def __init__(self, options: PPOOptions, join: Join, pad_id: int) -> None:
        self.options, self.join, self.pad_id = options, join, pad_id

    def collate(self, examples: Sequence[Rollout]) -> Batch:
        """Lay out rollouts."""
        return collate_rollouts(examples, self.join, self.pad_id, self.options.pack)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count response tokens."""
        return {"value": response_tokens(batch, "token", 1).total}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Regress the values on the returns."""
        tokens = response_tokens(batch, "token", 1)
        values = tokens.take(token_values(model, batch))
        returns, old = tokens.take(batch.returns), tokens.take(batch.old_values)
        error = (values - returns).square()
        clipped = torch.zeros_like(tokens.learned)
        if self.options.value_clip:
            limit = self.options.value_clip
            near = old + (values - old).clamp(-limit, limit)
            clipped = (near - returns).square() > error
            error = torch.maximum(error, (near - returns).square())
        share = (clipped & tokens.learned).double().sum(), tokens.total
        return LossOutput({"value": 0.5 * (error * tokens.learned).sum()}, {"rl/value_clip": share})


@register("algorithm")
class PPO(Algorithm):
    """Policy and value model, each with its own engine and optimizer."""

    Options = PPOOptions
    trains_value = True
    options: PPOOptions
    card = Card(
        equation="""
rho_t = exp(l_t - l_old_t)
policy loss = mean over tokens of max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high))
r_t = -kl_coef (l_old_t - l_ref_t), and the reward on the last sampled token
delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma gae_lambda A_{t+1};   R_t = A_t + V_t
A is whitened over the whole batch (mean 0, variance 1, divisor n), R is not
value loss = 1/2 mean over tokens of max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2)""",
        paper="Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155",
        expectation="Without whitening, and with exact values or gae_lambda = 1, sum_t A_t d l_t is unbiased. A wrong "
        "value model biases gae_lambda < 1; whitening over the batch and the mean over tokens rescale.",
        sources={
            "num_samples": "one response per prompt: the value model is the baseline",
            "num_epochs": "between the 4 of OpenAI's code and the 1 of verl and OpenRLHF",
            "kl_coef": "TRL's PPO: 0.05, fixed",
            "kl_in": "in the reward, where k1 is unbiased; as in most frameworks",
            "gamma": "1, as in every framework compared",
            "gae_lambda": "0.95, as in OpenAI's code, TRL's PPO and NeMo; verl and OpenRLHF: 1",
            "bootstrap_truncated": "a cut response counts as ended, so that its reward is all there is",
            "value_clip": "0.2, as in OpenAI's code and TRL's PPO; verl and OpenRLHF: 0.5",
            "value_lr": "that of the policy; OpenRLHF: 9e-6 against the policy's 1e-6, verl: 1e-5",
            "value_warmup_steps": "none",
        },
        differences={
            "TRL": "its PPO was removed in 2026; it put the reward one token past the end token and whitened "
            "advantages per process. Ours puts it on the last sampled token and whitens over all.",
            "verl": "gamma = lambda = 1, no KL, dual clip 3 always on, value clip 0.5, unbiased variance in whitening.",
            "OpenRLHF": "gamma = lambda = 1, KL 0.01, rewards clipped to +-10; tokens of an environment decay by "
            "gamma lambda instead of being stepped over.",
        },
    )

    def __init__(self, options: PPOOptions, *, join: Join, pad_id: int, **kwargs: Any) -> None:
        super().__init__(options, join=join, pad_id=pad_id, **kwargs)
        self.value = ValueObjective(options, join, pad_id)

    def objectives(self) -> dict[str, Objective]:
        """Return the objectives of both engines."""
        return {"policy": self.policy, "value": self.value}

    def set_advantages(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in old values, returns and whitened advantages."""
        options = self.options
        args = (self.join, self.pad_id, self.batch_size)
        values = score_values(engines["value"], rollouts, *args)
        last = [0.0] * len(rollouts)
        if options.bootstrap_truncated:
            last = score_last_values(engines["value"], rollouts, *args)
        for rollout, value, last_value in zip(rollouts, values, last, strict=True):
            rollout.old_values = value
            rewards = self.token_rewards(rollout)
            if not math.isfinite(rollout.reward):
                rewards = torch.zeros_like(rewards)
            ended = rollout.finish_reason != "length"
            advantages, returns = gae(
                rewards,
                value,
                options.gamma,
                options.gae_lambda,
                0.0 if ended else last_value,
                None if rollout.loss_mask is None else rollout.loss_mask.tolist(),
            )
            rollout.advantages = advantages.to(value.dtype)
            rollout.returns = returns.to(value.dtype)
        whiten_advantages(rollouts)
        learned = [r for r in rollouts if math.isfinite(r.reward)]
        if not learned:
            return {}
        known = torch.cat([_sampled(r, r.old_values) for r in learned])
        returns = torch.cat([_sampled(r, r.returns) for r in learned])
        return {
            "rl/explained_variance": explained_variance(known, returns),
            "rl/value_mean": known.mean().item(),
            "rl/return_mean": returns.mean().item(),
        }


def whiten_advantages(rollouts: Sequence[Rollout]) -> None:
    """Bring the advantages to mean 0 and variance 1 over all tokens that are learned from; others become 0."""
    learned = [r for r in rollouts if math.isfinite(r.reward)]
    parts = [_sampled(r, r.advantages) for r in learned]
    flat = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
    white = whiten(flat).split([len(p) for p in parts])
    if len(flat.unique()) == 1:  # exactly 0: what rounding leaves of equal ones would be blown up
        white = torch.zeros_like(flat).split([len(p) for p in parts])
    for rollout in rollouts:
        assert rollout.advantages is not None
        rollout.advantages = torch.zeros_like(rollout.advantages)
    for rollout, part in zip(learned, white, strict=True):
        assert rollout.advantages is not None
        if rollout.loss_mask is None:
            rollout.advantages = part.clone()
        else:
            rollout.advantages[rollout.loss_mask] = part


def _sampled(rollout: Rollout, field: Tensor | None) -> Tensor:
    """Leave out what an environment said."""
    assert field is not None
    return field if rollout.loss_mask is None else field[rollout.loss_mask]

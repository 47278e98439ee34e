"""Proximal policy optimization with a separate value model.

    token reward = -kl_coef * (l_old - l_ref), plus the response's score on its last token
    A by generalised advantage estimation, whitened over the whole batch;  R = A + V before whitening
    value loss = 1/2 max((V - R)^2, (clip(V, V_old - value_clip, V_old + value_clip) - R)^2)

Reference: Schulman et al. 2017, arXiv 1707.06347; for language models Ouyang et al. 2022, arXiv 2203.02155.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.engines.base import Engine
from distllm.registry import register
from distllm.rl.advantages import gae, whiten
from distllm.rl.algorithm import Algorithm
from distllm.rl.objective import Join, collate_rollouts
from distllm.rl.options import RLOptions
from distllm.rl.scoring import explained_variance, score_values, token_values
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model, Objective, Rollout


@dataclass(kw_only=True, slots=True)
class PPOOptions(RLOptions):
    """PPO: advantages from a learned value model."""

    name: str = "ppo"
    num_samples: int = 1
    num_epochs: int = 2
    kl_coef: float = 0.05
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """0 trusts the value model, 1 the sampled return."""
    value_clip: float = 0.2
    """Values may move by at most this from those before the update; 0 switches the clip off."""
    value_lr: float = 0.0
    """Learning rate of the value model; 0 takes `optim.lr`."""
    value_warmup_steps: int = 0
    """Steps at the start in which only the value model learns."""
    whiten_rewards: bool = False
    """Scale the scores of each batch to variance 1, keeping their mean."""


class ValueObjective:
    """Clipped squared error of the values, halved; weight: response tokens."""

    coefficients: Mapping[str, float] = {"value": 1.0}

    def __init__(self, options: PPOOptions, join: Join, pad_id: int) -> None:
        self.options, self.join, self.pad_id = options, join, pad_id

    def collate(self, examples: Sequence[Rollout]) -> Batch:
        """Lay out rollouts."""
        return collate_rollouts(examples, self.join, self.pad_id)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count response tokens."""
        assert batch.labels is not None
        return {"value": (batch.labels != IGNORE_INDEX).sum().double()}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Regress the values on the returns."""
        assert batch.labels is not None and batch.returns is not None
        assert batch.old_values is not None
        mask = batch.labels != IGNORE_INDEX
        values = token_values(model, batch)
        error = (values - batch.returns).square()
        if self.options.value_clip:
            limit = self.options.value_clip
            clipped = batch.old_values + (values - batch.old_values).clamp(-limit, limit)
            error = torch.maximum(error, (clipped - batch.returns).square())
        return LossOutput({"value": 0.5 * (error * mask).sum()})


@register("algorithm")
class PPO(Algorithm):
    """Policy and value model, each with its own engine and optimizer; the KL is part of the reward."""

    Options = PPOOptions
    kl_in_loss = False
    trains_value = True
    options: PPOOptions

    def __init__(self, options: PPOOptions, *, join: Join, pad_id: int, **kwargs: Any) -> None:
        super().__init__(options, join=join, pad_id=pad_id, **kwargs)
        self.value = ValueObjective(options, join, pad_id)

    def objectives(self) -> dict[str, Objective]:
        """Return the objectives of both engines."""
        return {"policy": self.policy, "value": self.value}

    def prepare(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in old log-probabilities and values, then advantages and returns."""
        kl_coef = self.policy.kl_coef
        metrics = self.score(rollouts, engines)
        values = score_values(engines["value"], rollouts, self.join, self.pad_id, self.batch_size)
        scores = torch.tensor([r.reward for r in rollouts])
        scores = torch.nan_to_num(scores, nan=0.0)
        if self.options.whiten_rewards:
            scores = whiten(scores, shift_mean=False, all_sum=engines["policy"].all_sum)

        for rollout, score, value in zip(rollouts, scores, values, strict=True):
            token_rewards = torch.zeros(len(rollout.response_ids))
            if rollout.ref_logprobs is not None:
                token_rewards -= kl_coef * self.token_kl(rollout)
            token_rewards[-1] += score
            rollout.old_values = value
            rollout.advantages, rollout.returns = gae(
                token_rewards, value, self.options.gamma, self.options.gae_lambda
            )

        lengths = [len(r.response_ids) for r in rollouts]
        flat = torch.cat([r.advantages for r in rollouts])  # type: ignore[misc]
        white = whiten(flat, all_sum=engines["policy"].all_sum)
        for rollout, advantages in zip(rollouts, white.split(lengths), strict=True):
            rollout.advantages = advantages.clone()
        returns = torch.cat([r.returns for r in rollouts])  # type: ignore[misc]
        metrics["rl/explained_variance"] = explained_variance(torch.cat(values), returns)
        metrics["rl/value_mean"] = torch.cat(values).mean().item()
        return metrics

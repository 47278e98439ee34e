"""Group-relative policy optimization: each response is judged against the others to the same prompt.

    A = (r - mean of the group) / (std of the group + eps), the same for all tokens of a response

Reference: Shao et al. 2024, arXiv 2402.03300. Departures: token-mean aggregation and no KL term by default, as in
DAPO (arXiv 2503.14476); `stage.aggregation=sequence stage.kl_coef=0.04 stage.kl_kind=k3` is the paper's form. The KL
term has the gradient of the true divergence (arXiv 2506.09477), which the paper's k3 loss has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from distllm.engines.base import Engine
from distllm.registry import register
from distllm.rl.advantages import group_advantages
from distllm.rl.algorithm import Algorithm
from distllm.rl.options import RLOptions
from distllm.types import Rollout


@dataclass(kw_only=True, slots=True)
class GRPOOptions(RLOptions):
    """GRPO: advantages from groups, no value model."""

    name: str = "grpo"
    kl_kind: str = "k3"
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation; False is Dr. GRPO's choice (arXiv 2503.20783)."""
    advantage_eps: float = 1e-4
    """Added to that standard deviation."""


@register("algorithm")
class GRPO(Algorithm):
    """Policy only; the KL, if any, is a term of the loss."""

    Options = GRPOOptions
    kl_in_loss = True
    options: GRPOOptions

    def prepare(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in old log-probabilities and advantages; rollouts are ordered prompt by prompt."""
        metrics = self.score(rollouts, engines)
        rewards = torch.tensor([r.reward for r in rollouts]).view(-1, self.options.num_samples)
        advantages, zero_spread = group_advantages(
            rewards, self.options.scale_by_std, self.options.advantage_eps
        )
        for rollout, advantage in zip(rollouts, advantages.flatten(), strict=True):
            rollout.advantages = advantage.expand(len(rollout.response_ids)).clone()
        return metrics | {"rl/zero_spread": zero_spread}

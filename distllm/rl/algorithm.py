"""What an RL algorithm is: which engines it trains, with which objectives, and how rollouts become targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from distllm.engines.base import Engine
from distllm.rl.advantages import kl_estimate
from distllm.rl.card import Card
from distllm.rl.layout import Join, Tokens
from distllm.rl.objective import PolicyObjective
from distllm.rl.options import RLOptions
from distllm.rl.scoring import score_logprobs
from distllm.rl.surrogate import Surrogate, clipped, token_ratio
from distllm.types import Objective, Rollout


class Algorithm(ABC):
    """Base of the algorithms: old and reference log-probabilities, the KL and its controller, the clipped surrogate.

    An algorithm says how rewards become advantages (`set_advantages`) and, where it is not the token-wise clip, how a
    token's advantage becomes its loss (`surrogate`).
    """

    Options: type = RLOptions
    card: ClassVar[Card]
    trains_value = False
    compares_group = False
    """True: each response is judged against the others to its prompt, so one sample per prompt is not enough."""
    samples_greedy = False
    """True: each prompt is also answered greedily; that answer's reward becomes the rollouts' `baseline`."""

    def __init__(
        self,
        options: Any,
        *,
        join: Join,
        pad_id: int,
        temperature: float,
        batch_size: int,
        max_response_tokens: int,
        on_policy: bool = False,
    ) -> None:
        """Set up the policy's objective.

        Args:
            options: the stage's settings.
            join: lays prompts and responses out as the model's inputs.
            pad_id: fills rectangles; masked.
            temperature: of the sampling distribution, and so of every log-probability.
            batch_size: rollouts per no-gradient forward.
            max_response_tokens: the budget of a response, `generation.max_new_tokens`.
            on_policy: each batch of rollouts is used for one update only. Then the policy at the update is the one that
                sampled, and its log-probabilities need not be computed twice.
        """
        self.options = options
        self.join, self.pad_id, self.temperature = join, pad_id, temperature
        self.batch_size, self.on_policy = batch_size, on_policy
        self.policy = PolicyObjective(
            options,
            self.surrogate,
            join=join,
            pad_id=pad_id,
            temperature=temperature,
            max_response_tokens=max_response_tokens,
        )

    def objectives(self) -> dict[str, Objective]:
        """Return role -> objective of the engines this algorithm trains."""
        return {"policy": self.policy}

    @property
    def needs_reference(self) -> bool:
        """True when a frozen copy of the starting policy is wanted, be it to report the KL alone."""
        return self.penalises_kl or self.options.measure_kl

    @property
    def penalises_kl(self) -> bool:
        """True when the divergence from the reference is part of what is learned."""
        return self.options.kl_coef > 0 or self.options.target_kl > 0

    @property
    def max_rounds(self) -> int:
        """Most rounds of sampling for one batch of rollouts; further ones replace what `accept` refuses."""
        return 1

    def accept(self, rollouts: Sequence[Rollout]) -> bool:
        """Say whether the responses to one prompt are worth learning from; if not, another prompt is sampled."""
        return True

    def prepare(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in what the objectives need; return metrics. Runs once per batch of rollouts, without gradient.

        Rollouts are ordered prompt by prompt, `num_samples` each.
        """
        metrics = self._score(rollouts, engines)
        metrics |= self.set_advantages(rollouts, engines)
        if self.options.target_kl:  # after its use: the next batch feels it
            kl = (
                torch.stack([self.token_kl(r, "k1").double().sum() for r in rollouts]).mean().item()
            )
            self._steer(kl, len(rollouts))
        return metrics

    @abstractmethod
    def set_advantages(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in `advantages` from the rewards; return metrics. A reward that is NaN gives zeros."""

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: Tokens
    ) -> Surrogate:
        """Turn advantages into a loss per token; all arguments are [tokens]."""
        options = self.options
        ratio = token_ratio(logprobs, old)
        return clipped(ratio, advantages, options.clip_low, options.clip_high, options.dual_clip)

    def _score(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in `old_logprobs` (in eval mode) where needed and, with a reference, `ref_logprobs`."""
        args = (rollouts, self.join, self.pad_id, self.temperature, self.batch_size)
        needs_old = self.penalises_kl and self.options.kl_in == "reward"
        if not self.on_policy or needs_old or self.options.target_kl:
            for rollout, old in zip(
                rollouts, score_logprobs(engines["policy"], *args), strict=True
            ):
                rollout.old_logprobs = old
        if not self.penalises_kl:
            return {}
        for rollout, ref in zip(rollouts, score_logprobs(engines["reference"], *args), strict=True):
            rollout.ref_logprobs = ref
        return {"rl/kl_coef": self.policy.kl_coef}

    def token_kl(self, rollout: Rollout, kind: str | None = None) -> Tensor:
        """Estimate the KL from the reference at each sampled token of one rollout, [response]; 0 at others."""
        assert rollout.old_logprobs is not None and rollout.ref_logprobs is not None
        kl = kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, kind or self.options.kl_kind)
        return kl if rollout.loss_mask is None else kl * rollout.loss_mask

    def token_rewards(self, rollout: Rollout) -> Tensor:
        """-kl_coef KL_t at each token, with `kl_in=reward`, plus the reward on the last token the policy sampled."""
        rewards = torch.zeros(len(rollout.response_ids), dtype=torch.float64)
        if self.options.kl_in == "reward" and rollout.ref_logprobs is not None:
            rewards -= self.policy.kl_coef * self.token_kl(rollout)
        rewards[last_sampled(rollout)] += rollout.reward
        return rewards

    def response_rewards(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Return the rewards per prompt, the KL of the whole response subtracted with `kl_in=reward`.

        [prompts, samples] float64.
        """
        rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
        if self.options.kl_in == "reward" and rollouts[0].ref_logprobs is not None:
            kl = torch.stack([self.token_kl(r).double().sum() for r in rollouts])
            rewards = rewards - self.policy.kl_coef * kl
        return rewards.view(-1, self.options.num_samples)

    def _steer(self, kl: float, num_responses: int) -> None:
        """Move the coefficient towards the target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2)."""
        error = min(0.2, max(-0.2, kl / self.options.target_kl - 1))
        self.policy.kl_coef *= 1 + error * num_responses / self.options.kl_horizon

    def state(self) -> dict[str, Any]:
        """Return what resumes, as JSON."""
        return {"kl_coef": self.policy.kl_coef}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.policy.kl_coef = state["kl_coef"]


def last_sampled(rollout: Rollout) -> int:
    """Return the place of the last token that the policy sampled."""
    if rollout.loss_mask is None:
        return len(rollout.response_ids) - 1
    return int(rollout.loss_mask.nonzero()[-1])


def spread(advantages: Tensor, rollouts: Sequence[Rollout]) -> None:
    """Give every token of response i the advantage `advantages.flatten()[i]`."""
    for rollout, advantage in zip(rollouts, advantages.flatten(), strict=True):
        size = len(rollout.response_ids)
        rollout.advantages = advantage.to(rollout.rollout_logprobs.dtype).expand(size).clone()

"""What an RL algorithm is: which engines it trains, with which objectives, and how rollouts become targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distllm.engines.base import Engine
from distllm.rl.advantages import kl_estimate
from distllm.rl.objective import Join, PolicyObjective
from distllm.rl.options import RLOptions
from distllm.rl.scoring import score_logprobs
from distllm.types import Objective, Rollout


class Algorithm(ABC):
    """Base of the algorithms: old and reference log-probabilities, and the controller of the KL coefficient."""

    Options: type = RLOptions
    kl_in_loss: bool
    """True: the KL is a term of the loss. False: it is subtracted from the token rewards."""
    trains_value = False

    def __init__(
        self,
        options: Any,
        *,
        join: Join,
        pad_id: int,
        temperature: float,
        batch_size: int,
        on_policy: bool = False,
    ) -> None:
        """Set up the policy's objective.

        Args:
            options: the stage's settings.
            join: lays prompts and responses out as the model's inputs.
            pad_id: fills rectangles; masked.
            temperature: of the sampling distribution, and so of every log-probability.
            batch_size: rollouts per no-gradient forward.
            on_policy: each batch of rollouts is used for one update only. Then the policy at the update is the one that
                sampled, and its log-probabilities need not be computed twice.
        """
        self.options = options
        self.join, self.pad_id, self.temperature = join, pad_id, temperature
        self.batch_size, self.on_policy = batch_size, on_policy
        self.policy = PolicyObjective(options, join, pad_id, temperature, self.kl_in_loss)

    def objectives(self) -> dict[str, Objective]:
        """Return role -> objective of the engines this algorithm trains."""
        return {"policy": self.policy}

    @property
    def needs_reference(self) -> bool:
        """True when a frozen copy of the starting policy is part of the algorithm."""
        return self.options.kl_coef > 0 or self.options.target_kl > 0

    @abstractmethod
    def prepare(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Fill in what the objectives need; return metrics. Runs once per batch of rollouts, without gradient."""

    def score(self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]) -> dict[str, float]:
        """Fill in `old_logprobs` (in eval mode) where needed and, with a reference, `ref_logprobs`; steer the KL."""
        args = (rollouts, self.join, self.pad_id, self.temperature, self.batch_size)
        kl_in_reward = "reference" in engines and not self.kl_in_loss
        if not self.on_policy or kl_in_reward or self.options.target_kl:
            for rollout, old in zip(
                rollouts, score_logprobs(engines["policy"], *args), strict=True
            ):
                rollout.old_logprobs = old
        if "reference" not in engines:
            return {}
        for rollout, ref in zip(rollouts, score_logprobs(engines["reference"], *args), strict=True):
            rollout.ref_logprobs = ref
        metrics = {"rl/kl_coef": self.policy.kl_coef}
        if self.options.target_kl:
            kl = torch.stack([self.token_kl(r, "k1").sum() for r in rollouts]).mean().item()
            self._steer(kl, len(rollouts))
        return metrics

    def token_kl(self, rollout: Rollout, kind: str | None = None) -> torch.Tensor:
        """Estimate the KL from the reference at each token of one rollout, [response]."""
        assert rollout.old_logprobs is not None and rollout.ref_logprobs is not None
        return kl_estimate(rollout.old_logprobs, rollout.ref_logprobs, kind or self.options.kl_kind)

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

"""REINFORCE leave-one-out: the baseline of a response is the mean reward of the other responses to its prompt.

    A = r - mean of the others;   the whole response is one action, so its ratio is the product over its tokens

Reference: Ahmadian et al. 2024, arXiv 2402.14740.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from distllm.engines.base import Engine
from distllm.registry import register
from distllm.rl.advantages import leave_one_out
from distllm.rl.algorithm import Algorithm, spread
from distllm.rl.card import Card
from distllm.rl.layout import Tokens
from distllm.rl.options import RLOptions
from distllm.rl.surrogate import Surrogate, clipped, sequence_ratio
from distllm.types import Rollout


@dataclass(kw_only=True, slots=True)
class RLOOOptions(RLOptions):
    """RLOO: an unbiased baseline from the other samples."""

    name: str = "rloo"
    num_samples: int = 4
    kl_coef: float = 0.05
    kl_in: str = "reward"
    aggregation: str = "sequence"


@register("algorithm")
class RLOO(Algorithm):
    """Policy only; a response is one action."""

    Options = RLOOOptions
    compares_group = True
    options: RLOOOptions
    card = Card(
        equation="""
r_i = reward_i - kl_coef sum_t (l_old_t - l_ref_t)
A_i = r_i - mean of r over the other responses to the prompt
rho_i = exp(sum_t l_t - sum_t l_old_t)
loss = mean over responses of max(-A_i rho_i, -A_i clip(rho_i, 1 - clip_low, 1 + clip_high))""",
        paper="Ahmadian et al. 2024, arXiv 2402.14740",
        expectation="The exact policy gradient, also off policy while nothing is clipped, and also with the KL in the "
        "reward (k1).",
        sources={
            "num_samples": "a better baseline than the 2 of TRL, for twice the samples",
            "kl_coef": "TRL: 0.05",
            "kl_in": "arXiv 2402.14740: in the reward, before the baseline",
            "aggregation": "the response is one action: every response counts the same",
        },
        differences={
            "TRL": "the same equation; num_generations is 2.",
            "verl": "has RLOO's advantage; its loss is a mean over tokens unless told otherwise.",
            "OpenRLHF": "has RLOO's advantage; its loss is a mean over tokens.",
        },
    )

    def set_advantages(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Compare each response with the others to its prompt."""
        advantages, zero_spread = leave_one_out(self.response_rewards(rollouts))
        spread(advantages, rollouts)
        return {"rl/zero_spread": zero_spread}

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: Tokens
    ) -> Surrogate:
        """Clip the ratio of whole responses."""
        options = self.options
        ratio = sequence_ratio(logprobs, old, tokens, mean=False)
        return clipped(ratio, advantages, options.clip_low, options.clip_high, options.dual_clip)

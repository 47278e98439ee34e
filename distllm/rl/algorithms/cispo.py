"""CISPO: the clipped ratio is a weight of REINFORCE, so that no token loses its gradient.

    loss = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A l

Reference: MiniMax 2025, arXiv 2506.13585, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distllm.registry import register
from distllm.rl.algorithms.grpo import GROUP_SOURCES, GRPO, GRPOOptions
from distllm.rl.card import Card
from distllm.rl.layout import Tokens
from distllm.rl.surrogate import Surrogate, token_ratio


@dataclass(kw_only=True, slots=True)
class CISPOOptions(GRPOOptions):
    """CISPO: GRPO with clipped importance weights."""

    name: str = "cispo"
    clip_low: float = 1.0
    """The weight is clipped below at 1 - clip_low; 1 means not at all."""
    clip_high: float = 4.0
    """The weight is clipped above at 1 + clip_high."""


@register("algorithm")
class CISPO(GRPO):
    """REINFORCE with group advantages and bounded importance weights."""

    Options = CISPOOptions
    card = Card(
        equation="""
A_i = (r_i - mean_j r_j) / (std_j r_j + advantage_eps), over the responses j to one prompt
rho_t = exp(l_t - l_old_t)
loss = mean over tokens of -sg(clip(rho_t, 1 - clip_low, 1 + clip_high)) A_i l_t     (sg: no gradient)""",
        paper="MiniMax 2025, arXiv 2506.13585",
        expectation="On policy that of GRPO.",
        sources=GROUP_SOURCES
        | {
            "clip_low": "arXiv 2506.13585: no lower bound",
            "clip_high": "a weight of at most 5, the value that TRL recommends (from arXiv 2510.13786)",
        },
        differences={
            "TRL": "loss_type=cispo clips above only, at epsilon_high itself (not at 1 + epsilon_high).",
            "verl": "clips below as well, unless told otherwise; so do slime and NeMo.",
        },
    )

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: Tokens
    ) -> Surrogate:
        """Weigh log-probabilities by clipped ratios; the clip is a weight here, so both signs feel it."""
        low, high = 1 - self.options.clip_low, 1 + self.options.clip_high
        ratio = token_ratio(logprobs, old).detach()
        loss = -ratio.clamp(low, high) * advantages * logprobs
        return Surrogate(loss, ratio < low, ratio > high)

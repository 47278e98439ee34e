"""Dr. GRPO, "GRPO done right": no division by the spread, no division by the length of a response.

    A = r - mean of the group;   loss = sum over tokens / (responses x longest possible response)

Reference: Liu et al. 2025, arXiv 2503.20783.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.registry import register
from distllm.rl.algorithms.grpo import GROUP_SOURCES, GRPO, GRPOOptions
from distllm.rl.card import Card


@dataclass(kw_only=True, slots=True)
class DrGRPOOptions(GRPOOptions):
    """Dr. GRPO: GRPO without its two biases."""

    name: str = "dr_grpo"
    scale_by_std: bool = False
    aggregation: str = "constant"


@register("algorithm")
class DrGRPO(GRPO):
    """GRPO with other defaults; (n - 1) / n of the unbiased policy gradient, as the mean holds the response itself."""

    Options = DrGRPOOptions
    card = Card(
        equation="""
A_i = r_i - mean_j r_j, over the responses j to one prompt
rho_t = exp(l_t - l_old_t)
loss = sum over tokens of max(-A_i rho_t, -A_i clip(rho_t, 1 - clip_low, 1 + clip_high))
       / (responses x generation.max_new_tokens)""",
        paper="Liu et al. 2025, arXiv 2503.20783",
        expectation="(n - 1) / n of the exact policy gradient, divided by generation.max_new_tokens.",
        sources=GROUP_SOURCES
        | {
            "scale_by_std": "arXiv 2503.20783: the division favours questions that are almost solved or hopeless",
            "aggregation": "arXiv 2503.20783: a division by the length favours long wrong answers",
        },
        differences={
            "TRL": "loss_type=dr_grpo changes the aggregation alone; it still divides by the std unless "
            "scale_rewards=none.",
            "OpenRLHF": "its dr_grpo changes the advantage alone; the loss stays a token mean.",
            "OI": "centred advantages are its default, with a token mean or a constant.",
        },
    )

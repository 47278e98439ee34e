"""Group sequence policy optimization: the ratio of a response is the geometric mean of its token ratios.

    rho = exp(mean over tokens of (l - l_old)), clipped tightly

Reference: Zheng et al. 2025, arXiv 2507.18071.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distllm.registry import register
from distllm.rl.algorithms.grpo import GROUP_SOURCES, GRPO, GRPOOptions
from distllm.rl.card import Card
from distllm.rl.layout import Tokens
from distllm.rl.surrogate import Surrogate, clipped, sequence_ratio


@dataclass(kw_only=True, slots=True)
class GSPOOptions(GRPOOptions):
    """GSPO: GRPO with one ratio per response."""

    name: str = "gspo"
    clip_low: float = 3e-4
    clip_high: float = 4e-4
    aggregation: str = "sequence"


@register("algorithm")
class GSPO(GRPO):
    """GRPO whose ratio belongs to the response."""

    Options = GSPOOptions
    card = Card(
        equation="""
A_i = (r_i - mean_j r_j) / (std_j r_j + advantage_eps), over the responses j to one prompt
rho_i = exp(1/|y_i| sum_t (l_t - l_old_t))
loss = mean over responses of max(-A_i rho_i, -A_i clip(rho_i, 1 - clip_low, 1 + clip_high))""",
        paper="Zheng et al. 2025, arXiv 2507.18071",
        expectation="Biased as GRPO, and by 1 / length of each response: its ratio is a geometric mean.",
        sources=GROUP_SOURCES
        | {
            "clip_low": "arXiv 2507.18071, section 5.1: 3e-4",
            "clip_high": "arXiv 2507.18071, section 5.1: 4e-4",
            "aggregation": "arXiv 2507.18071: mean over responses",
        },
        differences={
            "TRL": "importance_sampling_level=sequence with loss_type=grpo is this; its clip stays at 0.2 unless set, "
            "and its default loss_type weighs responses by their length.",
            "verl": "the ratio carries the gradient per token (stop-gradient split); the same gradient, as A is the "
            "same for all tokens of a response.",
            "slime": "clips of 4e-4 on both sides in its recipes.",
        },
    )

    def surrogate(
        self, logprobs: Tensor, old: Tensor, advantages: Tensor, tokens: Tokens
    ) -> Surrogate:
        """Clip the geometric mean of the ratios."""
        options = self.options
        ratio = sequence_ratio(logprobs, old, tokens, mean=True)
        return clipped(ratio, advantages, options.clip_low, options.clip_high, options.dual_clip)

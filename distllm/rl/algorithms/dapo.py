"""DAPO: GRPO with a higher upper clip, a mean over tokens, fresh prompts for groups without spread, and a length penalty.

Reference: Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distllm.registry import register
from distllm.rl.algorithms.grpo import GROUP_SOURCES, GRPO, GRPOOptions
from distllm.rl.card import Card
from distllm.types import Rollout


@dataclass(kw_only=True, slots=True)
class DAPOOptions(GRPOOptions):
    """DAPO: decoupled clip and dynamic sampling."""

    name: str = "dapo"
    clip_high: float = 0.28
    overlong_buffer: float = 0.2
    dynamic_sampling: bool = True
    """Replace groups whose rewards are all equal by other prompts' before an update."""
    max_sampling_rounds: int = 10
    """Most rounds of sampling for one batch; then groups without spread fill what is missing."""


@register("algorithm")
class DAPO(GRPO):
    """GRPO that samples until every group has spread."""

    Options = DAPOOptions
    options: DAPOOptions
    card = Card(
        equation="""
A_i = (r_i - mean_j r_j) / (std_j r_j + advantage_eps), over the responses j to one prompt
r_i = score_i - overlong_penalty x clip((|y_i| - (L - B)) / B, 0, 1), L = generation.max_new_tokens, B = overlong_buffer L
rho_t = exp(l_t - l_old_t)
loss = mean over all tokens of the update of max(-A_i rho_t, -A_i clip(rho_t, 1 - clip_low, 1 + clip_high))
groups whose scores are all equal are replaced by other prompts' (at most max_sampling_rounds rounds)""",
        paper="Yu et al. 2025, arXiv 2503.14476",
        expectation="That of GRPO on the prompts that are kept; prompts without spread would have added nothing.",
        sources=GROUP_SOURCES
        | {
            "clip_high": "arXiv 2503.14476: 0.28",
            "overlong_buffer": "a fifth of the budget; the penalty reaches 1 at its end, as in arXiv 2503.14476",
            "dynamic_sampling": "arXiv 2503.14476: groups without spread are resampled",
            "max_sampling_rounds": "a bound, so that a hopeless data set cannot hold the run up for ever",
        },
        differences={
            "TRL": "loss_type=dapo is the token mean alone: no dynamic sampling, the upper clip equals the lower one "
            "unless epsilon_high is set, truncated responses can only be masked.",
            "verl": "has all four parts; std + 1e-6.",
            "OpenRLHF": "has all four parts; std + 1e-9.",
        },
    )

    @property
    def max_rounds(self) -> int:
        """One round, unless groups without spread are replaced."""
        return self.options.max_sampling_rounds if self.options.dynamic_sampling else 1

    def accept(self, rollouts: Sequence[Rollout]) -> bool:
        """Say whether the scores of one prompt's responses differ."""
        if not self.options.dynamic_sampling:
            return True
        scores = {r.score for r in rollouts if math.isfinite(r.score)}
        return len(scores) > 1

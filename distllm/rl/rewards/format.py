"""Whether a response has the form that was asked for, right or wrong. The rule itself is `rules.has_form`."""

from __future__ import annotations

from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.rl.rewards.pool import PooledReward
from distllm.rl.rewards.regex import checked_pattern


@register("reward")
class Format(PooledReward):
    """1 where the response holds a match of `stage.reward_pattern`, else 0; usually a small weight beside `regex`.

    Reference: DeepSeek-AI 2025, arXiv 2501.12948, section 2.2.2 (format rewards).
    """

    @classmethod
    def build(cls, context: RewardContext) -> Format:
        """Check the pattern and start a process."""
        return cls("distllm.rl.rewards.rules:has_form", context, pattern=checked_pattern(context))

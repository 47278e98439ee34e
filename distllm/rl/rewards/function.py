"""Any Python function, named explicitly as `MODULE:FUNCTION`."""

from __future__ import annotations

from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.rl.rewards.pool import PooledReward


@register("reward")
class Function(PooledReward):
    """Called with the parameters it names: prompt, messages, response, answer, task, and further columns of the data.

    It returns a number, or None where it cannot tell. A function with a parameter `completions` is called as TRL calls
    reward functions: lists (of one); prompts and completions are texts where the data's prompt is a text, else lists of messages.
    """

    @classmethod
    def build(cls, context: RewardContext) -> Function:
        """Start a process that has the function."""
        return cls(context.function, context)

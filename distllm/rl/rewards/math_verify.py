"""Mathematical equality with the prompt's answer, by the library math-verify. The rule itself is `rules.math_verify`."""

from __future__ import annotations

import importlib.util

from distllm.errors import ConfigError
from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.rl.rewards.pool import PooledReward


@register("reward")
class MathVerify(PooledReward):
    """1 where the response states the value of the answer (`1/2` is `0.5` is `\\boxed{\\frac12}`), else 0."""

    @classmethod
    def build(cls, context: RewardContext) -> MathVerify:
        """Start a process."""
        if importlib.util.find_spec("math_verify") is None:
            raise ConfigError(
                "stage.reward=math_verify needs the package math-verify, which is not installed. "
                'Type pip install "distllm[math]".'
            )
        return cls("distllm.rl.rewards.rules:math_verify", context, imports=["math_verify"])

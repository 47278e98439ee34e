"""A regular expression against the prompt's answer. The rule itself is `rules.regex`."""

from __future__ import annotations

import re

from distllm.errors import ConfigError
from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.rl.rewards.pool import PooledReward


@register("reward")
class Regex(PooledReward):
    """1 where the last match in the response equals the last match in the answer. In processes: a pattern can hang."""

    @classmethod
    def build(cls, context: RewardContext) -> Regex:
        """Check the pattern and start a process."""
        return cls("distllm.rl.rewards.rules:regex", context, pattern=checked_pattern(context))


def checked_pattern(context: RewardContext) -> str:
    """Return `stage.reward_pattern`.

    Raises:
        ConfigError: it is empty, or no regular expression.
    """
    pattern = context.options.reward_pattern
    try:
        if not pattern:
            raise re.error("it is empty")
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"stage.reward_pattern={pattern!r} is no regular expression: {error}. For answers like `#### 12` type "
            "stage.reward_pattern='#### *(-?[0-9.,]+)'."
        ) from None
    return pattern

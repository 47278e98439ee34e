"""A reward from an HTTP endpoint. The request itself is `rules.http`."""

from __future__ import annotations

from distllm.errors import ConfigError
from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.rl.rewards.pool import PooledReward


@register("reward")
class Http(PooledReward):
    """Posts one response at a time as JSON. In processes: a server that drips bytes evades time-outs of sockets."""

    @classmethod
    def build(cls, context: RewardContext) -> Http:
        """Check the address and start a process."""
        options = context.options
        if not options.reward_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"stage.reward_url={options.reward_url!r} is no address. Type stage.reward_url=http://HOST:PORT/PATH."
            )
        return cls(
            "distllm.rl.rewards.rules:http",
            context,
            attempts=options.reward_retries + 1,
            url=options.reward_url,
            timeout_s=options.reward_timeout_s,
            retries=options.reward_retries,
        )

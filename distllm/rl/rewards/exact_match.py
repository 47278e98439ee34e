"""The rule for tasks with one right answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from distllm.data.skills import exact_match
from distllm.errors import ConfigError
from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.types import Prompt, Rollout


@register("reward")
class ExactMatch:
    """1 where the response is the prompt's answer, else 0; NaN where the prompt has no answer."""

    def __init__(self) -> None:
        self.problems: dict[int, str] = {}

    @classmethod
    def build(cls, context: RewardContext) -> ExactMatch:
        """Build it; nothing is needed."""
        return cls()

    def close(self) -> None:
        """Nothing to give back."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse data without answers."""
        if all(p.answer is None for p in prompts):
            raise ConfigError(
                "stage.reward=exact_match compares responses with the prompt's answer, and no prompt of the data has one. "
                "Name its column with data.columns={answer:COLUMN}, or set stage.reward=MODULE:FUNCTION or "
                "stage.reward_model=DIR."
            )

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Judge each of `texts` against the prompt at the same index; `rollouts` are not read."""
        missing = "the prompt has no answer to compare with"
        self.problems = {i: missing for i, p in enumerate(prompts) if p.answer is None}
        return [
            math.nan if prompt.answer is None else float(exact_match(text, prompt.answer))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

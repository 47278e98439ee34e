"""The rule for tasks with one right answer."""

import math
from collections.abc import Sequence

from distllm.data.skills import exact_match
from distllm.registry import register
from distllm.types import Prompt, Rollout


@register("reward")
class ExactMatch:
    """1 where the response is the prompt's answer, else 0; NaN where the prompt has no answer."""

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Judge each of `texts` against the prompt at the same index; `rollouts` are not read."""
        return [
            math.nan if prompt.answer is None else float(exact_match(text, prompt.answer))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

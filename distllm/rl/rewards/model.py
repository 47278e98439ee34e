"""Scores from a trained reward model. How such a model is trained is in `objectives/reward.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from distllm.engines.base import Engine
from distllm.objectives.reward import score
from distllm.registry import register
from distllm.types import Batch, Prompt, Rollout

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


@register("reward")
class RewardModel:
    """The verdict of a reward model on exactly the ids that were sampled; no text is re-encoded."""

    def __init__(self, engine: Engine, *, join: Join, pad_id: int, batch_size: int) -> None:
        """Score with the frozen model of `engine`.

        Args:
            engine: holds a model whose head is `last` or `likelihood`, of the policy's vocabulary.
            join: lays prompts and responses out as inputs of that model (`model.join`).
            pad_id: fills rectangles; masked.
            batch_size: responses per forward; the scores do not depend on it.
        """
        self.engine, self.join, self.pad_id, self.batch_size = engine, join, pad_id, batch_size

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Return one score per rollout; NaN where the model's own output is not finite.

        Every rank passes all rollouts, scores its share of them, and ends with all scores.
        """
        # Similar lengths go together, so that little of a batch is padding.
        order = sorted(
            range(len(rollouts)),
            key=lambda i: len(rollouts[i].prompt_ids) + len(rollouts[i].response_ids),
        )
        scores: dict[int, Tensor] = {}
        for places, counts in self.engine.share(len(order), self.batch_size):
            chosen = [order[place] for place in places]
            batch = self.join(
                [rollouts[i].prompt_ids for i in chosen],
                [rollouts[i].response_ids for i in chosen],
                self.pad_id,
            ).to(self.engine.device)
            verdicts = self.engine.infer(score, batch).double()
            scores |= zip(chosen, verdicts, strict=True) if counts else {}
        verdicts = [v.item() for v in self.engine.gather(scores, len(rollouts))]
        return [v if math.isfinite(v) else math.nan for v in verdicts]

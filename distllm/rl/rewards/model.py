"""Scores from a trained reward model. How such a model is trained is in `objectives/reward.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distllm.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from distllm.engines.base import Engine
from distllm.errors import ConfigError
from distllm.objectives.multi_reward import objective_scores
from distllm.objectives.reward import score
from distllm.registry import register
from distllm.rl.layout import Join
from distllm.rl.rewards.base import RewardContext
from distllm.types import Batch, Model, Prompt, Rollout

REWARD_HEADS = ("last", "likelihood")
"""Heads whose output is one score per row."""


@register("reward")
class RewardModel:
    """The verdict of a reward model on exactly the ids that were sampled; no text is re-encoded."""

    def __init__(
        self,
        engine: Engine,
        *,
        join: Join,
        pad_id: int,
        batch_size: int,
        weights: Sequence[float] = (),
    ) -> None:
        """Score with the frozen model of `engine`.

        Args:
            engine: holds a model of the policy's vocabulary whose head is `last` or `likelihood`, or, with `weights`,
                `classify`.
            join: lays prompts and responses out as inputs of that model (`model.join`).
            pad_id: fills rectangles; masked.
            batch_size: responses per forward; the scores do not depend on it.
            weights: of the scores that a model gives by several objectives, in the order of its outputs.
        """
        self.engine, self.join, self.pad_id, self.batch_size = engine, join, pad_id, batch_size
        self.weights = list(weights)
        self.problems: dict[int, str] = {}

    @classmethod
    def build(cls, context: RewardContext) -> RewardModel:
        """Load `stage.reward_model` and check that it reads the policy's ids."""
        folder = reward_folder(context)
        model, tokenizer = context.load(folder), load_tokenizer(folder)
        weights = objective_weights(model, context)
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(context.tokenizer):
            raise ConfigError(
                f"stage.reward_model={folder} was trained with another tokenizer ({len(tokenizer)} ids) than the policy "
                f"({len(context.tokenizer)} ids), so it cannot read the sampled ids. Set stage.reward=classifier to have "
                "it read their text with its own tokenizer, or train one from the policy's own parent."
            )
        return cls(
            context.freeze(model),
            join=model.join,
            pad_id=context.pad_id,
            batch_size=context.batch_size,
            weights=weights,
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to refuse: it judges any text."""

    def close(self) -> None:
        """Nothing to give back: the engine is the run's."""

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
            verdicts = self.engine.infer(self._verdicts, batch).double()
            scores |= zip(chosen, verdicts, strict=True) if counts else {}
        verdicts = [v.item() for v in self.engine.gather(scores, len(rollouts))]
        self.problems = {
            i: f"the reward model says {v}" for i, v in enumerate(verdicts) if not math.isfinite(v)
        }
        return [v if math.isfinite(v) else math.nan for v in verdicts]

    def _verdicts(self, model: Model, batch: Batch) -> Tensor:
        if not self.weights:
            return score(model, batch)
        scores = objective_scores(model, batch)
        return scores @ scores.new_tensor(self.weights)


def objective_weights(model: Any, context: RewardContext) -> list[float]:
    """Return what each output of a model counts by `stage.reward_weights`; nothing for a model with one score.

    Raises:
        ConfigError: the model is no reward model, or the weights are not those of its objectives.
    """
    folder, given = context.options.reward_model, context.options.reward_weights
    if model.head_name in REWARD_HEADS:
        if given:
            raise ConfigError(
                f"stage.reward_weights={_written(given)}: stage.reward_model={folder} has one score. Leave the weights "
                "out, or train several scores with stage=multi_reward."
            )
        return []
    if model.head_name != "classify":
        raise ConfigError(
            f"stage.reward_model={folder} has the head {model.head_name}; a reward model has last or likelihood. "
            "Train one with stage=reward, or set stage.reward=classifier for a classifier."
        )
    names = model.label_names
    if not given or set(given) - set(names):
        raise ConfigError(
            f"stage.reward_weights={_written(given)}: stage.reward_model={folder} has an output for each of "
            f"{', '.join(names)}. If it was trained with stage=multi_reward, say what each counts, as in "
            f"stage.reward_weights={_written(dict.fromkeys(names, 1))} (one left out counts 0); for a classifier set "
            "stage.reward=classifier."
        )
    return [float(given.get(name, 0.0)) for name in names]


def _written(weights: Mapping[str, float]) -> str:
    return "{" + ",".join(f"{name}:{weight:g}" for name, weight in weights.items()) + "}"


def reward_folder(context: RewardContext) -> str:
    """Return `stage.reward_model`.

    Raises:
        ConfigError: it is not set.
    """
    if not context.options.reward_model:
        raise ConfigError(
            f"stage.reward={context.options.reward} needs stage.reward_model=DIR, the directory of a trained model."
        )
    return context.options.reward_model

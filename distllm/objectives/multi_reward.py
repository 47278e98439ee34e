"""Several objectives, one reward model: a score for each objective, learned from the comparisons by it.

    loss = - sum over pairs and the objectives k that compare them of p_k log sigmoid(d_k) + (1 - p_k) log sigmoid(-d_k)
    d_k = score_k(chosen) - score_k(rejected)

p_k is the probability that the chosen answer is the better one by k. As a reward the scores are added up with weights.

Reference: Bradley and Terry 1952 for each objective; a linear head with an output per objective on one model, and a
weighted sum of them as the reward: Wang et al. 2024, arXiv 2406.12845, sections 3.1 and 3.2 (who regress ratings), and
Wu et al. 2023, arXiv 2306.01693, section 2.2 (who train a model for each objective).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distllm.data.datasets import PairExample
from distllm.layers.precision import wide
from distllm.objectives.classify import class_logits
from distllm.objectives.preference import Join, smoothed_log_sigmoid
from distllm.objectives.reward import Reward, RewardOptions
from distllm.registry import register
from distllm.types import Batch, LossOutput, Model


@dataclass(kw_only=True, slots=True)
class MultiRewardOptions:
    """Learn to judge answers by several objectives at once."""

    name: str = "multi_reward"


@register("objective")
class MultiReward:
    """The loss above in nats, summed over comparisons; weight: their number."""

    Options = MultiRewardOptions
    records = "compared"
    coefficients: Mapping[str, float] = {"comparisons": 1.0}

    def __init__(
        self, options: MultiRewardOptions, pad_id: int, join: Join, names: Sequence[str]
    ) -> None:
        """Learn one score for each of `names`, the outputs of the model's head in order."""
        self.options, self.names = options, list(names)
        self.pairs = Reward(RewardOptions(), pad_id, join)

    def collate(self, examples: Sequence[PairExample]) -> Batch:
        """Lay out all chosen answers, then all rejected ones."""
        batch = self.pairs.collate(examples)
        chances = [[e.objectives.get(name, math.nan) for name in self.names] for e in examples]
        batch.confidences = torch.tensor(chances, dtype=torch.float64)
        return batch

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the comparisons."""
        assert batch.confidences is not None
        return {"comparisons": (~batch.confidences.isnan()).sum().double()}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the two halves of the batch by each objective."""
        assert batch.confidences is not None
        scores = side_scores(model, batch)
        margins = scores[:, 0] - scores[:, 1]
        compared = ~batch.confidences.isnan()
        chances = batch.confidences.nan_to_num(0.5).to(margins.dtype)
        loss = -(smoothed_log_sigmoid(margins, chances) * compared).sum()
        told = compared & (chances != 0.5)
        hits = told & ((margins > 0) == (chances > 0.5))
        metrics = {
            f"accuracy/{name}": (hits[:, k].sum().double(), told[:, k].sum().double())
            for k, name in enumerate(self.names)
        }
        return LossOutput({"comparisons": loss}, metrics)


def side_scores(model: Model, batch: Batch) -> Tensor:
    """Return the scores of both answers of each pair, chosen first, [pairs, 2, objectives]."""
    chosen, rejected = objective_scores(model, batch).chunk(2)
    return torch.stack([chosen, rejected], dim=1)


def objective_scores(model: Model, batch: Batch) -> Tensor:
    """Return one score per row and objective, [batch, objectives], in log-odds; padding and batch size do not matter."""
    logits = class_logits(model, batch)
    return logits.to(wide(logits.dtype))

"""Reward modelling: the chosen answer of a pair must score above the rejected one.

Reference: Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distllm.data.datasets import PairExample
from distllm.registry import register
from distllm.types import Batch, LossOutput, Model

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


@dataclass(kw_only=True, slots=True)
class RewardOptions:
    """Learn to judge answers from pairs."""

    name: str = "reward"
    head: str = "last"
    """`last`: a linear score of the hidden state at the last token. `likelihood`: the summed log-probability of the
    answer's tokens under the model itself (arXiv 2305.18290, section 5, without the reference), which starts
    as a judge instead of having to become one."""


@register("objective")
class Reward:
    """-log sigmoid(score(chosen) - score(rejected)), summed over pairs; weight: their number."""

    Options = RewardOptions
    records = "pairs"
    coefficients: Mapping[str, float] = {"pairs": 1.0}

    def __init__(self, options: RewardOptions, pad_id: int, join: Join) -> None:
        self.options, self.pad_id, self.join = options, pad_id, join

    def collate(self, examples: Sequence[PairExample]) -> Batch:
        """Lay out all chosen answers, then all rejected ones."""
        prompts = [e.prompt_ids for e in examples]
        answers = [e.chosen_ids for e in examples] + [e.rejected_ids for e in examples]
        batch = self.join(prompts + prompts, answers, self.pad_id)
        ids = torch.tensor([e.sample_id for e in examples])
        batch.sample_ids = torch.cat([ids, ids])
        return batch

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs."""
        return {"pairs": torch.tensor(len(batch.input_ids) / 2, dtype=torch.float64)}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the two halves of the batch."""
        chosen, rejected = score(model, batch).chunk(2)
        margin = chosen - rejected
        pairs = torch.tensor(float(len(margin)))
        return LossOutput(
            {"pairs": -F.logsigmoid(margin).sum()},
            {
                "accuracy": ((margin > 0).double().sum().detach(), pairs),
                "margin": (margin.detach().double().sum(), pairs),
            },
        )


def score(model: Model, batch: Batch) -> Tensor:
    """Return one score per row, [batch]; padding and batch size do not matter."""
    out = model(**batch.inputs(), compute_logits=False)
    return model.head.scores(out.last_hidden_state, batch)

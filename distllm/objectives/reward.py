"""Reward modelling: the chosen answer of a pair must score above the rejected one.

    d = score(chosen) - score(rejected) - margin,   loss = -p log sigmoid(d) - (1 - p) log sigmoid(-d)

p is the probability that the label is right, 1 where the data does not say (`confidence`); `margin` is 0 likewise.

Reference: Bradley and Terry 1952; Ouyang et al. 2022, arXiv 2203.02155, equation 1. Margin: Touvron et al. 2023, arXiv
2307.09288, equation 2. Centring: Eisenstein et al. 2023, arXiv 2312.09244.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distllm.data.datasets import PairExample
from distllm.objectives.preference import Join, smoothed_log_sigmoid
from distllm.registry import register
from distllm.types import Batch, LossOutput, Model


@dataclass(kw_only=True, slots=True)
class RewardOptions:
    """Learn to judge answers from pairs."""

    name: str = "reward"
    head: str = "last"
    """`last`: a linear score of the hidden state at the last token. `likelihood`: the summed log-probability of the
    answer's tokens under the model itself (arXiv 2305.18290, section 5, without the reference), which starts
    as a judge instead of having to become one."""
    center_coef: float = 0.0
    """Weight of (score(chosen) + score(rejected))^2 per pair, which keeps the scores near 0; 0.01 is usual."""


@register("objective")
class Reward:
    """The loss above summed over pairs, and the square of the sums if it is switched on; weight: pairs."""

    Options = RewardOptions
    records = "pairs"

    def __init__(self, options: RewardOptions, pad_id: int, join: Join) -> None:
        self.options, self.pad_id, self.join = options, pad_id, join

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Terms that are switched on."""
        terms = {"pairs": 1.0}
        return terms | {"center": self.options.center_coef} if self.options.center_coef else terms

    def collate(self, examples: Sequence[PairExample]) -> Batch:
        """Lay out all chosen answers, then all rejected ones."""
        prompts = [e.prompt_ids for e in examples]
        answers = [e.chosen_ids for e in examples] + [e.rejected_ids for e in examples]
        batch = self.join(prompts + prompts, answers, self.pad_id)
        ids = torch.tensor([e.sample_id for e in examples])
        batch.sample_ids = torch.cat([ids, ids])
        batch.margins = torch.tensor([e.margin for e in examples], dtype=torch.float64)
        batch.confidences = torch.tensor([e.confidence for e in examples], dtype=torch.float64)
        return batch

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs."""
        return dict.fromkeys(
            self.coefficients, torch.tensor(len(batch.input_ids) / 2, dtype=torch.float64)
        )

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the two halves of the batch."""
        chosen, rejected = raw_score(model, batch).chunk(2)
        margin = chosen - rejected
        pairs = torch.tensor(float(len(margin)))
        assert batch.margins is not None and batch.confidences is not None
        logits = margin - batch.margins.to(margin.dtype)
        right = batch.confidences.to(margin.dtype)
        losses = {"pairs": -smoothed_log_sigmoid(logits, right).sum()}
        if "center" in self.coefficients:
            losses["center"] = ((chosen + rejected) ** 2).sum()
        return LossOutput(
            losses,
            {
                "accuracy": ((margin > 0).double().sum().detach(), pairs),
                "margin": (margin.detach().double().sum(), pairs),
            },
        )


def raw_score(model: Model, batch: Batch) -> Tensor:
    """Return the scores before any normalisation, [batch]: their differences are the logits of a preference."""
    head = model.head
    return score(model, batch) * head.reward_std + head.reward_mean


def score(model: Model, batch: Batch) -> Tensor:
    """Return one score per row, [batch]; padding and batch size do not matter."""
    out = model(**batch.inputs(), compute_logits=False)
    return model.head.scores(out.last_hidden_state, batch)

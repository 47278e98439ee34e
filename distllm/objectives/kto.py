"""Kahneman-Tversky optimization: single answers, each known to be good or bad.

    r = log pi(y|x) - log ref(y|x),   z = max(0, mean over the batch of log pi(y'|x) - log ref(y'|x))
    loss = desirable_weight (1 - sigmoid(beta (r - z)))     for a good answer
           undesirable_weight (1 - sigmoid(beta (z - r)))   for a bad one

y' is an answer to another prompt. z estimates the divergence from the reference, carries no gradient and is one number
for the whole global batch, so that no split into micro-batches or ranks changes the loss.

Reference: Ethayarajh et al. 2024, arXiv 2402.01306, equations 7 and 8. Departure: y' belongs to the sample (the answer
half the data set away) instead of to the neighbour in the micro-batch, for the same reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.data.datasets import UnpairedExample
from distllm.objectives.preference import Join, known_reference, response_logprobs
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model


@dataclass(kw_only=True, slots=True)
class KTOOptions:
    """Learn from single answers that are marked good or bad, near a reference."""

    name: str = "kto"
    beta: float = 0.1
    """Strength of the tie to the reference; larger stays nearer."""
    desirable_weight: float = 1.0
    """Weight of good answers. Where they are n times as rare as bad ones, n makes up for it."""
    undesirable_weight: float = 1.0
    """Weight of bad answers."""
    reference: str = "auto"
    """Log-probabilities under the reference, the model that training starts from: `precompute` once for all data,
    `live` at each step (holds a second model; with an adapter, the trained one serves), or `auto`: whichever has fewer
    answers to score."""


@register("objective")
class KTO:
    """One loss per answer; weight: answers."""

    Options = KTOOptions
    records = "unpaired"
    needs_reference = True
    rows_per_example = 1
    coefficients: Mapping[str, float] = {"answers": 1.0}

    def __init__(self, options: KTOOptions, pad_id: int, join: Join) -> None:
        self.options, self.pad_id, self.join = options, pad_id, join

    def collate(self, examples: Sequence[UnpairedExample]) -> Batch:
        """Lay the answers out behind their prompts."""
        batch = self._lay_out(examples, [e.completion_ids for e in examples])
        batch.is_good = torch.tensor([e.good for e in examples])
        batch.ref_sums = known_reference(examples)
        return batch

    def collate_others(self, examples: Sequence[UnpairedExample]) -> Batch:
        """Lay answers to other prompts out behind the prompts."""
        return self._lay_out(examples, [e.other_ids for e in examples])

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the answers."""
        return {"answers": torch.tensor(float(len(batch.input_ids)), dtype=torch.float64)}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Judge each answer against the batch's divergence from the reference."""
        if batch.ref_sums is None or batch.kl_baseline is None or batch.is_good is None:
            raise ValueError("the reference's log-probabilities are missing: call prepare first")
        sums = response_logprobs(model, batch)
        ratios = sums - batch.ref_sums.to(sums.dtype)
        good = batch.is_good
        losses = self.losses(ratios, good, batch.kl_baseline.to(sums.dtype))
        with torch.no_grad():
            rewards = (self.options.beta * ratios).double()
            counts = good.double().sum(), (~good).double().sum()
            metrics = {
                "reward_good": ((rewards * good).sum(), counts[0]),
                "reward_bad": ((rewards * ~good).sum(), counts[1]),
                "logprob_good": ((sums.double() * good).sum(), counts[0]),
                "logprob_bad": ((sums.double() * ~good).sum(), counts[1]),
            }
        return LossOutput({"answers": losses.sum()}, metrics)

    def losses(self, ratios: Tensor, good: Tensor, baseline: Tensor) -> Tensor:
        """Return the loss of each answer.

        Args:
            ratios: [rows]: log-probability of the answer minus the reference's.
            good: [rows] bool.
            baseline: scalar, at least 0: z above.
        """
        options = self.options
        lead = torch.where(good, ratios - baseline, baseline - ratios)
        weight = torch.where(good, options.desirable_weight, options.undesirable_weight)
        return weight.to(lead.dtype) * torch.sigmoid(-options.beta * lead)

    def note_reference(self, example: UnpairedExample, logprobs: Sequence[float]) -> None:
        """Keep what the reference says of the answer and of the one to another prompt."""
        example.ref_logprobs, example.ref_other = (logprobs[0],), logprobs[1]

    def prepare(
        self,
        engine: Any,
        reference: Any,
        groups: Sequence[Sequence[UnpairedExample]],
        batches: Sequence[Batch],
    ) -> dict[str, float]:
        """Fill in the reference's log-probabilities and the batch's divergence. All ranks take part."""
        total = torch.zeros(2, dtype=torch.float64)
        for examples, batch in zip(groups, batches, strict=True):
            if batch.ref_sums is None:
                batch.ref_sums = reference.infer(response_logprobs, batch.to(reference.device))
            others = self.collate_others(examples)
            now = engine.infer(response_logprobs, others.to(engine.device)).double().cpu()
            known = [e.ref_other for e in examples]
            if any(k is None for k in known):
                there = reference.infer(response_logprobs, others.to(reference.device))
                before = there.double().cpu()
            else:
                before = torch.tensor(known, dtype=torch.float64)
            total += torch.stack([(now - before).sum(), answered(others).double().sum()])
        sums = engine.all_sum({"kl": total[0], "count": total[1]})
        baseline = baseline_of(sums["kl"], sums["count"])
        for batch in batches:
            batch.kl_baseline = baseline
        return {"train/kl_baseline": baseline.item()}

    def _lay_out(self, examples: Sequence[UnpairedExample], answers: Sequence[Any]) -> Batch:
        batch = self.join([e.prompt_ids for e in examples], answers, self.pad_id)
        batch.sample_ids = torch.tensor([e.sample_id for e in examples])
        return batch


def answered(batch: Batch) -> Tensor:
    """Return which rows have an answer at all, [rows] bool."""
    assert batch.labels is not None
    return (batch.labels != IGNORE_INDEX).any(dim=1)


def baseline_of(total: Tensor, count: Tensor) -> Tensor:
    """Return max(0, mean), 0 where there is nothing to average."""
    return (total / count.clamp(min=1)).clamp(min=0)

"""What the losses over preference pairs share: layout, log-probabilities of whole answers, metrics.

Each loss is a file of its own (`dpo.py`, `orpo.py`, `simpo.py`; `kto.py` for answers without a
partner). All compare summed log-probabilities, and those of a frozen reference where they need one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distllm.data.datasets import PairExample
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


@dataclass(slots=True)
class Sides:
    """Both answers of some pairs, as a loss sees them; all [pairs]."""

    chosen: Tensor
    """Summed log-probability of the chosen answer under the model that learns."""
    rejected: Tensor
    chosen_lengths: Tensor
    """Tokens of the chosen answer, its end of turn included."""
    rejected_lengths: Tensor
    confidences: Tensor
    """Probability that the chosen answer is the better one."""
    ref_chosen: Tensor | None = None
    """As `chosen`, under the reference."""
    ref_rejected: Tensor | None = None


class PairLoss:
    """A loss per pair, summed over pairs; weight: their number.

    With `sft_coef` above 0 also the negative log-probability of the chosen answers' tokens; weight:
    their number.
    """

    records = "pairs"
    """Kind of record this learns from, which makes it a stage."""
    needs_reference = False
    rows_per_example = 2

    def __init__(self, options: Any, pad_id: int, join: Join) -> None:
        self.options, self.pad_id, self.join = options, pad_id, join

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Terms that are switched on."""
        terms = {"pairs": 1.0}
        return terms | {"sft": self.options.sft_coef} if self.options.sft_coef else terms

    def collate(self, examples: Sequence[PairExample]) -> Batch:
        """Lay out all chosen answers, then all rejected ones."""
        prompts = [e.prompt_ids for e in examples]
        answers = [e.chosen_ids for e in examples] + [e.rejected_ids for e in examples]
        batch = self.join(prompts + prompts, answers, self.pad_id)
        ids = torch.tensor([e.sample_id for e in examples])
        batch.sample_ids = torch.cat([ids, ids])
        batch.confidences = torch.tensor([e.confidence for e in examples], dtype=torch.float64)
        batch.ref_sums = known_reference(examples)
        return batch

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the pairs, and the tokens of the chosen answers."""
        assert batch.labels is not None
        pairs = len(batch.labels) // 2
        counts = {"pairs": torch.tensor(float(pairs), dtype=torch.float64)}
        if "sft" in self.coefficients:
            counts["sft"] = (batch.labels[:pairs] != IGNORE_INDEX).sum().double()
        return counts

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the two halves of the batch."""
        sides = self.sides(response_logprobs(model, batch), batch)
        losses = {"pairs": self.losses(sides).sum()}
        if "sft" in self.coefficients:
            losses["sft"] = -sides.chosen.sum()
        with torch.no_grad():
            rewards = self.rewards(sides)
            count = torch.tensor(float(len(sides.chosen)), dtype=torch.float64)
            sums = {
                "accuracy": accuracy(rewards[0] - rewards[1]),
                "margin": rewards[0] - rewards[1],
                "reward_chosen": rewards[0],
                "reward_rejected": rewards[1],
                "logprob_chosen": sides.chosen,
                "logprob_rejected": sides.rejected,
            }
            metrics = {k: (v.double().sum(), count) for k, v in sums.items()}
        return LossOutput(losses, metrics)

    def sides(self, sums: Tensor, batch: Batch) -> Sides:
        """Arrange summed log-probabilities [2 x pairs]."""
        assert batch.labels is not None and batch.confidences is not None
        lengths = (batch.labels != IGNORE_INDEX).sum(dim=1)
        ref = (None, None) if batch.ref_sums is None else batch.ref_sums.to(sums.dtype).chunk(2)
        if self.needs_reference and batch.ref_sums is None:
            raise ValueError("the reference's log-probabilities are missing: call prepare first")
        chosen, rejected = sums.chunk(2)
        len_chosen, len_rejected = lengths.chunk(2)
        confidences = batch.confidences.to(sums.dtype)
        return Sides(chosen, rejected, len_chosen, len_rejected, confidences, ref[0], ref[1])

    def losses(self, sides: Sides) -> Tensor:
        """Return the loss of each pair, [pairs]."""
        raise NotImplementedError

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Return what the loss takes for the reward of the chosen and of the rejected answers."""
        raise NotImplementedError

    def note_reference(self, example: PairExample, logprobs: Sequence[float]) -> None:
        """Keep what the reference says of both answers."""
        example.ref_logprobs = (logprobs[0], logprobs[1])

    def prepare(
        self,
        engine: Any,
        reference: Any,
        groups: Sequence[Sequence[PairExample]],
        batches: Sequence[Batch],
    ) -> dict[str, float]:
        """Fill in the reference's log-probabilities where they were not computed beforehand."""
        if self.needs_reference:
            for batch in batches:
                if batch.ref_sums is None:
                    moved = batch.to(reference.device)
                    batch.ref_sums = reference.infer(response_logprobs, moved)
        return {}


def response_logprobs(model: Model, batch: Batch) -> Tensor:
    """Return the summed log-probability of each row's labelled tokens, [rows]."""
    hidden = model(**batch.inputs(), compute_logits=False).last_hidden_state
    return model.head.logprobs(hidden, batch.labels)[0].sum(dim=1)


def known_reference(examples: Sequence[Any]) -> Tensor | None:
    """Return what the reference says of each row, first sides first, if all of it is known."""
    known = [e.ref_logprobs for e in examples]
    if any(k is None for k in known):
        return None
    return torch.tensor(known, dtype=torch.float64).T.flatten()


def smoothed_log_sigmoid(logits: Tensor, confidences: Tensor) -> Tensor:
    """Return p log sigmoid(x) + (1 - p) log sigmoid(-x), stable for any x."""
    return confidences * F.logsigmoid(logits) + (1 - confidences) * F.logsigmoid(-logits)


def accuracy(margins: Tensor) -> Tensor:
    """Return 1 where the margin is above 0, 0.5 on a tie, else 0."""
    return (margins > 0).double() + 0.5 * (margins == 0).double()

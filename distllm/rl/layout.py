"""How ragged rollouts become a rectangle for the model, and how what the model says becomes ragged again.

What is computed from it is in `objective.py` (policy) and `algorithms/ppo.py` (values).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distllm.generation.rollouts import TOKEN_FIELDS
from distllm.objectives.collate import pack_rows
from distllm.types import IGNORE_INDEX, Batch, Model, Rollout

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


def collate_rollouts(
    rollouts: Sequence[Rollout], join: Join, pad_id: int, pack: bool = False
) -> Batch:
    """Lay rollouts out as model inputs; per-token fields land where the labels are, zeros elsewhere.

    Args:
        rollouts: at least one.
        join: `model.join`.
        pad_id: fills the rectangle; masked.
        pack: put several rollouts into a row where they fit.
    """
    batch = join([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], pad_id)
    assert batch.labels is not None
    mask = batch.labels != IGNORE_INDEX
    for name in TOKEN_FIELDS:
        parts = [getattr(r, name) for r in rollouts]
        if all(p is not None for p in parts):
            flat = torch.cat(parts)
            setattr(batch, name, flat.new_zeros(mask.shape).masked_scatter_(mask, flat))
    index = torch.tensor([i for i, r in enumerate(rollouts) for _ in r.response_ids])
    batch.response_index = index.new_zeros(mask.shape).masked_scatter_(mask, index)
    batch.rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    batch.sample_ids = torch.tensor([r.prompt_index for r in rollouts])
    return pack_rows(batch, pad_id) if pack else batch


def hidden_states(model: Model, batch: Batch) -> Tensor:
    """Run the model over a batch of rollouts, [batch, seq, d_model]."""
    out = model(**batch.inputs(), compute_logits=False)
    assert out.last_hidden_state is not None
    return out.last_hidden_state


def per_response(rollouts: Sequence[Rollout], batch: Batch, values: Tensor) -> list[Tensor]:
    """Undo the layout of unpacked rows: `values` [batch, seq] at the labels, one [response] per rollout."""
    assert batch.labels is not None
    flat = values[batch.labels != IGNORE_INDEX].detach().cpu()
    return list(flat.split([len(r.response_ids) for r in rollouts]))


@dataclass(slots=True)
class Tokens:
    """The response tokens of a batch as flat vectors, free of rows and padding."""

    at: Tensor
    """[batch, seq] bool: where the response tokens are."""
    index: Tensor
    """[tokens]: which response each belongs to."""
    learned: Tensor
    """[tokens] bool: sampled by the policy, in a response that has a reward."""
    num_responses: int
    weights: Tensor
    """[tokens] float64: how much each counts in a sum over the batch."""
    total: Tensor
    """What sums over the batch are divided by: tokens or responses."""

    def take(self, field: Tensor | None) -> Tensor:
        """Pick the response tokens of a [batch, seq] field, [tokens]."""
        assert field is not None
        return field[self.at]

    def sums(self, x: Tensor) -> Tensor:
        """Sum `x` [tokens] over the learned tokens of each response, [responses]."""
        return x.new_zeros(self.num_responses).index_add(0, self.index, x * self.learned)

    def counts(self) -> Tensor:
        """Count the learned tokens of each response, [responses] float64."""
        return self.sums(torch.ones_like(self.weights))


def response_tokens(batch: Batch, aggregation: str, max_response_tokens: int) -> Tokens:
    """Find the response tokens of `batch` and weigh them.

    With n_i the learned tokens of response i and N the responses that have any:

        token     weight 1,     total sum_i n_i
        sequence  weight 1/n_i, total N
        constant  weight 1/L,   total N, where L = `max_response_tokens`
    """
    assert batch.labels is not None and batch.response_index is not None
    at = batch.labels != IGNORE_INDEX
    index = batch.response_index[at]
    learned = torch.ones_like(index, dtype=torch.bool)
    num_responses = len(batch.input_ids)
    if batch.loss_mask is not None:
        learned = learned & batch.loss_mask[at]
    if batch.rewards is not None:
        num_responses = len(batch.rewards)
        learned = learned & torch.isfinite(batch.rewards)[index]
    tokens = Tokens(at, index, learned, num_responses, learned.double(), learned.double().sum())
    if aggregation != "token":
        counts = tokens.counts()
        share = max_response_tokens if aggregation == "constant" else counts.clamp(min=1)[index]
        tokens.weights = tokens.weights / share
        tokens.total = (counts > 0).double().sum()
    if batch.total is not None:
        tokens.total = batch.total
    return tokens

"""Causal language modelling: predict each next token of a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distllm.data.packing import PackedRow
from distllm.objectives.options import PretrainOptions
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model


@register("objective")
class CLM:
    """Sum of the negative log-probabilities of all labelled tokens, in nats; weight: their number."""

    Options = PretrainOptions
    coefficients: Mapping[str, float] = {"lm": 1.0}

    def __init__(self, options: Any, pad_id: int) -> None:
        self.options, self.pad_id = options, pad_id

    def collate(self, examples: Sequence[PackedRow]) -> Batch:
        """Stack packed rows; positions and attention restart with each document."""
        return Batch(
            input_ids=_stack([e.input_ids for e in examples]),
            labels=_stack([e.labels for e in examples]),
            segment_ids=_stack([e.segment_ids for e in examples]),
            sample_ids=torch.tensor([e.sample_id for e in examples]),
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the labelled tokens."""
        assert batch.labels is not None
        return {"lm": (batch.labels != IGNORE_INDEX).sum().double()}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Sum the losses without ever holding all logits."""
        num_sampled = getattr(self.options, "sampled_words", 0)
        if not num_sampled:
            return lm_loss(model, batch, getattr(self.options, "z_loss", 0.0))
        out = model(**batch.inputs(), compute_logits=False)
        loss = model.head.loss(out.last_hidden_state, batch.labels, num_sampled)
        return LossOutput({"lm": loss, **(out.aux or {})})


def lm_loss(
    model: Model, batch: Batch, z_loss: float = 0.0, inputs: Mapping[str, Tensor] | None = None
) -> LossOutput:
    """Run the model and sum the loss of the labelled tokens; with `z_loss` the term holds both, `nll` the first alone.

    `inputs` are the model's arguments where they differ from the batch's.
    What a model with experts adds of its own stands beside it: `experts.py`.
    """
    out = model(**(inputs or batch.inputs()), compute_logits=False)
    assert batch.labels is not None
    own = out.aux or {}
    if not z_loss:
        return LossOutput({"lm": model.head.loss(out.last_hidden_state, batch.labels), **own})
    loss, squares = model.head.loss_z(out.last_hidden_state, batch.labels, z_loss)
    count = (batch.labels != IGNORE_INDEX).sum().double()
    nll = (loss.detach() - z_loss * squares).double()
    return LossOutput(
        {"lm": loss, **own}, {"nll": (nll, count), "z_square": (squares.double(), count)}
    )


def _stack(rows: Sequence[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(row, dtype=torch.int64) for row in rows])

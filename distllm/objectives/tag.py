"""Tagging: a label for each word, read at its first token.

Reference: Devlin et al. 2019, arXiv 1810.04805, section 5.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.data.labelled import TaggedExample
from distllm.objectives.collate import pad_rows
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model


@dataclass(kw_only=True, slots=True)
class TagOptions:
    """Learn to label the words of sentences (names, parts of speech)."""

    name: str = "tag"


@register("objective")
class Tag:
    """Cross-entropy in nats, summed over labelled tokens; weight: their number."""

    Options = TagOptions
    records = "tagged"
    coefficients: Mapping[str, float] = {"tag": 1.0}

    def __init__(self, options: TagOptions, pad_id: int) -> None:
        self.options, self.pad_id = options, pad_id

    def collate(self, examples: Sequence[TaggedExample]) -> Batch:
        """Pad sentences on the right."""
        return Batch(
            input_ids=pad_rows([e.input_ids for e in examples], self.pad_id),
            labels=pad_rows([_token_labels(e) for e in examples], IGNORE_INDEX),
            attention_mask=pad_rows([[1] * len(e.input_ids) for e in examples], 0).bool(),
            sample_ids=torch.tensor([e.sample_id for e in examples]),
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the labelled tokens."""
        assert batch.labels is not None
        return {"tag": (batch.labels != IGNORE_INDEX).sum().double()}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare tags."""
        assert batch.labels is not None
        logits = tag_logits(model, batch).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        return LossOutput({"tag": loss})


def _token_labels(example: TaggedExample) -> list[int]:
    """Write each word's tag at its first token; of words that share a token the first one counts."""
    labels = [IGNORE_INDEX] * len(example.input_ids)
    for place, tag in zip(example.places, example.tags, strict=True):
        if place >= 0 and labels[place] == IGNORE_INDEX:
            labels[place] = tag
    return labels


def tag_logits(model: Model, batch: Batch) -> Tensor:
    """Return one logit per tag and token, [batch, seq, num_labels]."""
    out = model(**batch.inputs(), compute_logits=False)
    return model.head.logits(out.last_hidden_state)

"""Supervised fine-tuning: imitate the assistant's turns of a dialogue, their end token included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distllm.data.datasets import ChatExample
from distllm.objectives.clm import CLM
from distllm.objectives.collate import pad_rows
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch


@dataclass(kw_only=True, slots=True)
class SFTOptions:
    """Learn to answer from dialogues."""

    name: str = "sft"


@register("objective")
class SFT(CLM):
    """Causal language modelling whose labels are the assistant's tokens alone."""

    Options = SFTOptions
    records = "dialogues"

    def collate(self, examples: Sequence[ChatExample]) -> Batch:  # type: ignore[override]
        """Pad dialogues on the right; masks come from lengths, never from token values."""
        labels = [
            [t if on else IGNORE_INDEX for t, on in zip(e.input_ids[1:], e.mask[1:], strict=True)]
            for e in examples
        ]
        return Batch(
            input_ids=pad_rows([e.input_ids[:-1] for e in examples], self.pad_id),
            labels=pad_rows(labels, IGNORE_INDEX),
            attention_mask=pad_rows([[1] * (len(e.input_ids) - 1) for e in examples], 0).bool(),
            sample_ids=torch.tensor([e.sample_id for e in examples]),
        )

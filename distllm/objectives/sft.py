"""Supervised fine-tuning: imitate the assistant's turns of a dialogue, their end token included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.data.datasets import ChatExample
from distllm.errors import ConfigError
from distllm.objectives.clm import CLM, lm_loss
from distllm.objectives.collate import pack_rows, pad_rows
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model, free


@dataclass(kw_only=True, slots=True)
class SFTOptions:
    """Learn to answer from dialogues."""

    name: str = "sft"
    neftune_alpha: float = 0.0
    """Strength of the uniform noise on the input embeddings in training (NEFTune; 5 to 15 are usual); 0 is none. Larger
    keeps the model from learning the answers' wording by heart."""
    pack: bool | None = free(None)
    """Lay several short dialogues of a micro-batch into one row (of at most `train.seq_len`), with attention and positions
    that restart in each: less padding, the same loss and gradient. null: where the architecture does so without a detour and
    nothing is counted by row. A larger `train.micro_batch_size` fills rows better."""


@register("objective")
class SFT(CLM):
    """Causal language modelling whose labels are the assistant's tokens alone."""

    Options = SFTOptions
    records = "dialogues"

    def __init__(self, options: Any, pad_id: int, longest_row: int = 0) -> None:
        super().__init__(options, pad_id)
        self.longest_row = longest_row

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Sum the losses; in training the embeddings are noisy if so set."""
        alpha = getattr(self.options, "neftune_alpha", 0.0)
        if not alpha or not model.training:  # type: ignore[attr-defined]
            return super().loss(model, batch)
        return lm_loss(model, batch, inputs=noisy_inputs(model, batch, alpha))

    def collate(self, examples: Sequence[ChatExample]) -> Batch:  # type: ignore[override]
        """Lay dialogues out, several to a row if so set."""
        batch = self.padded(examples)
        batch.sample_ids = torch.tensor([e.sample_id for e in examples])
        return pack_rows(batch, self.pad_id, self.longest_row) if self.options.pack else batch

    def padded(self, examples: Sequence[ChatExample]) -> Batch:
        """Pad dialogues on the right; masks come from lengths, never from token values."""
        labels = [
            [t if on else IGNORE_INDEX for t, on in zip(e.input_ids[1:], e.mask[1:], strict=True)]
            for e in examples
        ]
        return Batch(
            input_ids=pad_rows([e.input_ids[:-1] for e in examples], self.pad_id),
            labels=pad_rows(labels, IGNORE_INDEX),
            attention_mask=pad_rows([[1] * (len(e.input_ids) - 1) for e in examples], 0).bool(),
        )


def noisy_inputs(model: Any, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """Return the model's arguments with noise on the input embeddings: U(-1, 1) * alpha / sqrt(L d).

    d is the width, L a sequence's number of real tokens (padding does not weaken the noise, as it does where L is the
    padded length). Like dropout the noise comes from the process's generator, which checkpoints save.

    Reference: Jain et al. 2023, arXiv 2310.05914, algorithm 1.

    Raises:
        ConfigError: the architecture has no embedding that could be made noisy.
    """
    embed = getattr(model, "embed", None)
    if not isinstance(embed, torch.nn.Module):
        raise ConfigError(
            f"stage.neftune_alpha={alpha} needs an architecture with token embeddings of its own; "
            f"{type(model).__name__} has none. Set 0."
        )
    inputs = batch.inputs()
    clean = embed(inputs.pop("input_ids"))
    marks = batch.attention_mask if batch.segment_ids is None else batch.segment_ids
    if marks is None:
        marks = torch.ones_like(batch.input_ids)
    marks = marks.long()  # 0 is padding
    counts = marks.new_zeros(len(marks), int(marks.max()) + 1)
    lengths = counts.scatter_add_(1, marks, torch.ones_like(marks)).gather(1, marks)
    scale = alpha / (lengths * clean.shape[-1]).sqrt() * (marks != 0)  # [batch, seq]
    noise = torch.empty_like(clean).uniform_(-1, 1) * scale.to(clean.dtype)[..., None]
    return inputs | {"inputs_embeds": clean + noise}

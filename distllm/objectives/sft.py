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
from distllm.objectives.collate import pad_rows
from distllm.registry import register
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model


@dataclass(kw_only=True, slots=True)
class SFTOptions:
    """Learn to answer from dialogues."""

    name: str = "sft"
    neftune_alpha: float = 0.0
    """Strength of the uniform noise on the input embeddings in training (NEFTune; 5 to 15 are usual); 0 is none. Larger
    keeps the model from learning the answers' wording by heart."""


@register("objective")
class SFT(CLM):
    """Causal language modelling whose labels are the assistant's tokens alone."""

    Options = SFTOptions
    records = "dialogues"

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Sum the losses; in training the embeddings are noisy if so set."""
        alpha = getattr(self.options, "neftune_alpha", 0.0)
        if not alpha or not model.training:  # type: ignore[attr-defined]
            return super().loss(model, batch)
        return lm_loss(model, batch, inputs=noisy_inputs(model, batch, alpha))

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


def noisy_inputs(model: Any, batch: Batch, alpha: float) -> dict[str, Tensor]:
    """Return the model's arguments with noise on the input embeddings: U(-1, 1) * alpha / sqrt(L d).

    d is the width, L a row's number of real tokens (padding does not weaken the noise, as it does where L is the padded
    length). Like dropout the noise comes from the process's generator, which checkpoints save.

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
    mask = batch.attention_mask
    real = clean.new_ones(clean.shape[:2]) if mask is None else mask.to(clean.dtype)
    scale = alpha / (real.sum(1) * clean.shape[-1]).sqrt()  # [batch]
    noise = torch.empty_like(clean).uniform_(-1, 1) * (scale[:, None] * real)[..., None]
    return inputs | {"inputs_embeds": clean + noise}

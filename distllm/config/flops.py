"""Floating-point operations of training, in both published conventions, for any architecture.

A multiplication with its addition counts as 2; the backward costs twice the forward; what is recomputed does not count.
Padding is no work, and the output matrix works where there is a label.

- *Full*: every token is counted as seeing the whole row (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B).
  Most reports count so, those of torchtitan and llm-foundry among them.
- *Causal half*: only keys that a query can see, as fused kernels compute them. At 8,192 tokens an 8B model differs by
  an eighth between the two, so figures compare only within one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from distllm.arch.adapter import WHOLE_HEADS, AdapterOptions, matrix_shapes, target_layers
from distllm.layers.positions import RelativeBias
from distllm.train.micro_batches import num_tokens
from distllm.types import IGNORE_INDEX, Batch

_TRAINING = 3 * 2
"""Forward and twice that backward; 2 operations each."""
_THROUGH = 2 * 2
"""The same for a frozen weight, which has no gradient of its own."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the token streams of a batch: the input, or a decoder's."""

    tokens: float
    """Without padding."""
    row: float
    """Length of a row."""


@dataclass(frozen=True, slots=True)
class Attended:
    """One attention layer."""

    side: str
    """Whose tokens ask: `input` or `decoder`."""
    keys_of: str
    """Whose tokens are seen."""
    width: int
    """n_heads x d_head."""
    window: int | None
    causal: bool

    def keys(self, row: float, causal_half: bool) -> float:
        """Return how many keys a token is counted as seeing, on average, in a row of `row` of them."""
        # A window is counted on the sides that a layer looks to.
        reach = row if self.window is None else self.window if self.causal else 2 * self.window - 1
        near = min(row, reach)
        if not causal_half or not row:
            return near
        if self.causal:
            return near - near**2 / (2 * row)
        if self.window is None or self.window >= row:
            return near
        return reach - self.window * (self.window - 1) / row  # less at both ends of the row


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """What a model computes for a batch."""

    weights: dict[str, int]
    """Side -> weights that each of its tokens is multiplied with, output matrix aside."""
    head: int
    """Weights of the head, which each labelled position is multiplied with."""
    attention: tuple[Attended, ...]
    adapters: dict[str, int] = field(default_factory=dict)
    """Side -> weights of the adapters that each of its tokens is multiplied with; if there are any, the others are frozen."""
    trains_head: bool = True

    @property
    def multiplied(self) -> int:
        """All weights that tokens are multiplied with."""
        return sum(self.weights.values()) + sum(self.adapters.values()) + self.head

    def __call__(self, batch: Batch, *, causal_half: bool) -> float:
        """Count the operations of one training pass over `batch`."""
        labelled = num_tokens(batch)
        if batch.labels is not None:
            labelled = int((batch.labels != IGNORE_INDEX).sum())
        return self.count(_sides(batch), labelled, causal_half=causal_half)

    def per_token(self, row: int, *, causal_half: bool) -> float:
        """Count the operations per token of a full row in which every position has a label."""
        sides = {side: Side(1.0, row) for side in ("input", "decoder")}
        return self.count(sides, 1.0, causal_half=causal_half)

    def count(self, sides: dict[str, Side], labelled: float, *, causal_half: bool) -> float:
        """Count the operations of a training pass over so many tokens."""
        weights, adapters = (
            sum(n * sides[side].tokens for side, n in counts.items())
            for counts in (self.weights, self.adapters)
        )
        products = (_THROUGH if self.adapters else _TRAINING) * weights + _TRAINING * adapters
        products += (_TRAINING if self.trains_head else _THROUGH) * self.head * labelled
        # Scores and mixed values: two products.
        seen = sum(
            2 * a.width * sides[a.side].tokens * a.keys(sides[a.keys_of].row, causal_half)
            for a in self.attention
        )
        return products + _TRAINING * seen


def _sides(batch: Batch) -> dict[str, Side]:
    sides = {"input": Side(num_tokens(batch), batch.input_ids.shape[1])}
    if batch.decoder_input_ids is not None:
        masks = (batch.decoder_attention_mask, batch.decoder_segment_ids)
        mask = next((m for m in masks if m is not None), None)
        count = batch.decoder_input_ids.numel() if mask is None else int((mask != 0).sum())
        sides["decoder"] = Side(count, batch.decoder_input_ids.shape[1])
    return sides


def model_flops(model: Any, adapter: AdapterOptions | None = None) -> ModelFlops:
    """Read what a batch costs off a model, which may be on the meta device, and perhaps is trained through an adapter."""
    looked_up = {
        id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | RelativeBias)
    }
    projection = getattr(model.head, "projection", None)
    head = 0 if projection is None else projection.numel()
    weights: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in looked_up or parameter is projection:
            continue
        if name.startswith("head."):
            head += parameter.numel()
            continue
        side = _side_of(name)
        numel = parameter.numel()
        if parameter.ndim > 2:  # [experts, ...]: a token meets the chosen ones
            numel = model.options.experts_per_token * math.prod(parameter.shape[1:])
        weights[side] = weights.get(side, 0) + numel
    if adapter is None:
        return ModelFlops(weights, head, _attention(model))
    adapters: dict[str, int] = {}
    for name, layer in target_layers(model, adapter).items():
        side = _side_of(name)
        numel = sum(map(math.prod, matrix_shapes(layer, adapter.rank)))
        adapters[side] = adapters.get(side, 0) + numel
    return ModelFlops(
        weights, head, _attention(model), adapters, trains_head=model.head_name in WHOLE_HEADS
    )


def _side_of(name: str) -> str:
    if "cross_attention.k_proj" in name or "cross_attention.v_proj" in name:
        return "input"  # applied to what the encoder made of its tokens
    return "decoder" if name.startswith("decoder.") else "input"


def _attention(model: Any) -> tuple[Attended, ...]:
    found = []
    for path, stack in model.named_modules():
        side = "decoder" if path == "decoder" else "input"
        for block in getattr(stack, "layers", ()):
            for name, part in block.named_children():
                if hasattr(part, "n_heads") and hasattr(part, "d_head"):
                    crosses = "cross" in name
                    found.append(
                        Attended(
                            side=side,
                            keys_of="input" if crosses else side,
                            width=part.n_heads * part.d_head,
                            window=getattr(part, "window", None),
                            causal=stack.causal and not crosses,
                        )
                    )
    return tuple(found)

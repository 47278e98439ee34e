"""Floating-point operations of one training token, in both published conventions, for any architecture.

A multiplication with its addition counts as 2; the backward costs twice the forward; what is recomputed does not count.

- *Full*: every token is counted as seeing the whole row (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B).
  Most reports count so, those of torchtitan and llm-foundry among them.
- *Causal half*: only keys that a query can see, as fused kernels compute them. At 8,192 tokens an 8B model differs by
  an eighth between the two, so figures compare only within one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class Attended:
    """What one attention layer lets a token see."""

    width: int
    """n_heads x d_head."""
    window: int | None
    causal: bool

    def keys(self, row: float, causal_half: bool) -> float:
        """Return how many keys a token of a row of `row` tokens is counted as seeing, on average."""
        near = row if self.window is None else min(row, self.window)
        if not (causal_half and self.causal):
            return near
        return near - near**2 / (2 * row) if row else 0.0


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """Cost of one token as a function of the length of its row."""

    products: int
    """Of matrix products with weights, forward and backward."""
    attention: tuple[Attended, ...]

    def __call__(self, row: float, *, causal_half: bool) -> float:
        """Count the operations of one token in a row of `row` tokens."""
        seen = sum(a.width * a.keys(row, causal_half) for a in self.attention)
        return self.products + 3 * 4 * seen


def token_flops(model: Any) -> TokenFlops:
    """Read what a token costs off a model, which may be on the meta device."""
    attention = []
    for stack in model.modules():
        for block in getattr(stack, "layers", ()):
            for name, part in block.named_children():
                if hasattr(part, "n_heads") and hasattr(part, "d_head"):
                    causal = stack.causal and "cross" not in name
                    width = part.n_heads * part.d_head
                    attention.append(Attended(width, getattr(part, "window", None), causal))
    return TokenFlops(3 * 2 * matmul_parameters(model), tuple(attention))


def matmul_parameters(model: Any) -> int:
    """Count the weights that one token is multiplied with.

    Embeddings are looked up, not multiplied; an output matrix is, even where it is the embedding's (tied). Of experts
    a token meets the chosen ones.
    """
    options = model.options
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    projection = getattr(model.head, "projection", None)
    count = 0
    for parameter in model.parameters():
        if parameter.ndim == 2 and id(parameter) not in looked_up:
            count += parameter.numel()
        elif parameter.ndim > 2:  # [experts, ...]
            count += options.experts_per_token * math.prod(parameter.shape[1:])
    if projection is not None and id(projection) in looked_up:
        count += projection.numel()
    return count

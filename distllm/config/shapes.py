"""The numbers of a model that formulas need, read off the real class once, built without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from distllm.arch.adapter import WHOLE_HEADS, AdapterOptions, matrix_shapes, target_layers
from distllm.config.footprint import build_meta
from distllm.layers.products import Linear

Size = tuple[int, ...]
"""Shape of one parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a stack of equal blocks between an embedding and a head."""

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    gated: bool
    activation_keeps_result: bool
    """The activation's backward needs its result, not its argument (relu)."""
    has_dropout: bool
    norms_outputs: bool
    """What attention and feed-forward return is normalised too."""
    norms_heads: bool
    """Queries and keys are normalised per head."""
    tied: bool
    """The output matrix is the embedding's."""
    block: tuple[Size, ...]
    """Parameters of one block."""
    rest: tuple[Size, ...]
    """All other parameters: embeddings, final norm, head."""
    head_multiplied: int
    """Weights of the output matrix; 0 for a scalar head."""
    trained_block: tuple[Size, ...]
    """Those of `block` that are trained: with adapters, theirs alone."""
    trained_rest: tuple[Size, ...]
    """Those of `rest` that are trained: with adapters, a new head."""
    held_in_4bit: int = 0
    """Weights of one block that are held in 4 bits."""
    adapter_width: int = 0
    """Numbers between the two matrices of each adapter of a block, per token."""

    @property
    def is_frozen(self) -> bool:
        """Whether the weights stay as they are beside adapters."""
        return self.adapter_width > 0

    @property
    def q_width(self) -> int:
        """Channels of all query heads."""
        return self.n_heads * self.d_head

    @property
    def kv_width(self) -> int:
        """Channels of all key heads."""
        return self.n_kv_heads * self.d_head

    @property
    def block_multiplied(self) -> int:
        """Weights of one block that every token is multiplied with."""
        return sum(map(math.prod, (s for s in self.block if len(s) > 1)))

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with."""
        return self.n_layers * self.block_multiplied + self.head_multiplied

    @property
    def embedding_multiplied(self) -> int:
        """Weights of the token embedding."""
        return self.vocab_size * self.d_model

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.n_layers * sum(map(math.prod, self.block)) + sum(map(math.prod, self.rest))


def has_formula(options: Any) -> bool:
    """Return whether `activations.py` has formulas for what the blocks of this architecture hold."""
    return (
        options.name == "decoder"
        and options.num_experts == 0
        and options.norm_placement in ("pre", "post", "sandwich")
        and options.qk_norm in ("none", "head")
        and not (options.attention_sinks or options.attention_softcap or options.logit_softcap)
    )


def shape_of_model(
    options: Any, head: str = "lm", adapter: AdapterOptions | None = None
) -> ModelShape:
    """Read the shape of the architecture that `options` describe; the largest block stands for all.

    Raises:
        ConfigError: the adapter's targets are not in the model.
    """
    model: Any = build_meta(options, head)
    blocks = list(model.blocks())
    inside = {id(p) for block in blocks for p in block.parameters()}
    block = max(blocks, key=lambda b: sum(p.numel() for p in b.parameters()))
    projection = getattr(model.head, "projection", None)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    heads = getattr(options, "n_heads", 1)
    own: tuple[Size, ...] = tuple(tuple(p.shape) for p in block.parameters())
    rest = {n: tuple(p.shape) for n, p in model.named_parameters() if id(p) not in inside}
    beside: tuple[Size, ...] = ()
    held = 0
    if adapter is not None:
        layers = {id(m) for m in target_layers(model, adapter).values()}
        adapted = [m for m in block.modules() if id(m) in layers]
        if adapter.base_bits == 4:
            held = sum(m.weight.numel() for m in block.modules() if type(m) in (nn.Linear, Linear))
        beside = tuple(s for m in adapted for s in matrix_shapes(m, adapter.rank))
    is_whole = not beside or head in WHOLE_HEADS
    return ModelShape(
        vocab_size=options.vocab_size,
        d_model=options.d_model,
        d_ff=getattr(options, "d_ff", options.d_model),
        n_layers=len(blocks),
        n_heads=heads,
        n_kv_heads=getattr(options, "n_kv_heads", heads),
        d_head=getattr(options, "d_head", None) or options.d_model // heads,
        gated=getattr(options, "gated", False),
        activation_keeps_result=getattr(options, "activation", "") in ("relu", "relu2"),
        has_dropout=options.dropout > 0,
        norms_outputs=getattr(options, "norm_placement", "") == "sandwich",
        norms_heads=getattr(options, "qk_norm", "") == "head",
        tied=projection is not None and id(projection) in looked_up,
        block=own + beside,
        rest=tuple(rest.values()),
        trained_block=beside or own,
        trained_rest=tuple(
            s for n, s in rest.items() if is_whole and (not beside or n.startswith("head."))
        ),
        held_in_4bit=held,
        adapter_width=adapter.rank * len(beside) // 2 if adapter is not None else 0,
        head_multiplied=0 if projection is None else projection.numel(),
    )

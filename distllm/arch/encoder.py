"""Encoder-only models in the manner of BERT: every token sees all others; heads predict masked tokens or give verdicts.

The stack is in `stack.py`, the heads in `heads.py` and `verdict_heads.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distllm.arch.abilities import Abilities
from distllm.arch.heads import HEADS, LMHead
from distllm.arch.options import (
    Activation,
    Norm,
    Placement,
    Pooler,
    Pooling,
    Position,
    TransformerOptions,
)
from distllm.arch.stack import Stack, dtype_of, embed, make_embedding, refuse, stack_init_rules
from distllm.errors import ConfigError
from distllm.layers.cache import KVCache
from distllm.layers.init import InitRules, init_parameters
from distllm.registry import register, unknown_name
from distllm.types import IGNORE_INDEX, Batch, ModelOutput


@dataclass(kw_only=True, slots=True)
class EncoderOptions(TransformerOptions):
    """Shape of an encoder-only model; the defaults are BERT's."""

    name: str = "encoder"
    """Registry key of the architecture."""
    n_kv_heads: int = 4
    """Key/value heads per block; each serves n_heads / n_kv_heads query heads."""
    d_ff: int = 1024
    """Inner width of the feed-forward layer (three matrices of d_model x d_ff if `gated`, else two)."""
    norm: Norm = Norm.layer
    """`rms` (no mean is taken off) or `layer`."""
    norm_eps: float = 1e-12
    """Added to the mean square inside each norm."""
    norm_placement: Placement = Placement.post
    """`pre` normalises what enters attention and feed-forward, `post` the sum behind them, `output` what they return,
    `sandwich` both what enters and what they return."""
    embedding_norm: bool = True
    """Normalise the sum of the embeddings."""
    position: Position = Position.learned
    """`rotary`, `learned`, `sinusoidal` (fixed), `relative` (a learned bias per distance bucket and head) or `none`."""
    token_types: int = 2
    """Rows of the token-type embedding; 0 = there is none."""
    qkv_bias: bool = True
    """Query, key and value projections have a bias."""
    out_bias: bool = True
    """The projection behind attention has a bias."""
    ff_bias: bool = True
    """Feed-forward matrices have a bias."""
    gated: bool = False
    """Feed-forward multiplies the activated part by a second one (SwiGLU, GeGLU)."""
    activation: Activation = Activation.gelu
    """`silu`, `gelu` (exact), `gelu_tanh`, `relu` or `relu2` (its square)."""
    head_bias: bool = True
    """The output matrix has a bias."""
    head_transform: bool = True
    """Dense layer, activation and norm before the output matrix."""
    pooling: Pooling = Pooling.first
    """Which state of a sequence a verdict is read from: the `first`, the `last` or the `mean` of the real tokens."""
    pooler: Pooler = Pooler.tanh
    """What stands between: nothing, a dense layer and `tanh` (BERT), or the `transform` of `head_transform` (ModernBERT)."""


@register("arch")
class Encoder(Stack):
    """A bidirectional model. Its forward takes the keyword arguments every architecture takes."""

    Options = EncoderOptions
    abilities = Abilities(objectives=("mlm",), sft="", generates=False)

    def __init__(self, options: EncoderOptions, head: str = "lm", seed: int = 0) -> None:
        """Build the model with initial weights that depend on `seed` and the parameters' names only.

        Args:
            options: the shape.
            head: "lm" (masked tokens), "classify" (labels of a sequence), "tag" (labels of tokens), "last" (a score per
                sequence), "value" (scalar per position) or "none".
            seed: of the initial weights.

        Raises:
            ConfigError: the head is unknown or the shape is impossible.
        """
        if head not in HEADS or head == "likelihood":
            raise ConfigError(unknown_name("head", head, set(HEADS) - {"likelihood"}))
        super().__init__(options, causal=False)
        self.head_name = head
        self.embed = make_embedding(options)
        self.head = HEADS[head](options, self.embed if options.tie_embeddings else None)
        init_parameters(self, seed)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        encoder_states: Tensor | None = None,
        cache: KVCache | None = None,
        compute_logits: bool = True,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [batch, seq] int64.
            attention_mask: [batch, seq], True on real tokens. Padding may be on either side.
            position_ids: [1 or batch, seq]; None counts the real tokens, from 0 in every segment.
            segment_ids: [batch, seq] int64 of packed rows: tokens see each other within one segment, 0 is padding.
            token_type_ids: [batch, seq] int64, 0 and 1 for the two parts of a pair; None = all 0.
            prefix_lengths: must be None, as must every argument not listed here.
            inputs_embeds: [batch, seq, d_model] in place of `input_ids`.
            decoder_input_ids: must be None.
            decoder_attention_mask: must be None.
            decoder_position_ids: must be None.
            decoder_segment_ids: must be None.
            encoder_states: must be None.
            cache: must be None: later tokens change the states of earlier ones.
            compute_logits: False stops at `last_hidden_state` and leaves the head to the caller.

        Returns:
            ModelOutput with `last_hidden_state` and, unless told otherwise, what the head computes.

        Raises:
            ValueError: an argument cannot be used by this architecture, or shapes do not fit.
        """
        refuse(
            "an encoder-only",
            prefix_lengths=prefix_lengths,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_states=encoder_states,
            cache=cache,
        )
        hidden, aux = self.run(
            embed(self.embed, input_ids, inputs_embeds),
            dtype=dtype_of(self.embed),
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            token_type_ids=token_type_ids,
        )
        output = ModelOutput()
        if compute_logits:
            if segment_ids is not None and self.head_name in ("last", "classify"):
                raise ValueError(
                    "a verdict per row needs one sequence per row; segment_ids mark packing"
                )
            output = self.head(hidden, attention_mask)
        output.last_hidden_state, output.aux = hidden, aux
        return output

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split: name pattern -> `column | row | vocab | sequence | whole`."""
        plan = {"embed.weight": "vocab", **super().shard_plan()}
        if isinstance(self.head, LMHead):
            plan |= {"head.weight": "vocab", "head.bias": "vocab", "head.transform.*": "whole"}
        return plan

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how the parameter starts."""
        own = self.head.init_rules(self.options.d_model, self.options.init_std)
        return {**own, **stack_init_rules(self.options)}

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Write each response behind its prompt, padded on the right; with token types the response is the second part.

        No position predicts a response token, so no label is set.

        Args:
            prompts: token ids.
            responses: token ids; may be empty.
            pad_id: fills the rectangle.
        """
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        shape = (len(prompts), width)
        input_ids = torch.full(shape, pad_id, dtype=torch.int64)
        types = torch.zeros(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            input_ids[row, :end] = torch.tensor([*prompt, *response])
            types[row, len(prompt) : end] = 1
            attention_mask[row, :end] = True
        return Batch(
            input_ids=input_ids,
            labels=torch.full(shape, IGNORE_INDEX, dtype=torch.int64),
            attention_mask=attention_mask,
            token_type_ids=types if self.options.token_types > 1 else None,
        )

    def new_cache(
        self, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: Any
    ) -> KVCache:
        """Refuse: an encoder has nothing to keep.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_GENERATES_NOT)

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> Any:
        """Refuse: an encoder continues nothing.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_GENERATES_NOT)

    def room_after(self, prompt_length: int) -> int:
        """Return how many tokens there is room for behind a prompt, to be judged with it."""
        return self.options.max_seq_len - prompt_length


_GENERATES_NOT = (
    "an encoder-only model does not generate text: every token changes the states of all others. "
    "Choose arch=ARCH among the decoders, or stage=classify, tag or reward for this one."
)

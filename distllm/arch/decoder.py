"""Decoder-only models in the manner of GPT and Llama: embedding, blocks, final norm, head.

The block and its switches are in `block.py` and `options.py`, the stack in `stack.py`, the heads in `heads.py`, Hugging
Face's names and files in `hf/` and `io.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distllm.arch.abilities import Abilities
from distllm.arch.heads import HEADS, LMHead
from distllm.arch.joining import join_behind
from distllm.arch.options import TransformerOptions
from distllm.arch.reading import Reading
from distllm.arch.stack import Stack, dtype_of, embed, make_embedding, refuse, stack_init_rules
from distllm.errors import ConfigError
from distllm.layers.cache import KVCache
from distllm.layers.init import InitRules, init_parameters
from distllm.registry import register, unknown_name
from distllm.types import Batch, ModelOutput


@dataclass(kw_only=True, slots=True)
class DecoderOptions(TransformerOptions):
    """Shape of a decoder-only model."""

    name: str = "decoder"
    """Registry key of the architecture."""


@register("arch")
class Decoder(Stack):
    """A causal language model. Its forward takes the keyword arguments every architecture takes."""

    Options = DecoderOptions
    abilities = Abilities(objectives=("clm", "prefix"), packs=True)

    def __init__(self, options: DecoderOptions, head: str = "lm", seed: int = 0) -> None:
        """Build the model with initial weights that depend on `seed` and the parameters' names only.

        Args:
            options: the shape.
            head: "lm", "last" (score at the last real token), "value" (scalar per position), "likelihood" (a language
                model whose summed log-probability is the score), "classify" (labels at the last real token), "tag"
                (labels at every token) or "none".
            seed: of the initial weights.

        Raises:
            ConfigError: the head is unknown or the shape is impossible.
        """
        if head not in HEADS:
            raise ConfigError(unknown_name("head", head, HEADS))
        super().__init__(options, causal=True)
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
            attention_mask: [batch, seq], or [batch, cache.length + seq] with a cache; True on real tokens. Padding may
                be on either side.
            position_ids: [1 or batch, seq]; None counts the real tokens, from 0 in every segment.
            segment_ids: [batch, seq] int64 of packed rows: tokens see each other within one segment, 0 is padding.
            token_type_ids: [batch, seq], where the model has token types; must be None otherwise.
            prefix_lengths: [batch] or [batch, seq], how many tokens at the start all of the sequence may see; None = none.
            inputs_embeds: [batch, seq, d_model] in place of `input_ids`.
            decoder_input_ids: must be None.
            decoder_attention_mask: must be None.
            decoder_position_ids: must be None.
            decoder_segment_ids: must be None.
            encoder_states: must be None.
            cache: from `new_cache`; the call appends to it.
            compute_logits: False stops at `last_hidden_state` and leaves the head to the caller.

        Returns:
            ModelOutput with `last_hidden_state` and, unless told otherwise, what the head computes.

        Raises:
            ValueError: an argument cannot be used by this architecture, or shapes do not fit.
        """
        refuse(
            "a decoder-only",
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_states=encoder_states,
            token_type_ids=None if self.options.token_types else token_type_ids,
        )
        past = 0 if cache is None else cache.length
        hidden, aux = self.run(
            embed(self.embed, input_ids, inputs_embeds),
            dtype=dtype_of(self.embed),
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            token_type_ids=token_type_ids,
            prefix_lengths=prefix_lengths,
            cache=cache,
        )
        output = ModelOutput()
        if compute_logits:
            if segment_ids is not None and self.head_name in ("last", "classify"):
                raise ValueError(
                    "a verdict per row needs one sequence per row; segment_ids mark packing"
                )
            mask = None if attention_mask is None else attention_mask[:, past:]
            output = self.head(hidden, mask)
        output.last_hidden_state, output.aux = hidden, aux
        return output

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split: name pattern -> `column | row | vocab | sequence | whole`.

        A scalar head is in no pattern: it stays whole.
        """
        head = {"head.weight": "vocab"} if isinstance(self.head, LMHead) else {}
        return {"embed.weight": "vocab", **super().shard_plan(), **head}

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how the parameter starts."""
        own = self.head.init_rules(self.options.d_model, self.options.init_std)
        return {**own, **stack_init_rules(self.options)}

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Write each response behind its prompt, padded on the right.

        Args:
            prompts: token ids, at least one per prompt.
            responses: token ids; may be empty.
            pad_id: fills the rectangle.

        Returns:
            Batch of `input_ids`, `attention_mask`, and `labels` at the positions that predict a response token.

        Raises:
            ValueError: a prompt is empty, so nothing predicts the first response token.
        """
        return join_behind(prompts, responses, pad_id)

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> Reading:
        """Read prompts, to be continued by at most `room` tokens; see `arch/reading.py`."""
        return Reading(self, prompts, room, pad_id, dtype)

    def room_after(self, prompt_length: int) -> int:
        """Return how many response tokens there is room for behind a prompt."""
        return self.options.max_seq_len - prompt_length

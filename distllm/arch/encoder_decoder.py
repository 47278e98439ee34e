"""Encoder-decoder models in the manner of T5, BART and Marian: two stacks, the second of which reads the first.

The block and its switches are in `block.py` and `options.py`, the stack in `stack.py`, the heads in `heads.py`, Hugging
Face's names and files in `hf/` and `io.py`. `labels`, log-probabilities and values belong to the decoder's positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distllm.arch.abilities import Abilities
from distllm.arch.heads import HEADS, LMHead
from distllm.arch.joining import pad_right
from distllm.arch.options import TransformerOptions
from distllm.arch.reading import CrossReading
from distllm.arch.stack import (
    Stack,
    dtype_of,
    embed,
    make_embedding,
    refuse,
    stack_init_rules,
    stack_plan,
)
from distllm.errors import ConfigError
from distllm.layers.cache import CrossCache
from distllm.layers.init import InitRules, init_parameters
from distllm.registry import register, unknown_name
from distllm.types import IGNORE_INDEX, Batch, ModelOutput


@dataclass(kw_only=True, slots=True)
class EncoderDecoderOptions(TransformerOptions):
    """Shape of an encoder-decoder model; the switches hold for both stacks."""

    name: str = "encoder_decoder"
    """Registry key of the architecture."""
    n_decoder_layers: int | None = None
    """Number of blocks of the decoder; None = as many as the encoder has (`n_layers`)."""
    decoder_start_id: int = 0
    """Token that opens every target. T5: 0, the padding; BART: 2, the end token."""


@register("arch")
class EncoderDecoder(nn.Module):
    """A model of targets given sources. Its forward takes the keyword arguments every architecture takes."""

    Options = EncoderDecoderOptions
    abilities = Abilities(objectives=("span", "ul2", "prefix"), sft="seq2seq", two_sequences=True)

    def __init__(self, options: EncoderDecoderOptions, head: str = "lm", seed: int = 0) -> None:
        """Build the model with initial weights that depend on `seed` and the parameters' names only.

        Args:
            options: the shape.
            head: as for a decoder; every head reads the decoder's states.
            seed: of the initial weights.

        Raises:
            ConfigError: the head is unknown or the shape is impossible.
        """
        super().__init__()
        if head not in HEADS:
            raise ConfigError(unknown_name("head", head, HEADS))
        self.options, self.head_name = options, head
        self.embed = make_embedding(options)
        self.encoder = Stack(options, causal=False)
        self.decoder = Stack(_decoder_options(options), causal=True, cross=True)
        self.head = HEADS[head](options, self.embed if options.tie_embeddings else None)
        if getattr(self.head, "bias", None) is not None and isinstance(self.head, LMHead):
            self.head.fix_bias()
        self.d_head = self.decoder.d_head
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
        cache: CrossCache | None = None,
        compute_logits: bool = True,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [batch, source_seq] int64; not needed with `encoder_states`, nor with a cache that has read them.
            attention_mask: [batch, source_seq], True on real tokens, padding on either side.
            position_ids: [1 or batch, source_seq]; None counts the real tokens, from 0 in every segment.
            segment_ids: [batch, source_seq] of packed sources: 1, 2, ..., 0 is padding.
            token_type_ids: must be None, as must prefix_lengths.
            prefix_lengths: must be None.
            inputs_embeds: [batch, source_seq, d_model] in place of `input_ids`.
            decoder_input_ids: [batch, target_seq] int64, the start token first.
            decoder_attention_mask: [batch, target_seq], or [batch, cache.length + target_seq] with a cache.
            decoder_position_ids: [1 or batch, target_seq].
            decoder_segment_ids: [batch, target_seq] of packed targets; a target sees the source of its own number.
            encoder_states: [batch, source_seq, d_model], what an earlier call returned, in place of the source.
            cache: from `new_cache`; the call appends to it. The first call gives the source, later ones need not.
            compute_logits: False stops at `last_hidden_state` and leaves the head to the caller.

        Returns:
            ModelOutput with `encoder_states`, the decoder's `last_hidden_state` and, unless told otherwise, what the head
            computes.

        Raises:
            ValueError: an argument cannot be used by this architecture or is missing, or shapes do not fit.
        """
        refuse("an encoder-decoder", token_type_ids=token_type_ids, prefix_lengths=prefix_lengths)
        if decoder_input_ids is None:
            raise ValueError("an encoder-decoder model needs decoder_input_ids; `join` makes them")
        dtype = dtype_of(self.embed)
        if cache is not None and cache.encoder_states is not None:
            encoder_states, attention_mask = cache.encoder_states, cache.encoder_mask
        elif encoder_states is None:
            encoder_states = self.encode(
                input_ids,
                attention_mask,
                position_ids=position_ids,
                segment_ids=segment_ids,
                inputs_embeds=inputs_embeds,
            )
        if cache is not None and cache.encoder_states is None:
            cache.encoder_states, cache.encoder_mask = encoder_states, attention_mask
        past = 0 if cache is None else cache.length
        hidden, aux = self.decoder.run(
            self.embed(decoder_input_ids),
            dtype=dtype,
            attention_mask=decoder_attention_mask,
            position_ids=decoder_position_ids,
            segment_ids=decoder_segment_ids,
            cache=cache,
            encoder_states=encoder_states,
            encoder_mask=attention_mask,
            encoder_segments=segment_ids,
        )
        output = ModelOutput()
        if compute_logits:
            if decoder_segment_ids is not None and self.head_name in ("last", "classify"):
                raise ValueError(
                    "a verdict per row needs one sequence per row; decoder_segment_ids mark packing"
                )
            mask = None if decoder_attention_mask is None else decoder_attention_mask[:, past:]
            output = self.head(hidden, mask)
        output.last_hidden_state, output.aux = hidden, aux
        output.encoder_states = encoder_states
        return output

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Run the encoder alone: [batch, source_seq, d_model]. Arguments as of `forward`."""
        states, _ = self.encoder.run(
            embed(self.embed, input_ids, inputs_embeds),
            dtype=dtype_of(self.embed),
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
        )
        return states

    def blocks(self) -> Sequence[nn.Module]:
        """Return the repeated blocks, the encoder's first."""
        return [*self.encoder.blocks(), *self.decoder.blocks()]

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split: name pattern -> `column | row | vocab | sequence | whole`."""
        options = self.options
        head = {"head.weight": "vocab"} if isinstance(self.head, LMHead) else {}
        return {
            "embed.weight": "vocab",
            **stack_plan("encoder.", options),
            **stack_plan("decoder.", options),
            **head,
        }

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how the parameter starts.

        Where what enters a tied output matrix is scaled down (the first T5), the embeddings start that much larger.
        """
        options = self.options
        return {
            **self.head.init_rules(options.d_model, options.init_std),
            "embed.weight": ("normal", options.init_std / options.logit_scale),
            **stack_init_rules(options),
        }

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Give the prompts to the encoder and the responses, behind the start token, to the decoder; pad on the right.

        The decoder reads the whole response, so that a score of its last state has seen all of it; its last position
        has no label.

        Args:
            prompts: token ids, at least one per prompt.
            responses: token ids; may be empty.
            pad_id: fills the rectangles.

        Raises:
            ValueError: a prompt is empty.
        """
        if not all(len(p) for p in prompts):
            raise ValueError("a prompt is empty; the decoder would have nothing to read")
        targets = [[self.options.decoder_start_id, *r] for r in responses]
        input_ids, attention_mask = pad_right(prompts, pad_id)
        decoder_input_ids, decoder_mask = pad_right(targets, pad_id)
        labels, _ = pad_right([[*r, IGNORE_INDEX] for r in responses], IGNORE_INDEX)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_mask,
            labels=labels,
        )

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> CrossReading:
        """Read prompts, to be continued by at most `room` tokens; see `arch/reading.py`."""
        return CrossReading(self, prompts, room, pad_id, dtype)

    def room_after(self, prompt_length: int) -> int:
        """Return how many response tokens there is room for behind a prompt."""
        limit = self.options.max_seq_len
        return limit - 1 if prompt_length <= limit else 1 + limit - prompt_length

    def new_cache(
        self, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> CrossCache:
        """Allocate a cache of `max_seq_len` columns of the decoder; `dtype` is the one heavy work runs in."""
        options = self.decoder.options
        return CrossCache(
            options.n_layers,
            batch_size,
            options.n_kv_heads,
            max_seq_len,
            self.d_head,
            dtype,
            device,
        )


def _decoder_options(options: EncoderDecoderOptions) -> EncoderDecoderOptions:
    return replace(options, n_layers=options.n_decoder_layers or options.n_layers)

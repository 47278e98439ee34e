"""The original GLM: one stack that reads a text from both sides and says spans of it, or an answer to it, one by one.

It is a prefix language model that behaves like an encoder-decoder: part A (the text) is seen by every token, part B (what
is said) by its own later tokens. Every token has two positions: its place in the text, where a said token takes that of
the mask it fills, and its place within what is said, 0 for the text. The second position also tells part A from part B.

Chat models of the same name (GLM-4) are causal decoders: `hf/glm.py`. Blanks are made in `objectives/blank.py`.

Reference: Du et al. 2022, arXiv 2103.10360, section 2; numbers as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distllm.arch.abilities import Abilities
from distllm.arch.heads import HEADS, LMHead
from distllm.arch.joining import pad_right
from distllm.arch.options import Activation, Norm, Position, TransformerOptions
from distllm.arch.reading import BlankReading
from distllm.arch.stack import Stack, dtype_of, embed, make_embedding, refuse, stack_init_rules
from distllm.errors import ConfigError
from distllm.layers.cache import KVCache
from distllm.layers.init import InitRules, init_parameters
from distllm.registry import register, unknown_name
from distllm.types import IGNORE_INDEX, Batch, ModelOutput


@dataclass(kw_only=True, slots=True)
class GLMOptions(TransformerOptions):
    """Shape of a GLM; the switches default to the published ones."""

    name: str = "glm"
    """Registry key of the architecture."""
    n_kv_heads: int = 4
    norm: Norm = Norm.layer
    position: Position = Position.none
    """The two learned tables are GLM's own; nothing else tells the order of tokens."""
    qkv_bias: bool = True
    out_bias: bool = True
    gated: bool = False
    activation: Activation = Activation.gelu_tanh
    ff_bias: bool = True
    d_ff: int = 1024
    blank_id: int | None = None
    """Token that stands in a text for an answer to be said, `[gMASK]`. None = the tokenizer's, set when training starts."""
    start_id: int | None = None
    """Token that opens what is said, `<|startofpiece|>`. None = the tokenizer's."""


@register("arch")
class GLM(Stack):
    """A prefix language model. Its forward takes the keyword arguments every architecture takes."""

    Options = GLMOptions
    abilities = Abilities(objectives=("blank", "prefix"), sft="seq2seq")

    def __init__(self, options: GLMOptions, head: str = "lm", seed: int = 0) -> None:
        """Build the model with initial weights that depend on `seed` and the parameters' names only.

        Args:
            options: the shape.
            head: as for a decoder.
            seed: of the initial weights.

        Raises:
            ConfigError: the head is unknown or the shape is impossible.
        """
        if head not in HEADS:
            raise ConfigError(unknown_name("head", head, HEADS))
        super().__init__(options, causal=True)
        self.options: GLMOptions
        self.head_name = head
        self.embed = make_embedding(options)
        shape = options.max_seq_len + 1, options.d_model
        self.place_embed = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.span_embed = nn.Embedding(*shape, _weight=torch.empty(shape))
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
            position_ids: [1 or batch, 2, seq]: place in the text, and place within what is said (0 = part A). None takes
                the first `prefix_lengths` tokens as part A, whose last one is the blank that the rest fills.
            segment_ids: [batch, seq] int64 of packed rows: tokens see each other within one segment, 0 is padding. Needs
                `position_ids`.
            token_type_ids: must be None, as must all arguments whose names begin with decoder or encoder.
            prefix_lengths: [batch], how many tokens are part A; None = all, where there are no `position_ids`.
            inputs_embeds: [batch, seq, d_model] in place of `input_ids`.
            decoder_input_ids: must be None.
            decoder_attention_mask: must be None.
            decoder_position_ids: must be None.
            decoder_segment_ids: must be None.
            encoder_states: must be None.
            cache: from `new_cache`; the first call holds part A, later ones part B.
            compute_logits: False stops at `last_hidden_state` and leaves the head to the caller.

        Raises:
            ValueError: an argument cannot be used by this architecture, or shapes do not fit.
        """
        refuse(
            "a GLM",
            token_type_ids=token_type_ids,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_states=encoder_states,
        )
        x = embed(self.embed, input_ids, inputs_embeds)
        past = 0 if cache is None else cache.length
        if position_ids is None:
            if segment_ids is not None or past:
                raise ValueError("packed rows and cached ones need position_ids, [batch, 2, seq]")
            position_ids = _positions(x, attention_mask, prefix_lengths)
        if position_ids.ndim != 3 or position_ids.shape[1] != 2:
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)}, must be [batch, 2, seq]: place in the text, and "
                "place within what is said"
            )
        place, in_span = position_ids.unbind(dim=1)
        hidden, aux = self.run(
            x + self.place_embed(place) + self.span_embed(in_span),
            dtype=dtype_of(self.embed),
            attention_mask=attention_mask,
            position_ids=place,
            segment_ids=segment_ids,
            prefix_lengths=None
            if past
            else _lengths_of_part_a(in_span, attention_mask, segment_ids),
            cache=cache,
        )
        output = ModelOutput()
        if compute_logits:
            if segment_ids is not None and self.head_name in ("last", "classify"):
                raise ValueError(
                    "a verdict per row needs one sequence per row; segment_ids mark packing"
                )
            output = self.head(hidden, None if attention_mask is None else attention_mask[:, past:])
        output.last_hidden_state, output.aux = hidden, aux
        return output

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split: name pattern -> `column | row | vocab | sequence | whole`."""
        head = {"head.weight": "vocab"} if isinstance(self.head, LMHead) else {}
        tables = {
            "embed.weight": "vocab",
            "place_embed.weight": "whole",
            "span_embed.weight": "whole",
        }
        return {**tables, **super().shard_plan(), **head}

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how the parameter starts."""
        own = self.head.init_rules(self.options.d_model, self.options.init_std)
        return {**own, **stack_init_rules(self.options)}

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Write `prompt [gMASK] | <|startofpiece|> response`, the response as part B at the blank's place.

        Args:
            prompts: token ids; may be empty.
            responses: token ids; may be empty.
            pad_id: fills the rectangle.

        Raises:
            ConfigError: the model does not know the two special tokens.
        """
        options = self.options
        if options.blank_id is None or options.start_id is None:
            raise ConfigError(
                f"arch.blank_id={options.blank_id} and arch.start_id={options.start_id} must be token ids, to tell a "
                "prompt from its response. Training sets them from the tokenizer's [gMASK] and <|startofpiece|>."
            )
        texts = [[*p, options.blank_id] for p in prompts]
        said = [[options.start_id, *r] for r in responses]
        input_ids, attention_mask = pad_right(
            [[*a, *b] for a, b in zip(texts, said, strict=True)], pad_id
        )
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for row, (text, response) in enumerate(zip(texts, responses, strict=True)):
            labels[row, len(text) : len(text) + len(response)] = torch.tensor(
                list(response), dtype=torch.int64
            )
        lengths = torch.tensor([len(text) for text in texts])
        return Batch(
            input_ids=input_ids,
            labels=labels,
            attention_mask=attention_mask,
            position_ids=_positions(input_ids, None, lengths),
        )

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> BlankReading:
        """Read prompts, to be continued by at most `room` tokens; see `arch/reading.py`."""
        return BlankReading(self, prompts, room, pad_id, dtype)

    def room_after(self, prompt_length: int) -> int:
        """Return how many response tokens there is room for behind a prompt."""
        return self.options.max_seq_len - prompt_length - 2


def _positions(x: Tensor, attention_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Number part A from 0; part B stands at part A's last place and counts from 1: [1 or batch, 2, seq]."""
    columns = torch.arange(x.shape[1], device=x.device)[None]
    if attention_mask is not None:
        columns = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    if lengths is None:
        return torch.stack((columns, torch.zeros_like(columns)), dim=1)
    lengths = lengths[:, None].to(x.device)
    place = torch.minimum(columns, lengths - 1)
    return torch.stack((place, (columns - lengths + 1).clamp(min=0)), dim=1)


def _lengths_of_part_a(
    in_span: Tensor, attention_mask: Tensor | None, segment_ids: Tensor | None
) -> Tensor:
    """Count part A of every token's segment: [1 or batch, 1 or seq], for `masks.lay_out`."""
    in_text = in_span == 0
    if segment_ids is None:
        if attention_mask is not None:
            in_text = in_text & attention_mask.bool()
        return in_text.sum(dim=1)
    counts = torch.zeros(
        len(segment_ids), int(segment_ids.max()) + 1, dtype=torch.int64, device=in_span.device
    )
    counts.scatter_add_(1, segment_ids, in_text.long().expand_as(segment_ids))
    return counts.gather(1, segment_ids)

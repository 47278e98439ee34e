"""Decoder-only models in the manner of GPT and Llama: embedding, blocks, final norm, head.

The block is in `block.py`, the heads in `heads.py`, Hugging Face's names and files in `hf/` and `io.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distllm.arch.block import Attention, Block, Context
from distllm.arch.heads import HEADS, LMHead
from distllm.errors import ConfigError
from distllm.layers.cache import KVCache
from distllm.layers.feed_forward import GatedFeedForward
from distllm.layers.init import InitRules, init_parameters
from distllm.layers.masks import lay_out
from distllm.layers.norms import RMSNorm
from distllm.layers.positions import rotary_tables
from distllm.layers.precision import compute_dtype
from distllm.registry import register, unknown_name
from distllm.types import IGNORE_INDEX, Batch, ModelOutput


@dataclass(kw_only=True, slots=True)
class DecoderOptions:
    """Shape of a decoder-only model."""

    name: str = "decoder"
    """Registry key of the architecture."""
    vocab_size: int = 4096
    """Number of token ids; at least the tokenizer's."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Query heads per block."""
    n_kv_heads: int = 2
    """Key/value heads per block; each serves n_heads / n_kv_heads query heads. Fewer make the cache smaller."""
    d_head: int | None = None
    """Width of one head, even. None = d_model / n_heads."""
    d_ff: int = 704
    """Inner width of the feed-forward layer (it has three matrices of d_model x d_ff)."""
    max_seq_len: int = 512
    """Longest sequence, in tokens, prompt and response together."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths; larger values suit longer sequences."""
    norm_eps: float = 1e-5
    """Added to the mean square inside each norm."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    dropout: float = 0.0
    """Probability of zeroing each element of what attention and feed-forward add to the residual stream."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get
    init_std / sqrt(2 n_layers)."""


@register("arch")
class Decoder(nn.Module):
    """A causal language model. Its forward takes the keyword arguments every architecture takes."""

    Options = DecoderOptions

    def __init__(self, options: DecoderOptions, head: str = "lm", seed: int = 0) -> None:
        """Build the model with initial weights that depend on `seed` and the parameters' names only.

        Args:
            options: the shape.
            head: "lm", "last" (score at the last real token), "value" (scalar per position) or "likelihood" (a language
                model whose summed log-probability is the score).
            seed: of the initial weights.

        Raises:
            ConfigError: the head is unknown or the shape is impossible.
        """
        super().__init__()
        if head not in HEADS:
            raise ConfigError(unknown_name("head", head, HEADS))
        d_head = resolve_d_head(options)
        self.options, self.head_name = options, head
        self.embed = nn.Embedding(
            options.vocab_size, options.d_model, _weight=_empty_embedding(options)
        )
        self.layers = nn.ModuleList(
            Block(
                attention_norm=RMSNorm(options.d_model, options.norm_eps),
                attention=Attention(
                    options.d_model, options.n_heads, options.n_kv_heads, d_head, layer
                ),
                feed_forward_norm=RMSNorm(options.d_model, options.norm_eps),
                feed_forward=GatedFeedForward(options.d_model, options.d_ff),
                dropout=options.dropout,
            )
            for layer in range(options.n_layers)
        )
        self.final_norm = RMSNorm(options.d_model, options.norm_eps)
        self.head = HEADS[head](
            options.vocab_size, options.d_model, self.embed if options.tie_embeddings else None
        )
        self.d_head = d_head
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
            token_type_ids: not used by a decoder; must be None, as must every argument not listed here.
            prefix_lengths: must be None.
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
        _refuse(
            token_type_ids=token_type_ids,
            prefix_lengths=prefix_lengths,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_states=encoder_states,
        )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seq, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + seq > self.options.max_seq_len:
            raise ValueError(
                f"the sequence has {past + seq} tokens, but the model was built for at most "
                f"max_seq_len={self.options.max_seq_len}"
            )
        dtype = compute_dtype(self.embed.weight)
        layout = lay_out(
            (batch, seq),
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            past=past,
            columns=None if cache is None else cache.max_seq_len,
            dtype=dtype,
            device=x.device,
        )
        rotary = rotary_tables(layout.position_ids, self.d_head, self.options.rope_theta, dtype)
        context = Context(rotary=rotary, bias=layout.bias, cache=cache)
        for block in self.layers:
            x = block(x, context)
        if cache is not None:
            cache.advance(seq)
        hidden = self.final_norm(x)
        output = ModelOutput()
        if compute_logits:
            if segment_ids is not None and self.head_name == "last":
                raise ValueError(
                    "a score per row needs one sequence per row; segment_ids mark packing"
                )
            mask = None if attention_mask is None else attention_mask[:, past:]
            output = self.head(hidden, mask)
        output.last_hidden_state = hidden
        return output

    def blocks(self) -> Sequence[nn.Module]:
        """Return the repeated blocks, in order."""
        return list(self.layers)

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split: name pattern -> `column | row | vocab | sequence`.

        A scalar head is in no pattern: it stays whole.
        """
        head = {"head.weight": "vocab"} if isinstance(self.head, LMHead) else {}
        return {
            "embed.weight": "vocab",
            "layers.*.attention.[qkv]_proj.weight": "column",
            "layers.*.attention.out_proj.weight": "row",
            "layers.*.feed_forward.gate_proj.weight": "column",
            "layers.*.feed_forward.up_proj.weight": "column",
            "layers.*.feed_forward.down_proj.weight": "row",
            "layers.*_norm.weight": "sequence",
            "final_norm.weight": "sequence",
            **head,
        }

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how the parameter starts."""
        std = self.options.init_std
        residual = std / (2 * self.options.n_layers) ** 0.5
        return {
            **self.head.init_rules(self.options.d_model, std),
            "*norm.weight": ("constant", 1.0),
            "*.out_proj.weight": ("normal", residual),
            "*.down_proj.weight": ("normal", residual),
            "*": ("normal", std),
        }

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
        width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        shape = (len(prompts), width)
        input_ids = torch.full(shape, pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not prompt:
                raise ValueError(f"prompt {row} is empty; nothing could predict its response")
            start, end = len(prompt), len(prompt) + len(response)
            input_ids[row, :end] = torch.tensor([*prompt, *response])
            labels[row, start - 1 : end - 1] = input_ids[row, start:end]
            attention_mask[row, :end] = True
        return Batch(input_ids=input_ids, labels=labels, attention_mask=attention_mask)

    def new_cache(
        self, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Allocate a key/value cache of `max_seq_len` columns; `dtype` is the one heavy work runs in."""
        options = self.options
        return KVCache(
            options.n_layers,
            batch_size,
            options.n_kv_heads,
            max_seq_len,
            self.d_head,
            dtype,
            device,
        )


def resolve_d_head(options: DecoderOptions) -> int:
    """Return the width of one head.

    Raises:
        ConfigError: the heads do not fit the model, in numbers.
    """
    if options.n_heads % options.n_kv_heads:
        raise ConfigError(
            f"arch.n_heads={options.n_heads} is not a multiple of arch.n_kv_heads={options.n_kv_heads}. "
            f"Set arch.n_kv_heads to a divisor of {options.n_heads}."
        )
    if options.d_head is None and options.d_model % options.n_heads:
        raise ConfigError(
            f"arch.d_model={options.d_model} is not a multiple of arch.n_heads={options.n_heads}. "
            f"Set arch.d_model={options.d_model // options.n_heads * options.n_heads} or give arch.d_head."
        )
    d_head = options.d_head or options.d_model // options.n_heads
    if d_head % 2:
        raise ConfigError(
            f"arch.d_head={d_head} is odd, but rotary positions turn pairs of channels. Set {d_head + 1}."
        )
    return d_head


def _empty_embedding(options: DecoderOptions) -> Tensor:
    return torch.empty(options.vocab_size, options.d_model)


def _refuse(**arguments: Tensor | None) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"a decoder-only model cannot use {', '.join(given)}; leave it out")

"""A stack of blocks between an embedding and a head: positions, masks, the blocks, the final norm.

Architectures inherit it (one stack) or hold two of them (encoder and decoder). It holds no head, and its token
embedding is the architecture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from distllm.arch.block import Block, Context, make_norm
from distllm.arch.options import (
    LayerType,
    Placement,
    Position,
    QKNorm,
    RopeStyle,
    TransformerOptions,
    check_switches,
    d_rotary,
    layer_type,
    resolve_d_head,
    window_of,
)
from distllm.layers.attention_kernels import AUTO, reads
from distllm.layers.cache import KVCache
from distllm.layers.init import InitRules
from distllm.layers.masks import Layout, causal_bias, cross_mask, lay_out
from distllm.layers.positions import RelativeBias, Rotary, rotary_tables, sinusoids
from distllm.layers.precision import compute_dtype
from distllm.layers.rope_scaling import check_scaling


class Stack(nn.Module):
    """Embedded tokens in, hidden states out."""

    def __init__(self, options: TransformerOptions, *, causal: bool, cross: bool = False) -> None:
        """Build the stack without values; `init_parameters` of the architecture gives them.

        Args:
            options: shape and switches.
            causal: tokens see no later ones.
            cross: every block attends to an encoder too.

        Raises:
            ConfigError: the shape or the switches are impossible.
        """
        super().__init__()
        check_switches(options)
        check_scaling(options.rope_scaling)
        self.options, self.causal = options, causal
        self.attention_kernel = AUTO
        """Name in `layers.attention_kernels`; an engine may set it before the first call."""
        self.d_head = resolve_d_head(options)
        self.layer_types = {str(layer_type(options, i)) for i in range(options.n_layers)}
        self.windows = {window_of(options, i) for i in range(options.n_layers)}
        if options.position == Position.learned:
            rows = options.max_seq_len + options.position_offset
            self.position_embed = _embedding(rows, options.d_model)
        if options.token_types:
            self.token_type_embed = _embedding(options.token_types, options.d_model)
        if options.position == Position.relative:
            self.relative_bias = RelativeBias(
                options.relative_buckets,
                options.relative_max_distance,
                options.n_heads,
                bidirectional=not causal,
            )
        self.embed_norm = make_norm(options) if options.embedding_norm else None
        self.layers = nn.ModuleList(
            Block(options, layer, cross=cross) for layer in range(options.n_layers)
        )
        self.final_norm = None if options.norm_placement == Placement.post else make_norm(options)

    def run(
        self,
        x: Tensor,
        *,
        dtype: torch.dtype,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        cache: KVCache | None = None,
        encoder_states: Tensor | None = None,
        encoder_mask: Tensor | None = None,
        encoder_segments: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Run the blocks.

        Args:
            x: [batch, seq, d_model], what the token embedding returned.
            dtype: the one heavy work runs in.
            attention_mask: [batch, seq], or [batch, cache.length + seq] with a cache; True on real tokens.
            position_ids: [1 or batch, seq]; None counts the real tokens, from 0 in every segment.
            segment_ids: [batch, seq] int64 of packed rows; 0 is padding.
            token_type_ids: [batch, seq] int64; None = type 0, where the model has types.
            prefix_lengths: see `masks.lay_out`.
            cache: from the architecture's `new_cache`; appended to.
            encoder_states: [batch, source_seq, d_model] for cross-attention.
            encoder_mask: [batch, source_seq], True on real encoder tokens.
            encoder_segments: [batch, source_seq] segment ids of a packed encoder input.

        Returns:
            (hidden states [batch, seq, d_model] behind the final norm, expert losses or None: see `ModelOutput.aux`).

        Raises:
            ValueError: the sequence is longer than the model was built for, or shapes do not fit.
        """
        options = self.options
        batch, seq, _ = x.shape
        past = 0 if cache is None else cache.length
        if past + seq > options.max_seq_len:
            raise ValueError(
                f"the sequence has {past + seq} tokens, but the model was built for at most "
                f"max_seq_len={options.max_seq_len}"
            )
        columns = None if cache is None else cache.max_seq_len
        kernel = AUTO if past else self.attention_kernel  # the others do not read a cache
        layout = lay_out(
            (batch, seq),
            causal=self.causal,
            windows=self.windows,
            attention_mask=attention_mask,
            position_ids=position_ids,
            segment_ids=segment_ids,
            prefix_lengths=prefix_lengths,
            past=past,
            columns=columns,
            dtype=dtype,
            device=x.device,
            kernel=kernel,
        )
        x = self._front(x, layout.position_ids, token_type_ids, dtype)
        if options.position == Position.relative:
            kv_seq = columns if past and columns else past + seq
            self._add_relative_bias(layout, seq, kv_seq, past, dtype, kernel)
        context = Context(masks=layout.masks, rotary=self._rotary(layout, dtype), cache=cache)
        context.real, context.kernel = layout.real, kernel
        if encoder_states is not None:
            context.encoder_states = encoder_states
            context.cross_mask = cross_mask(
                segment_ids,
                encoder_segments,
                encoder_mask,
                dtype,
                shape=(batch, seq, encoder_states.shape[1]),
                kernel=kernel,
                device=x.device,
            )
        for block in self.layers:
            x = block(x, context)
        if cache is not None:
            cache.advance(seq)
        hidden = x if self.final_norm is None else self.final_norm(x)
        return hidden, self._expert_losses(context.aux)

    def _expert_losses(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """Average over the blocks that have experts; times the coefficients. None in eval mode, or without experts."""
        coefficients = {
            "balance": self.options.balance_coef,
            "router_z": self.options.router_z_coef,
        }
        losses = {
            key: coefficient * torch.stack([part[key] for part in parts]).mean()
            for key, coefficient in coefficients.items()
            if coefficient and parts and key in parts[0]
        }
        return losses or None

    def _front(
        self, x: Tensor, position_ids: Tensor, token_type_ids: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Scale the token embeddings, add what else is embedded, normalise."""
        options = self.options
        if options.embedding_scale != 1.0:
            x = x * x.new_full((), options.embedding_scale)  # rounded to the dtype, as in Gemma
        if options.position == Position.learned:
            x = x + self.position_embed(position_ids + options.position_offset)
        elif options.position == Position.sinusoidal:
            x = x + sinusoids(position_ids + options.position_offset, options.d_model, x.dtype)
        if options.token_types:
            if token_type_ids is None:
                x = x + self.token_type_embed.weight[0]
            else:
                x = x + self.token_type_embed(token_type_ids)
        elif token_type_ids is not None:
            raise ValueError("the model has no token types; leave token_type_ids out")
        return x if self.embed_norm is None else self.embed_norm(x)

    def _rotary(self, layout: Layout, dtype: torch.dtype) -> dict[str, Rotary]:
        options = self.options
        if options.position != Position.rotary:
            return {}
        tables = {}
        for kind in self.layer_types:
            local = kind == LayerType.window and options.rope_local_theta is not None
            tables[kind] = rotary_tables(
                layout.position_ids,
                d_rotary(options),
                options.rope_local_theta if local else options.rope_theta,  # type: ignore[arg-type]
                dtype,
                scaling={} if local else options.rope_scaling,
                sign=options.rope_sign,
                interleaved=options.rope_style == RopeStyle.interleaved,
            )
        return tables

    def _add_relative_bias(
        self,
        layout: Layout,
        seq: int,
        kv_seq: int,
        past: int,
        dtype: torch.dtype,
        kernel: str,
    ) -> None:
        learned = self.relative_bias(seq, kv_seq, past).to(dtype)
        for window, mask in layout.masks.items():
            bias = mask.bias
            hides = reads(kernel, learned.device) == "bias"
            if bias is None and mask.causal and hides:
                bias = causal_bias(seq, dtype, learned.device)
            layout.masks[window] = replace(mask, bias=learned if bias is None else learned + bias)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the repeated blocks, in order."""
        return list(self.layers)

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split: name pattern -> `column | row | vocab | heads | sequence | whole`.

        `column` splits the first dim (of a bias too), `row` and `heads` the second; the bias behind a `row` stays whole, as does a
        gain that each head is multiplied with.
        """
        return stack_plan("", self.options)

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


def stack_plan(prefix: str, options: TransformerOptions) -> dict[str, str]:
    """Return the shard plan of a stack whose parameters' names begin with `prefix`."""
    block = f"{prefix}layers.*."
    plan = {
        f"{block}*attention.[qkv]_proj.weight": "column",
        f"{block}*attention.out_proj.weight": "row",
        f"{block}feed_forward.down_proj.weight": "row",
        f"{block}feed_forward.up_proj.weight": "column",
        f"{block}*attention_norm.*": "sequence",
        f"{block}*attention_out_norm.*": "sequence",
        f"{block}feed_forward*_norm.*": "sequence",
        f"{prefix}final_norm.*": "sequence",
        f"{prefix}embed_norm.*": "sequence",
        f"{prefix}position_embed.weight": "whole",
        f"{prefix}token_type_embed.weight": "whole",
        f"{prefix}relative_bias.weight": "heads",
    }
    if options.gated:
        plan[f"{block}feed_forward.gate_proj.weight"] = "column"
    if options.num_experts:
        plan[f"{block}feed_forward.router.*"] = "whole"
        plan[f"{block}feed_forward.gate_up_*"] = "whole"
        plan[f"{block}feed_forward.down_proj"] = "whole"
        plan[f"{block}feed_forward.down_bias"] = "whole"
    if options.qk_norm != QKNorm.none:
        plan[f"{block}attention.[qk]_norm.*"] = "whole"
    if options.attention_sinks:
        plan[f"{block}attention.sinks"] = "column"
    if options.qkv_bias:
        plan[f"{block}*attention.[qkv]_proj.bias"] = "column"
    if options.out_bias:
        plan[f"{block}*attention.out_proj.bias"] = "whole"
    if options.ff_bias:
        plan[f"{block}feed_forward.up_proj.bias"] = "column"
        plan[f"{block}feed_forward.gate_proj.bias"] = "column"
        plan[f"{block}feed_forward.down_proj.bias"] = "whole"
    return plan


def stack_init_rules(options: TransformerOptions) -> InitRules:
    """Return how the parameters of a stack and of a token embedding start, for the end of an architecture's rules."""
    std = options.init_std
    residual = std / (2 * options.n_layers) ** 0.5
    return {
        "*norm.weight": ("constant", 1.0 - options.norm_gain_offset),
        "*.bias": ("constant", 0.0),
        "*_bias": ("constant", 0.0),
        "*.sinks": ("constant", 0.0),
        "*.out_proj.weight": ("normal", residual),
        "*.down_proj.weight": ("normal", residual),
        "*.down_proj": ("normal", residual),
        "*": ("normal", std),
    }


def make_embedding(options: TransformerOptions) -> nn.Embedding:
    """Build the token embedding, without values."""
    return _embedding(options.vocab_size, options.d_model)


def embed(module: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Look tokens up, or take what was looked up already; exactly one of the two is given."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    return module(input_ids) if inputs_embeds is None else inputs_embeds


def dtype_of(module: nn.Embedding) -> torch.dtype:
    """Return the dtype heavy work of a model with this embedding runs in."""
    return compute_dtype(module.weight)


def refuse(kind: str, **arguments: object) -> None:
    """Raise ValueError that names the arguments a `kind` of model was given but cannot use."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{kind} model cannot use {', '.join(given)}; leave it out")


def _embedding(rows: int, width: int) -> nn.Embedding:
    # Without values: torch would draw normal ones first, which takes time for large vocabularies.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))

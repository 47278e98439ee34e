"""The transformer block: attention, perhaps attention to an encoder, and a feed-forward layer, each added to the stream.

What it does in detail is chosen by the switches in `options.py`. Stacks of blocks are in `stack.py`; embeddings and
heads live beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from distllm.arch.options import (
    Norm,
    Placement,
    QKNorm,
    RopeStyle,
    TransformerOptions,
    has_experts,
    layer_type,
    resolve_d_head,
    window_of,
)
from distllm.layers.attention import attention
from distllm.layers.attention_kernels import AUTO
from distllm.layers.cache import CrossCache, KVCache
from distllm.layers.experts import Experts, Router
from distllm.layers.feed_forward import FeedForward, GatedFeedForward
from distllm.layers.masks import Mask
from distllm.layers.norms import LayerNorm, RMSNorm
from distllm.layers.positions import Rotary, rotate
from distllm.layers.products import Linear, product_dtype


@dataclass(slots=True)
class Context:
    """What all blocks of one call share."""

    masks: dict[int | None, Mask]
    """Window -> who sees whom."""
    rotary: dict[str, Rotary] = field(default_factory=dict)
    """Type of layer -> (cos, sin) of the new tokens, each [1 or batch, seq, d_rotary]; empty = positions are not rotary."""
    cache: KVCache | None = None
    """Keys and values of earlier calls; the new ones are appended."""
    encoder_states: Tensor | None = None
    """[batch, source_seq, d_model]: what cross-attention reads."""
    cross_mask: Mask = field(default_factory=Mask)
    """Who sees which encoder state."""
    real: Tensor | None = None
    """[batch, seq] bool: False on padding, which must not count in an expert loss; None = all are real."""
    kernel: str = AUTO
    """Which attention kernel the masks are made for."""
    aux: list[dict[str, Tensor]] = field(default_factory=list)
    """Losses of the blocks themselves, filled on the way."""


def make_norm(options: TransformerOptions, dim: int | None = None) -> nn.Module:
    """Build the norm that `options` asks for, over `dim` channels (None = d_model)."""
    dim = options.d_model if dim is None else dim
    if options.norm == Norm.layer:
        return LayerNorm(dim, options.norm_eps, bias=options.norm_bias)
    return RMSNorm(dim, options.norm_eps, offset=options.norm_gain_offset, gain=options.norm_gain)


def make_feed_forward(options: TransformerOptions, layer: int) -> nn.Module:
    """Build the feed-forward layer, or the experts, that `options` ask for in block `layer`."""
    if has_experts(options, layer):
        router = Router(
            options.d_model,
            options.num_experts,
            options.experts_per_token,
            top_first=options.router_top_first,
            renormalise=options.router_renormalise,
            bias=options.router_bias,
        )
        return Experts(
            options.d_model,
            options.d_expert or options.d_ff,
            options.num_experts,
            router,
            activation=options.activation,
            clamp=options.expert_clamp,
            alpha=options.expert_alpha,
            bias=options.expert_bias,
        )
    cls = GatedFeedForward if options.gated else FeedForward
    return cls(options.d_model, options.d_ff, options.activation, options.ff_bias)


class Attention(nn.Module):
    """Multi-head self-attention with grouped key/value heads.

    Reference: Ainslie et al. 2023, arXiv 2305.13245 (grouped key/value heads).
    """

    def __init__(self, options: TransformerOptions, layer: int) -> None:
        super().__init__()
        d_model, d_head = options.d_model, resolve_d_head(options)
        self.n_heads, self.n_kv_heads, self.d_head = options.n_heads, options.n_kv_heads, d_head
        self.layer, self.layer_type = layer, str(layer_type(options, layer))
        self.window = window_of(options, layer)
        self.scale = d_head**-0.5 if options.attention_scale is None else options.attention_scale
        self.softcap = options.attention_softcap
        self.interleaved = options.rope_style == RopeStyle.interleaved
        self.rotates_all = not self.interleaved and options.rope_fraction == 1.0
        self.qk_norm, self.norm_last = options.qk_norm, options.qk_norm_after_rope
        self.q_proj = Linear(d_model, self.n_heads * d_head, bias=options.qkv_bias)
        self.k_proj = Linear(d_model, self.n_kv_heads * d_head, bias=options.qkv_bias)
        self.v_proj = Linear(d_model, self.n_kv_heads * d_head, bias=options.qkv_bias)
        self.out_proj = Linear(self.n_heads * d_head, d_model, bias=options.out_bias)
        if self.qk_norm != QKNorm.none:
            width = (self.n_heads, self.n_kv_heads) if self.qk_norm == QKNorm.full else (1, 1)
            self.q_norm, self.k_norm = (make_norm(options, n * d_head) for n in width)
        self.sinks = None
        if options.attention_sinks:
            self.sinks = nn.Parameter(self.q_proj.weight.new_zeros(self.n_heads))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix `x` [batch, seq, d_model] along seq. The projections say how many heads there are: perhaps a part."""
        q, k = self.q_proj(x), self.k_proj(x)
        if self.qk_norm == QKNorm.full:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (-1, self.d_head))
        k = k.unflatten(-1, (-1, self.d_head))
        v = self.v_proj(x).unflatten(-1, (-1, self.d_head))
        by_head = self.qk_norm == QKNorm.head
        if by_head and not self.norm_last:
            q, k = self.q_norm(q), self.k_norm(k)
        rotary = context.rotary.get(self.layer_type)
        fused = self.rotates_all and context.cache is None and not (by_head and self.norm_last)
        if rotary is not None and not fused:
            q, k = (rotate(t, rotary, self.interleaved) for t in (q, k))
            rotary = None
        if by_head and self.norm_last:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.cache is not None:
            stored = context.cache.append(self.layer, k, v)
            if context.cache.length:
                k, v = stored
        mixed = attention(
            q,
            k,
            v,
            mask=context.masks[self.window],
            scale=self.scale,
            rotary=rotary,
            softcap=self.softcap,
            sinks=self.sinks,
            kernel=context.kernel,
        )
        return self.out_proj(mixed.flatten(2))


class CrossAttention(nn.Module):
    """Queries from the stream, keys and values from an encoder's states."""

    def __init__(self, options: TransformerOptions, layer: int) -> None:
        super().__init__()
        d_model, d_head = options.d_model, resolve_d_head(options)
        self.n_heads, self.n_kv_heads, self.d_head = options.n_heads, options.n_kv_heads, d_head
        self.layer = layer
        self.scale = d_head**-0.5 if options.attention_scale is None else options.attention_scale
        self.q_proj = Linear(d_model, self.n_heads * d_head, bias=options.qkv_bias)
        self.k_proj = Linear(d_model, self.n_kv_heads * d_head, bias=options.qkv_bias)
        self.v_proj = Linear(d_model, self.n_kv_heads * d_head, bias=options.qkv_bias)
        self.out_proj = Linear(self.n_heads * d_head, d_model, bias=options.out_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Let `x` [batch, seq, d_model] read `context.encoder_states`."""
        q = self.q_proj(x).unflatten(-1, (-1, self.d_head))
        kept = context.cache.cross if isinstance(context.cache, CrossCache) else {}
        if self.layer not in kept:
            kept[self.layer] = self._read(context.encoder_states)
        k, v = kept[self.layer]
        mixed = attention(q, k, v, mask=context.cross_mask, scale=self.scale, kernel=context.kernel)
        return self.out_proj(mixed.flatten(2))

    def _read(self, states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Make keys and values of the encoder's states."""
        if states is None:
            raise ValueError("cross-attention needs encoder_states")
        k = self.k_proj(states).unflatten(-1, (-1, self.d_head))
        v = self.v_proj(states).unflatten(-1, (-1, self.d_head))
        dtype = product_dtype(v.dtype, v.device)  # once: a cache hands them out at every token
        return k.to(dtype), v.to(dtype)


class Block(nn.Module):
    """Attention, cross-attention where asked for, feed-forward; each is normalised and added to the stream."""

    def __init__(self, options: TransformerOptions, layer: int, *, cross: bool = False) -> None:
        """Build block number `layer` of a stack; `cross` adds attention to an encoder."""
        super().__init__()
        self.placement, self.dropout = options.norm_placement, options.dropout
        skipped = options.skip_first_norm and layer == 0
        self.attention_norm = nn.Identity() if skipped else make_norm(options)
        self.attention = Attention(options, layer)
        if cross:
            self.cross_attention_norm = make_norm(options)
            self.cross_attention = CrossAttention(options, layer)
        self.has_cross, self.has_experts = cross, has_experts(options, layer)
        self.feed_forward_norm = make_norm(options)
        self.feed_forward = make_feed_forward(options, layer)
        if self.placement == Placement.sandwich:
            self.attention_out_norm = make_norm(options)
            if cross:
                self.cross_attention_out_norm = make_norm(options)
            self.feed_forward_out_norm = make_norm(options)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Transform the residual stream `x` [batch, seq, d_model]."""
        x = self._add(x, "attention", context)
        if self.has_cross:
            x = self._add(x, "cross_attention", context)
        return self._add(x, "feed_forward", context)

    def _add(self, x: Tensor, name: str, context: Context) -> Tensor:
        """Run the part `name` on `x` and add what it returns, normalised where the placement says so."""
        norm, part = getattr(self, f"{name}_norm"), getattr(self, name)
        given = norm(x) if self.placement in (Placement.pre, Placement.sandwich) else x
        if name != "feed_forward":
            out = part(given, context)
        elif self.has_experts:
            out, losses = part(given, context.real)
            context.aux.append(losses)
        else:
            out = part(given)
        if self.placement == Placement.output:
            out = norm(out)
        elif self.placement == Placement.sandwich:
            out = getattr(self, f"{name}_out_norm")(out)
        x = x + self._drop(out)
        return norm(x) if self.placement == Placement.post else x

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

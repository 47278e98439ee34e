"""FlexAttention: one kernel that a compiler writes for a mask, a bias, a soft-cap and sinks.

On a CPU it runs uncompiled, which keeps all scores: a check of numbers, not a fast path, and without a backward.

Reference: Dong et al. 2024, arXiv 2412.05496.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor


def block_mask(
    shape: tuple[int, int, int],
    queries: Tensor | None,
    keys: Tensor | None,
    prefix: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    device: torch.device,
) -> Any:
    """Say who sees whom, block by block; None = all see all. Arguments as in `pieces.cut`."""
    if queries is None and keys is None and prefix is None and window is None and not causal:
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    batch, seq, kv_seq = shape
    packed = queries is not None or keys is not None
    if queries is None:
        queries = torch.ones(batch, seq, dtype=torch.int64, device=device)
    if keys is None:
        keys = torch.ones(batch, kv_seq, dtype=torch.int64, device=device)

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = q == q
        if causal:
            seen = q >= kv
        if prefix is not None:
            seen = seen | prefix[b, kv]
        if window is not None:
            seen = seen & ((q - kv).abs() < window)
        if packed:
            seen = seen & (queries[b, q] == keys[b, kv])
        return seen

    per_row = batch if packed or prefix is not None else None
    return create_block_mask(
        visible, per_row, None, seq, kv_seq, device=device, _compile=device.type == "cuda"
    )


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Any,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend; shapes as in `attention.attention`.

    Args:
        q: queries; keys and values follow.
        k: keys.
        v: values.
        mask: from `block_mask`.
        bias: [1 or batch, 1 or n_heads, seq, kv_seq], added behind the soft-cap.
        scale: factor on the dot products.
        softcap: see `attention.attention`.
        sinks: likewise.
    """

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if bias is not None:
            score = score + bias[b if len(bias) > 1 else 0, h if bias.shape[1] > 1 else 0, i, j]
        return score

    plain = softcap is None and bias is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = _kernel(q.device.type)(
        q,
        k,
        v,
        score_mod=None if plain else change,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=None if sinks is None else _normaliser(),
    )
    if sinks is None:
        return found.transpose(1, 2)
    # A sink adds exp(sink) to the normaliser and nothing to the sum of values.
    out, normaliser = found[0], found[1].lse
    share = torch.sigmoid(normaliser - sinks.to(normaliser.dtype)[None, :, None])
    return (out * share[..., None].to(out.dtype)).transpose(1, 2)


def _normaliser() -> Any:
    from torch.nn.attention.flex_attention import AuxRequest

    return AuxRequest(lse=True)


def _kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled() if device == "cuda" else _quiet(flex_attention)


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _quiet(function: Any) -> Any:
    """Call without the warning that the call is not compiled: it is meant."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return function(*args, **kwargs)

    return call

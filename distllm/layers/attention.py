"""Scaled dot-product attention with grouped key/value heads: the one door to every kernel.

Which kernels there are and which one a model gets is in `attention_kernels.py`. Masks come from `masks.py`, rotation from
`positions.py`.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.layers import pieces
from distllm.layers.attention_kernels import AUTO, KERNELS, reads
from distllm.layers.blocked_attention import blocked_attention
from distllm.layers.flex_attention import flex
from distllm.layers.masks import Mask, causal_bias
from distllm.layers.positions import Rotary, rotate
from distllm.layers.precision import wide
from distllm.layers.products import product_dtype

_LONGEST_BLOCKED = 1024
"""Beyond this many tokens the kept probabilities cost too much memory."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    rotary: Rotary | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = AUTO,
) -> Tensor:
    """Let every query gather values.

    Args:
        q: [batch, seq, n_heads, d_head].
        k: [batch, kv_seq, n_kv_heads, d_head]; n_heads is a multiple of n_kv_heads.
        v: as `k`.
        mask: who sees whom.
        scale: factor on the dot products.
        rotary: turn queries and keys first (cos, sin), each [1 or batch, seq, d_head], half style.
        softcap: squash the scores to (-softcap, softcap).
        sinks: [n_heads], one more logit per head in the softmax, whose probability goes nowhere.
        kernel: a name of `attention_kernels.KERNELS`, for which the mask was made; `auto` looks at every call anew.

    Returns:
        [batch, seq, n_heads, d_head].
    """
    narrow, dtype = q.dtype, product_dtype(q.dtype, q.device)
    if dtype != narrow:
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if mask.bias is not None:
            mask = replace(mask, bias=mask.bias.to(dtype))
        how = {"scale": scale, "softcap": softcap, "sinks": sinks, "kernel": kernel}
        with torch.autocast(q.device.type, enabled=False):
            return attention(q, k, v, mask=mask, rotary=rotary, **how).to(narrow)
    if kernel not in (AUTO, "blocked"):
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return _with(kernel, q, k, v, mask, scale, softcap, sinks)
    bias = mask.bias
    special = softcap is not None or sinks is not None
    learned = bias is not None and bias.requires_grad
    if mask.causal and not special and not learned and _blocks_pay(q):
        return blocked_attention(q, k, v, rotary, bias, scale)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    if special:
        if bias is None and mask.causal:
            bias = causal_bias(q.shape[1], q.dtype, q.device)
        return written_out(q, k, v, bias, scale, softcap, sinks)
    if q.shape[1] == 1:
        return _one_query(q, k, v, bias, scale)
    return _torchs(q, k, v, mask, scale)


def _with(
    kernel: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with one kernel, whatever the call."""
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotation and norms may have widened them
    form = reads(kernel, q.device)
    if form == "pieces":
        assert mask.pieces is not None
        options = {"scale": scale, "window": mask.window, "softcap": softcap}
        varlen = varlen_kernel(kernel)
        return pieces.run(varlen, q, k, v, mask.pieces, causal=mask.causal, **options)
    if form == "block_mask":
        seen = {"mask": mask.block_mask, "bias": mask.bias}
        return flex(q, k, v, scale=scale, softcap=softcap, sinks=sinks, **seen)
    bias = mask.bias
    if kernel == "eager":
        if bias is None and mask.causal:
            bias = causal_bias(q.shape[1], q.dtype, q.device)
        return written_out(q, k, v, bias, scale, softcap, sinks)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "sdpa_flash": SDPBackend.FLASH_ATTENTION,
        "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa_math": SDPBackend.MATH,
    }
    if kernel not in backends:
        return _torchs(q, k, v, mask, scale)
    with sdpa_kernel(backends[kernel]):
        return _torchs(q, k, v, mask, scale)


def _torchs(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.bias,
        is_causal=mask.causal and mask.bias is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


@functools.cache
def varlen_kernel(name: str) -> Callable[..., Tensor]:
    """Return a variable-length kernel, to be called as `pieces.run` does."""
    if name == "sdpa_flash":
        from torch.nn.attention.varlen import varlen_attn

        def torchs(q: Tensor, k: Tensor, v: Tensor, part: pieces.Pieces, **how: Any) -> Tensor:
            left = -1 if how["window"] is None else how["window"] - 1
            found = varlen_attn(
                q,
                k,
                v,
                part.cu_queries,
                part.cu_keys,
                part.max_queries,
                part.max_keys,
                scale=how["scale"],
                window_size=(left, 0 if how["causal"] else left),
                enable_gqa=q.shape[1] != k.shape[1],
            )
            assert isinstance(found, Tensor)
            return found

        return torchs
    function = importlib.import_module(KERNELS[name].package or "").flash_attn_varlen_func
    known = inspect.signature(function).parameters

    def flash(q: Tensor, k: Tensor, v: Tensor, part: pieces.Pieces, **how: Any) -> Tensor:
        left = _unlimited(name) if how["window"] is None else how["window"] - 1
        given = {
            "cu_seqlens_q": part.cu_queries,
            "cu_seqlens_k": part.cu_keys,
            "max_seqlen_q": part.max_queries,
            "max_seqlen_k": part.max_keys,
            "softmax_scale": how["scale"],
            "causal": how["causal"],
            "window_size": (left, _unlimited(name) if how["causal"] else left),
            "softcap": how["softcap"] or 0.0,
        }
        # Not every version knows the longest piece; some return the normalisers too.
        found = function(q, k, v, **{key: x for key, x in given.items() if key in known})
        return found[0] if isinstance(found, tuple) else found

    return flash


def _unlimited(name: str) -> int | None:
    return None if name == "flash4" else -1


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend by matrix products and a softmax in float32 or wider; the heads of a group share their keys, no copies."""
    batch, seq, n_heads, d_head = q.shape
    n_kv_heads = k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q = (q * scale).reshape(batch, n_kv_heads, -1, d_head)
    scores = torch.matmul(q, k.transpose(2, 3)).view(batch, n_heads, seq, -1)
    scores = scores.to(wide(scores.dtype))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, seq, 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    weights = weights.to(v.dtype).reshape(batch, n_kv_heads, -1, k.shape[2])
    return torch.matmul(weights, v).view(batch, n_heads, seq, d_head).transpose(1, 2)


def _blocks_pay(q: Tensor) -> bool:
    return q.device.type == "cpu" and 1 < q.shape[1] <= _LONGEST_BLOCKED


def _one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend from one new token per row. The heads of a group share their keys as rows of one product: no copies."""
    batch, _, n_heads, d_head = q.shape
    n_kv_heads = k.shape[2]
    q = q.reshape(batch, n_kv_heads, n_heads // n_kv_heads, d_head) * scale
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    scores = torch.matmul(q, k.transpose(2, 3))
    if mask is not None:
        if mask.shape[1] > 1:  # one bias per head: [batch, n_heads, 1, kv_seq]
            mask = mask.reshape(len(mask), n_kv_heads, -1, mask.shape[-1])
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, dim=-1), v).reshape(batch, 1, n_heads, d_head)

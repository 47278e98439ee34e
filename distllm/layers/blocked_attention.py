"""Causal attention written out in matrix products, for short sequences on a CPU.

There torch's own kernel spends three times as long in forward plus backward (8 x 256, 6 heads of 64, bfloat16). Two things
make this one fast: queries are taken in blocks that only meet the keys up to their own end, and the probabilities are
kept for the backward. Keeping them costs batch * n_heads * seq^2 numbers a layer, so long sequences go elsewhere
(`attention.py` decides).
"""

from typing import Any

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from distllm.layers.positions import Rotary, rotate

_softmax_backward = torch.ops.aten._softmax_backward_data.default


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, bias: Tensor | None, scale: float
) -> Tensor:
    """Causal attention of equally many queries and keys; arguments as in `attention.attention`."""
    if torch.compiler.is_compiling():
        return _traced(q, k, v, rotary, bias, scale)
    cos, sin = (None, None) if rotary is None else (t[:, None] for t in rotary)
    return _BlockedAttention.apply(q, k, v, cos, sin, bias, scale)


def _traced(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None, bias: Tensor | None, scale: float
) -> Tensor:
    """The same in plain operations: a compiler fuses them and derives the backward."""
    batch, seq, n_heads, d_head = q.shape
    groups = n_heads // k.shape[2]
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2).reshape(-1, seq, d_head) for x in (q * scale, k, v))
    size = _block_size(seq)
    columns = torch.arange(seq, device=q.device)
    blocks = []
    for start in range(0, seq, size):
        end = min(start + size, seq)
        scores = torch.bmm(q[:, start:end], k[:, :end].transpose(1, 2))
        if bias is None:
            scores = scores.masked_fill(columns[:end] > columns[start:end, None], float("-inf"))
        else:
            scores = scores.unflatten(0, (batch, n_heads)) + bias[:, :, start:end, :end]
            scores = scores.flatten(0, 1)
        blocks.append(torch.bmm(torch.softmax(scores, dim=-1), v[:, :end]))
    return torch.cat(blocks, dim=1).view(batch, n_heads, seq, d_head).transpose(1, 2)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu")  # the backward, too, multiplies in the dtype of the factors
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        batch, seq, n_heads, d_head = q.shape
        groups = n_heads // k.shape[2]
        queries = _heads_first(q, cos, sin, scale).view(-1, groups, seq, d_head)
        keys, values = _heads_first(k, cos, sin, 1.0), _heads_first(v, None, None, 1.0)
        out = torch.empty_like(q)
        size = _block_size(seq)
        corner = q.new_full((size, size), float("-inf")).triu_(1)
        kept = []
        for start in range(0, seq, size):
            end = min(start + size, seq)
            rows = end - start
            # The heads of a group stand below each other: one product with the keys they share.
            block = queries[:, :, start:end].reshape(-1, groups * rows, d_head)
            scores = torch.bmm(block, keys[:, :end].transpose(1, 2))
            if bias is None:
                scores.view(-1, groups, rows, end)[..., start:].add_(corner[:rows, :rows])
            else:
                scores.view(batch, n_heads, rows, end).add_(bias[:, :, start:end, :end])
            weights = torch.softmax(scores, dim=-1)
            kept += [block, weights]
            mixed = torch.bmm(weights, values[:, :end])
            out[:, start:end] = mixed.view(batch, n_heads, rows, d_head).transpose(1, 2)
        ctx.save_for_backward(keys, values, cos, sin, *kept)
        ctx.size, ctx.groups, ctx.scale = size, groups, scale
        return out

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, cos, sin, *kept = ctx.saved_tensors
        batch, seq, n_heads, d_head = grad_out.shape
        back = None if sin is None else -sin
        dq = torch.empty_like(grad_out)
        dk = dv = torch.empty(0)
        # From the last block to the first: the last one meets all keys, so it starts the sums.
        for start in reversed(range(0, seq, ctx.size)):
            end = min(start + ctx.size, seq)
            rows = slice(start, end)
            weights, block = kept.pop(), kept.pop()
            grad = grad_out[:, rows].transpose(1, 2).reshape(block.shape)
            grad_weights = torch.bmm(grad, values[:, :end].transpose(1, 2))
            grad_scores = _softmax_backward(grad_weights, weights, -1, weights.dtype)
            dq_block = torch.bmm(grad_scores, keys[:, :end]).view(batch, n_heads, -1, d_head)
            turn = (None, None) if back is None else (cos[:, :, rows], back[:, :, rows])
            dq[:, rows] = _heads_last(dq_block, *turn, ctx.scale)
            dk_block = torch.bmm(grad_scores.transpose(1, 2), block)
            dv_block = torch.bmm(weights.transpose(1, 2), grad)
            if end == seq:
                dk, dv = dk_block, dv_block
            else:
                dk[:, :end].add_(dk_block)
                dv[:, :end].add_(dv_block)
        shape = (batch, n_heads // ctx.groups, seq, d_head)
        dk = _heads_last(dk.view(shape), cos, back, 1.0)
        return dq, dk, dv.view(shape).transpose(1, 2), None, None, None, None


def _block_size(seq: int) -> int:
    """Four blocks, but none under 64 rows: small products are slow."""
    return max(64, -(-seq // 128) * 32)


def _heads_first(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float) -> Tensor:
    """[batch, seq, n_heads, d_head] -> rotated and scaled, [batch * n_heads, seq, d_head]."""
    return _rotated(x.transpose(1, 2), cos, sin, scale).flatten(0, 1)


def _heads_last(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float) -> Tensor:
    """[batch, n_heads, seq, d_head] -> rotated and scaled, [batch, seq, n_heads, d_head]."""
    return _rotated(x, cos, sin, scale).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float) -> Tensor:
    """Return a contiguous, rotated and scaled copy of `x` [batch, n_heads, seq, d_head]."""
    x = x.clone(memory_format=torch.contiguous_format)
    if cos is None or sin is None:
        return x if scale == 1.0 else x.mul_(scale)
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    low, high = x.chunk(2, dim=-1)
    swapped = torch.cat((high, low), dim=-1)
    return x.mul_(cos).addcmul_(swapped, sin)

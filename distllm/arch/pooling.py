"""From the hidden states of a sequence to one vector, and the small layers that stand before an output matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distllm.arch.block import make_norm
from distllm.arch.options import Pooler, Pooling, TransformerOptions
from distllm.layers.feed_forward import ACTIVATIONS
from distllm.layers.products import Linear


class Transform(nn.Module):
    """Dense layer, activation, norm: what BERT puts before its output matrix."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        self.dense = Linear(options.d_model, options.d_model, bias=options.transform_bias)
        self.norm = make_norm(options)
        self.activation = ACTIVATIONS[options.activation]

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., d_model] to [..., d_model]."""
        return self.norm(self.activation(self.dense(hidden)))


class Pooled(nn.Module):
    """One vector per sequence: the first, last or mean state, and what the options put behind it."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        self.pooling, self.dropout = options.pooling, options.dropout
        self.pooler = self.transform = None
        if options.pooler == Pooler.tanh:
            self.pooler = Linear(options.d_model, options.d_model)
        elif options.pooler == Pooler.transform:
            self.transform = Transform(options)

    def pool(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Map [batch, seq, d_model] to [batch, d_model]; `attention_mask` is True on real tokens."""
        return self.behind(_POOLINGS[self.pooling](hidden, attention_mask))

    def behind(self, pooled: Tensor) -> Tensor:
        """Run the layers behind the pooling: [..., d_model] to [..., d_model]."""
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pooled))
        elif self.transform is not None:
            pooled = self.transform(pooled)
        return F.dropout(pooled, self.dropout, self.training) if self.dropout else pooled


def first_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Pick the state of each row's first real token: [batch, d_model]."""
    if attention_mask is None:
        return hidden[:, 0]
    return _pick(hidden, attention_mask.long().argmax(dim=1))


def last_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Pick the state of each row's last real token: [batch, d_model]."""
    if attention_mask is None:
        return hidden[:, -1]
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    ends = torch.where(attention_mask.bool(), columns, 0).amax(dim=1)
    return _pick(hidden, ends)


def mean_real(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Average the states of each row's real tokens: [batch, d_model]."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    weights = attention_mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _pick(hidden: Tensor, columns: Tensor) -> Tensor:
    return hidden[torch.arange(len(columns), device=columns.device), columns]


_POOLINGS = {Pooling.first: first_real, Pooling.last: last_real, Pooling.mean: mean_real}

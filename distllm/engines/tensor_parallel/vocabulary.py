"""The loss over a vocabulary whose rows lie on several ranks: no rank ever holds all logits, or all of the matrix.

Each rank computes the logits of its rows; the normaliser needs one maximum and one sum over the ranks per chunk of tokens.
All ranks of the group hold the same hidden states and end with the same results.

Reference: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard

from distllm.engines.exchange import Exchange
from distllm.layers.precision import compute_dtype, wide
from distllm.layers.vocabulary import register_split
from distllm.types import IGNORE_INDEX

_CHUNK_BYTES = 16 * 2**20
"""Logits of one chunk on one rank, in the dtype heavy work runs in."""


def enable(exchange: Exchange) -> None:
    """Let the layers answer for matrices that are split over the ranks of `exchange`."""
    register_split(DTensor, VocabularyParallel(exchange))


class VocabularyParallel:
    """What the layers ask of a split output matrix (`layers/vocabulary.py`)."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def loss(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropy, and `z_loss` times the squares of the log normalisers; the squares alone too."""
        dtype = compute_dtype(weight)
        return _Loss.apply(hidden, _rows(weight), labels, z_loss, dtype, self.exchange)

    def logprobs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and the entropy, [tokens] each."""
        dtype = compute_dtype(weight)
        return _Logprobs.apply(hidden, _rows(weight), targets, temperature, dtype, self.exchange)

    def whole(self, weight: Tensor) -> Tensor:
        """Gather the matrix; what follows is the same on all ranks, so each keeps the gradient of its rows."""
        assert isinstance(weight, DTensor)
        return weight.full_tensor(grad_placements=[Replicate()])


def _rows(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local(grad_placements=[Shard(0)])


class _Chunk:
    """The logits of some tokens at this rank's rows, divided by `temperature`, and what all ranks know of them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        exchange: Exchange,
        temperature: float = 1.0,
    ) -> None:
        logits = hidden @ weight.t()
        self.scores = logits.to(wide(logits.dtype))
        if temperature != 1.0:
            self.scores = self.scores / temperature
        first = exchange.rank * weight.shape[0]
        self.is_here = (labels >= first) & (labels < first + weight.shape[0])
        self.places = torch.where(self.is_here, labels - first, 0)[:, None]

    def normalise(self, exchange: Exchange) -> None:
        """Compute `log_normaliser`, `target` (score of the label) and `mean_score` under the softmax, [tokens] each."""
        highest = exchange.max_(self.scores.amax(dim=-1))
        shares = (self.scores - highest[:, None]).exp()
        target = self.scores.gather(1, self.places)[:, 0].where(self.is_here, 0.0)
        total, self.target, weighted = exchange.sum_(
            torch.stack([shares.sum(dim=-1), target, (shares * self.scores).sum(dim=-1)])
        )
        self.log_normaliser = highest + total.log()
        self.mean_score = weighted / total

    def probabilities(self, log_normaliser: Tensor) -> Tensor:
        """Return this rank's part of the softmax, [tokens, rows]."""
        return (self.scores - log_normaliser[:, None]).exp()

    def subtract_at_labels(self, matrix: Tensor, value: Tensor) -> Tensor:
        """Subtract `value` [tokens] at the labels that lie here, in place."""
        value = value.where(self.is_here, 0.0)[:, None]
        return matrix.scatter_add_(1, self.places, -value.to(matrix.dtype))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        z_loss: float,
        dtype: torch.dtype,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        ctx.dtypes, ctx.exchange = (hidden.dtype, weight.dtype), exchange
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        loss = hidden.new_zeros((), dtype=wide(dtype))
        squares = torch.zeros_like(loss)
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide(dtype)) if needs_weight else None
        for rows in _chunks(len(hidden), weight):
            chunk = _Chunk(hidden[rows], weight, labels[rows], exchange)
            chunk.normalise(exchange)
            used = (labels[rows] != IGNORE_INDEX).to(chunk.scores.dtype)
            loss += ((chunk.log_normaliser - chunk.target) * used).sum()
            squares += (chunk.log_normaliser.square() * used).sum()
            slope = used * (1.0 + 2.0 * z_loss * chunk.log_normaliser)
            grad = chunk.probabilities(chunk.log_normaliser) * slope[:, None]
            grad = chunk.subtract_at_labels(grad, used).to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(squares)
        return loss + z_loss * squares, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        of_hidden, of_weight = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = ctx.exchange.sum_(grad_hidden * grad.to(grad_hidden.dtype)).to(of_hidden)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad.to(grad_weight.dtype)).to(of_weight)
        return grad_hidden, grad_weight, None, None, None, None


class _Logprobs(torch.autograd.Function):
    """The backward pass computes the logits a second time: each token meets a weight of its own there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        dtype: torch.dtype,
        exchange: Exchange,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes, ctx.temperature = (hidden.dtype, weight.dtype), temperature
        ctx.exchange = exchange
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        logprobs = hidden.new_empty(len(hidden), dtype=wide(dtype))
        entropy, log_normaliser = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), weight):
            chunk = _Chunk(hidden[rows], weight, targets[rows], exchange, temperature)
            chunk.normalise(exchange)
            logprobs[rows] = chunk.target - chunk.log_normaliser
            entropy[rows] = chunk.log_normaliser - chunk.mean_score
            log_normaliser[rows] = chunk.log_normaliser
        ctx.save_for_backward(hidden, weight, targets, entropy, log_normaliser)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, log_normaliser = ctx.saved_tensors
        exchange, temperature = ctx.exchange, ctx.temperature
        up = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs / temperature
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=entropy.dtype)
        for rows in _chunks(len(hidden), weight):
            chunk = _Chunk(hidden[rows], weight, targets[rows], exchange, temperature)
            p = chunk.probabilities(log_normaliser[rows])
            # With z = logits / temperature: d logprob_t / d z = onehot_t - p, d entropy / d z = -p (log p + entropy).
            slope = p * up[rows][:, None]
            if grad_entropy is not None:
                level = chunk.scores - (log_normaliser[rows] - entropy[rows])[:, None]
                slope += p * level * (grad_entropy[rows] / temperature)[:, None]
            grad = chunk.subtract_at_labels(slope, up[rows]).neg_().to(hidden.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.t() @ hidden[rows]
        of_hidden, of_weight = ctx.dtypes
        return exchange.sum_(grad_hidden).to(of_hidden), grad_weight.to(of_weight), *[None] * 4


def _chunks(num_tokens: int, weight: Tensor) -> list[slice]:
    step = max(1, _CHUNK_BYTES // (weight.shape[0] * weight.dtype.itemsize))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]

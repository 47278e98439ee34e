"""The vocabulary projection fused with what is read from it, so that the logits of a whole batch never exist at once.

Tokens are taken in chunks. The loss computes its gradient while the logits of a chunk are at hand: three matrix products
in all, as many as with full logits. Log-probabilities meet a different weight per token in the backward, so there the
logits are computed a second time.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from distllm.layers.precision import compute_dtype, wide
from distllm.types import IGNORE_INDEX

_CHUNK_BYTES = 16 * 2**20
"""Logits of one chunk."""
_SLICE_BYTES = 2 * 2**20
"""Part of a chunk that is widened to float32 at a time, so that it stays in the CPU's cache."""
_SAFE_PROBABILITY = 1e-30
"""Below it -log(p) of a float32 probability loses digits or is infinite."""


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of `labels` under softmax(hidden @ weight.T).

    Args:
        hidden: [tokens, d_model].
        weight: [vocab, d_model].
        labels: [tokens] int64; IGNORE_INDEX adds nothing.

    Returns:
        Scalar in float32 or wider; 0 with a graph attached when nothing is labelled.
    """
    dtype = compute_dtype(weight)
    return _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), labels)


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: [tokens, d_model].
        weight: [vocab, d_model].
        targets: [tokens] int64, all valid ids.
        temperature: above 0; applied to both results.

    Returns:
        (logprobs [tokens], entropy [tokens]) in float32 or wider.
    """
    dtype = compute_dtype(weight)
    return _LinearLogprobs.apply(hidden.to(dtype), weight.to(dtype), targets, temperature)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        precise = wide(hidden.dtype)
        total = hidden.new_zeros((), dtype=precise)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        for rows in _chunks(len(hidden), weight):
            logits = hidden[rows] @ weight.t()
            # `logits` turns into its own gradient, slice by slice.
            total += _loss_and_gradient(logits, labels[rows], precise)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if needs_weight:
                part = (logits.t() @ hidden[rows]).to(precise)
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight, dtype=precise)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.dtype)
        return grad_hidden, grad_weight, None


def _loss_and_gradient(logits: Tensor, labels: Tensor, precise: torch.dtype) -> Tensor:
    """Return the summed loss of a chunk and overwrite `logits` [tokens, vocab] with its gradient."""
    total = logits.new_zeros((), dtype=precise)
    step = max(1, _SLICE_BYTES // (logits.shape[1] * precise.itemsize))
    for start in range(0, len(logits), step):
        part, part_labels = logits[start : start + step], labels[start : start + step]
        used = part_labels != IGNORE_INDEX
        targets = part_labels.where(used, 0)[:, None]
        probabilities = torch.softmax(part, dim=-1, dtype=precise)
        picked = probabilities.gather(1, targets)
        losses = -picked.log()
        if bool((picked < _SAFE_PROBABILITY).any()):
            losses = -torch.log_softmax(part, dim=-1, dtype=precise).gather(1, targets)
        total += losses[:, 0].where(used, 0.0).sum()
        probabilities.scatter_add_(1, targets, torch.full_like(picked, -1.0))
        part.copy_(probabilities)
        if not bool(used.all()):
            part.mul_(used[:, None])
    return total


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        precise = wide(hidden.dtype)
        logprobs = hidden.new_empty(len(hidden), dtype=precise)
        entropy = torch.empty_like(logprobs)
        for rows in _chunks(len(hidden), weight):
            scores = torch.log_softmax((hidden[rows] @ weight.t()).to(precise) / temperature, -1)
            logprobs[rows] = scores.gather(1, targets[rows, None])[:, 0]
            entropy[rows] = -torch.linalg.vecdot(scores.exp(), scores)
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature = temperature
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_logprobs: Tensor, grad_entropy: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy = ctx.saved_tensors
        precise = entropy.dtype
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=precise)
        for rows in _chunks(len(hidden), weight):
            scores = torch.log_softmax(
                (hidden[rows] @ weight.t()).to(precise) / ctx.temperature, -1
            )
            # d logprob_t / d z = onehot_t - p;  d entropy / d z = -p (log p + entropy);  z = logits / temperature
            up, up_entropy = grad_logprobs[rows, None], grad_entropy[rows, None]
            grad = (scores + entropy[rows, None]).mul_(up_entropy).add_(up).mul_(scores.exp_())
            grad.neg_().scatter_add_(1, targets[rows, None], up)
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += grad.t() @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _chunks(num_tokens: int, weight: Tensor) -> list[slice]:
    step = max(1, _CHUNK_BYTES // (weight.shape[0] * weight.dtype.itemsize))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]

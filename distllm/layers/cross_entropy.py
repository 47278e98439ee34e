"""The vocabulary projection fused with what is read from it, so that the logits of a whole batch never exist at once.

Tokens are taken in chunks. The loss computes its gradient while the logits of a chunk are at hand: three matrix products
in all, as many as with full logits. Log-probabilities meet a different weight per token in the backward, so there the
logits are computed a second time.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distllm.layers.liger_loss import CHUNKED, LIGER, liger_cross_entropy_z
from distllm.layers.precision import compute_dtype, wide
from distllm.layers.products import product_dtype
from distllm.layers.vocabulary import split_of
from distllm.types import IGNORE_INDEX

_CHUNK_BYTES = 16 * 2**20
"""Logits of one chunk, in the dtype heavy work runs in."""
_SLICE_BYTES = 2**20
"""Part of a chunk that is widened to float32 at a time, so that it stays in a CPU core's own cache."""
_KEEP_BYTES = 64 * 2**20
"""Probabilities kept for the backward of `linear_logprobs`; with more tokens the logits are computed a second time."""
_SAFE_PROBABILITY = 1e-30
"""Below it -log(p) of a float32 probability loses digits or is infinite."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, kernel: str = CHUNKED
) -> Tensor:
    """Sum the cross-entropy of `labels` under softmax(hidden @ weight.T).

    Args:
        hidden: [tokens, d_model].
        weight: [vocab, d_model].
        labels: [tokens] int64; IGNORE_INDEX adds nothing.
        kernel: `chunked` or `liger`.

    Returns:
        Scalar in float32 or wider; 0 with a graph attached when nothing is labelled.
    """
    return linear_cross_entropy_z(hidden, weight, labels, 0.0, kernel)[0]


def linear_cross_entropy_z(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float, kernel: str = CHUNKED
) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy, and `z_loss` times the square of the logarithm of the softmax's normaliser.

    Args:
        hidden: [tokens, d_model].
        weight: [vocab, d_model].
        labels: [tokens] int64; IGNORE_INDEX adds nothing to either sum.
        z_loss: weight of the second sum.
        kernel: `chunked` or `liger`.

    Returns:
        (both sums together, the sum of squares alone and without gradient), scalars.

    Reference: Chowdhery et al. 2022, arXiv 2204.02311, section 5.
    """
    split = split_of(weight)
    if split is not None:
        return split.loss(hidden, weight, labels, z_loss)
    function = _LinearCrossEntropy.apply
    if kernel == LIGER and len(labels):
        function = liger_cross_entropy_z
    return _as_written(function, hidden, weight, labels, compute_dtype(weight), z_loss)


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
    split = split_of(weight)
    if split is not None:
        return split.logprobs(hidden, weight, targets, temperature)
    dtype = compute_dtype(weight)
    itemsize = product_dtype(dtype, weight.device).itemsize
    keep = len(targets) * weight.shape[0] * itemsize <= _KEEP_BYTES
    keep = keep and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _as_written(_LinearLogprobs.apply, hidden, weight, targets, temperature, dtype, keep)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        z_loss: float,
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight, precise = *_factors(hidden, weight, dtype), wide(dtype)
        total = hidden.new_zeros((), dtype=precise)
        squares = torch.zeros_like(total)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
        for rows in _chunks(len(hidden), weight, _CHUNK_BYTES):
            logits = _logits(hidden[rows], weight, dtype)
            for part in _chunks(len(logits), weight, _SLICE_BYTES, precise):
                loss, square = _loss_and_gradient(logits[part], labels[rows][part], precise, z_loss)
                total += loss
                squares += square
            # `logits` has turned into its own gradient.
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(squares)
        return total + z_loss * squares, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if x is None else (x * grad.to(x.dtype)).to(dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, precise: torch.dtype, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Return the sums of a slice and overwrite `logits` [tokens, vocab] with the gradient of loss + z_loss x squares."""
    used = labels != IGNORE_INDEX
    targets = labels.where(used, 0)[:, None]
    scores = logits.to(precise)
    probabilities, logprobs = _softmax(scores, targets)
    squares = logits.new_zeros((), dtype=precise)
    if z_loss:
        normaliser = scores.gather(1, targets) - logprobs
        squares = normaliser[:, 0].square().where(used, 0.0).sum()
        probabilities *= 1 + 2 * z_loss * normaliser
    probabilities.scatter_add_(1, targets, torch.full_like(logprobs, -1.0))
    if not _on_cpu(used) or not bool(used.all()):
        probabilities *= used[:, None]
    logits.copy_(probabilities)
    return -logprobs[:, 0].where(used, 0.0).sum(), squares


def _softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return (softmax [tokens, vocab], its logarithm at `targets` [tokens, 1])."""
    probabilities = torch.softmax(logits, dim=-1)
    picked = probabilities.gather(1, targets)
    if _on_cpu(picked) and bool((picked > _SAFE_PROBABILITY).all()):
        return probabilities, picked.log()
    return probabilities, torch.log_softmax(logits, dim=-1).gather(1, targets)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        dtype: torch.dtype,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight, precise = *_factors(hidden, weight, dtype), wide(dtype)
        logprobs = hidden.new_empty(len(hidden), dtype=precise)
        entropy = torch.empty_like(logprobs)
        kept = []
        for rows in _chunks(len(hidden), weight, _CHUNK_BYTES):
            logits = _logits(hidden[rows], weight, dtype)
            for part in _chunks(len(logits), weight, _SLICE_BYTES, precise):
                scores = logits[part].to(precise).div_(temperature)
                labels = targets[rows][part, None]
                probabilities, picked = _softmax(scores, labels)
                logprobs[rows][part] = picked[:, 0]
                normaliser = (scores.gather(1, labels) - picked)[:, 0]
                entropy[rows][part] = normaliser - torch.linalg.vecdot(probabilities, scores)
                if keep:
                    logits[part] = probabilities
            if keep:
                kept.append(logits)
        ctx.save_for_backward(hidden, weight, targets, entropy, *kept)
        ctx.temperature, ctx.dtype = temperature, dtype
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy, *kept = ctx.saved_tensors
        precise = entropy.dtype
        up = torch.zeros_like(entropy) if grad_logprobs is None else grad_logprobs
        up = (up / ctx.temperature)[:, None]
        up_entropy = None if grad_entropy is None else (grad_entropy / ctx.temperature)[:, None]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=precise)
        for index, rows in enumerate(_chunks(len(hidden), weight, _CHUNK_BYTES)):
            logits = None if kept else _logits(hidden[rows], weight, ctx.dtype)
            grad = kept[index].clone() if logits is None else logits
            for part in _chunks(len(grad), weight, _SLICE_BYTES, precise):
                p = grad[part].to(precise)
                if not kept:
                    p = torch.softmax(p.div_(ctx.temperature), dim=-1)
                # With z = logits / temperature:
                # d logprob_t / d z = onehot_t - p;  d entropy / d z = -p (log p + entropy).
                factor = up[rows][part]
                if up_entropy is not None:
                    level = entropy[rows][part, None]
                    factor = factor + up_entropy[rows][part] * (p.clamp(min=1e-38).log_() + level)
                slope = p.mul_(factor).neg_()
                slope.scatter_add_(1, targets[rows][part, None], up[rows][part])
                grad[part] = slope
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight += grad.t() @ hidden[rows]
        grads = (
            x.to(dtype) for x, dtype in zip((grad_hidden, grad_weight), ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None


def _factors(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round both to `dtype`, in the form in which they are multiplied."""
    form = product_dtype(dtype, weight.device)
    return hidden.to(dtype).to(form), weight.to(dtype).to(form)


def _logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return hidden @ weight.T, rounded to `dtype`: what the sampler's log-probabilities are taken from."""
    logits = hidden @ weight.t()
    return logits if logits.dtype == dtype else logits.copy_(logits.to(dtype))


def _as_written(function: Any, *args: Any) -> Any:
    """Call `function` out of a compiler's sight, which would break on the loops over chunks.

    The compiler is loaded only where something is compiled: it takes seconds, which every command would wait for.
    """
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    with torch.autocast(args[0].device.type, enabled=False):  # `dtype` says it all
        return function(*args)


def _on_cpu(x: Tensor) -> bool:
    """True where looking at a value costs nothing; on other devices it would wait for the queue."""
    return x.device.type == "cpu"


def _chunks(
    num_tokens: int, weight: Tensor, num_bytes: int, dtype: torch.dtype | None = None
) -> list[slice]:
    """Cut `num_tokens` rows of vocabulary width into slices of at most `num_bytes`."""
    step = max(1, num_bytes // (weight.shape[0] * (dtype or weight.dtype).itemsize))
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]

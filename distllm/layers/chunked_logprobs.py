"""Log-probabilities through any output layer (a bias, a soft-cap) without the logits of a whole batch at once.

Plain matrix products have a faster way: `cross_entropy.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distllm.layers.precision import wide

_CHUNK_TOKENS = 512
"""Tokens whose logits exist at the same time."""


def chunked_logprobs(
    project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy, under softmax(project(hidden) / temperature).

    The backward pass computes the logits of a chunk a second time.

    Args:
        project: [tokens, d_model] -> [tokens, vocab].
        hidden: [tokens, d_model].
        targets: [tokens] int64, all valid ids.
        temperature: above 0; applied to both results.

    Returns:
        (logprobs [tokens], entropy [tokens]) in float32 or wider.
    """

    def of_chunk(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        logits = project(rows)
        logprobs = torch.log_softmax(logits.to(wide(logits.dtype)) / temperature, dim=-1)
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        return logprobs.gather(1, wanted[:, None])[:, 0], entropy

    parts = [
        checkpoint(of_chunk, rows, wanted, use_reentrant=False)
        if torch.is_grad_enabled()
        else of_chunk(rows, wanted)
        for rows, wanted in zip(
            hidden.split(_CHUNK_TOKENS), targets.split(_CHUNK_TOKENS), strict=True
        )
    ]
    logprobs, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
    return logprobs, entropy


def chunked_normalisers(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Logarithm of the softmax's normaliser of each token, [tokens]; arguments as above."""

    def of_chunk(rows: Tensor) -> Tensor:
        logits = project(rows)
        return torch.logsumexp(logits.to(wide(logits.dtype)), dim=-1)

    parts = [
        checkpoint(of_chunk, rows, use_reentrant=False)
        if torch.is_grad_enabled()
        else of_chunk(rows)
        for rows in hidden.split(_CHUNK_TOKENS)
    ]
    return torch.cat(parts)

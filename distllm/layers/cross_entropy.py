"""The vocabulary projection fused with what is read from it, so that the logits of a whole batch never exist at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.layers.precision import wide
from distllm.types import IGNORE_INDEX


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of `labels` under softmax(hidden @ weight.T).

    Args:
        hidden: [tokens, d_model].
        weight: [vocab, d_model].
        labels: [tokens] int64; IGNORE_INDEX adds nothing.

    Returns:
        Scalar in float32 or wider.
    """
    logits = F.linear(hidden, weight)
    return F.cross_entropy(
        logits.to(wide(logits.dtype)), labels, ignore_index=IGNORE_INDEX, reduction="sum"
    )


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
    logits = F.linear(hidden, weight)
    logprobs = torch.log_softmax(logits.to(wide(logits.dtype)) / temperature, dim=-1)
    picked = logprobs.gather(-1, targets[:, None])[:, 0]
    return picked, -(logprobs.exp() * logprobs).sum(dim=-1)

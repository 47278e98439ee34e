"""What the policy's probability ratio is, how it is clipped, and how a sampler that drifts from the trainer is corrected.

Pure functions of flat vectors [tokens]. Which algorithm uses which is in `algorithms/`; the sum over a batch is in
`objective.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distllm.errors import ConfigError
from distllm.rl.advantages import MAX_LOG_RATIO
from distllm.rl.layout import Tokens

OFF_POLICY = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
"""Values of `stage.off_policy`."""


@dataclass(slots=True)
class Surrogate:
    """A loss per token, and where the clip took its gradient away."""

    loss: Tensor
    """[tokens], with gradient."""
    clipped_low: Tensor
    """[tokens] bool: the ratio fell below the range while the advantage was negative."""
    clipped_high: Tensor
    """[tokens] bool: the ratio rose above the range while the advantage was positive."""


def token_ratio(logprobs: Tensor, old: Tensor) -> Tensor:
    """rho_t = exp(l_t - l_old_t), [tokens]."""
    return (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def sequence_ratio(logprobs: Tensor, old: Tensor, tokens: Tokens, mean: bool) -> Tensor:
    """Give every token its response's ratio: the product of its token ratios, or their geometric mean, [tokens]."""
    total = tokens.sums(logprobs - old)
    if mean:
        total = total / tokens.counts().clamp(min=1).to(total.dtype)
    return total.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()[tokens.index]


def clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float = 0.0
) -> Surrogate:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)); with `dual`, at most dual |A| where A is negative.

    Reference: Schulman et al. 2017, arXiv 1707.06347, equation 7; Yu et al. 2025, arXiv 2503.14476, for the two ends;
    Ye et al. 2019, arXiv 1912.09729, for the dual clip.
    """
    plain = -advantages * ratio
    loss = torch.maximum(plain, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return Surrogate(
        loss, (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    )


def off_policy_weights(
    old: Tensor, rollout: Tensor, tokens: Tokens, kind: str, low: float, high: float
) -> Tensor:
    """Weigh tokens by w = exp(l_old - l_rollout): what the trainer thinks of them over what the sampler thought.

    Never negative, at most `high`, without gradient. It stands beside the ratio exp(l - l_old), never beside
    exp(l - l_rollout), which holds it already.

    Args:
        old: [tokens], under the policy before the update, as the trainer computes it.
        rollout: [tokens], as the sampler reported it.
        tokens: which response each belongs to.
        kind: one of `OFF_POLICY`; the sequence kinds use the product of w over the response.
        low: below it the masks give 0.
        high: above it the masks give 0 and the truncations `high`.

    Raises:
        ConfigError: `kind` is unknown.

    Reference: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", for truncation.
    """
    gap = (old - rollout).detach()
    if kind.startswith("sequence_"):
        gap = tokens.sums(gap)[tokens.index]
    weights = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    match kind.removeprefix("sequence_").removeprefix("token_"):
        case "none":
            return torch.ones_like(weights)
        case "truncate":
            return weights.clamp(max=high)
        case "mask":
            return weights.masked_fill((weights < low) | (weights > high), 0.0)
    raise ConfigError(f"stage.off_policy={kind} is unknown. Known: {', '.join(OFF_POLICY)}.")

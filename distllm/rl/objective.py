"""The clipped policy loss, and how ragged rollouts become a batch.

    loss = mean over tokens of max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)),  rho = exp(l - l_old)

Reference: Schulman et al. 2017, arXiv 1707.06347, equation 7; asymmetric clip: Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distllm.rl.advantages import MAX_LOG_RATIO, kl_estimate, kl_loss
from distllm.rl.options import RLOptions
from distllm.types import IGNORE_INDEX, Batch, LossOutput, Model, Rollout

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]
TOKEN_FIELDS = (
    "rollout_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "old_values",
    "advantages",
    "returns",
)


def collate_rollouts(rollouts: Sequence[Rollout], join: Join, pad_id: int) -> Batch:
    """Lay rollouts out as model inputs; per-token fields land where the labels are, zeros elsewhere."""
    batch = join([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], pad_id)
    assert batch.labels is not None
    mask = batch.labels != IGNORE_INDEX
    for name in TOKEN_FIELDS:
        parts = [getattr(r, name) for r in rollouts]
        if all(p is not None for p in parts):
            flat = torch.cat(parts)
            setattr(batch, name, flat.new_zeros(mask.shape).masked_scatter_(mask, flat))
    batch.rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
    batch.sample_ids = torch.tensor([r.prompt_index for r in rollouts])
    return batch


def per_response(rollouts: Sequence[Rollout], batch: Batch, values: Tensor) -> list[Tensor]:
    """Undo the layout: take `values` [batch, seq] at the labels, one tensor [response] per rollout."""
    assert batch.labels is not None
    flat = values[batch.labels != IGNORE_INDEX].detach().cpu()
    return list(flat.split([len(r.response_ids) for r in rollouts]))


class PolicyObjective:
    """Clipped surrogate, optionally with KL and entropy terms, each normalised by the same weight."""

    def __init__(
        self, options: RLOptions, join: Join, pad_id: int, temperature: float, kl_in_loss: bool
    ) -> None:
        self.options, self.join, self.pad_id = options, join, pad_id
        self.temperature = temperature
        self.kl_in_loss = kl_in_loss
        self.kl_coef = options.kl_coef

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Terms that are switched on; the KL coefficient may move while training."""
        terms = {"policy": 1.0}
        if self.kl_in_loss and self.options.kl_coef:
            terms["kl"] = self.kl_coef
        if self.options.entropy_coef:
            terms["entropy"] = -self.options.entropy_coef
        return terms

    def collate(self, examples: Sequence[Rollout]) -> Batch:
        """Lay out rollouts."""
        return collate_rollouts(examples, self.join, self.pad_id)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count response tokens, or responses."""
        weight = self._token_weights(batch).sum()
        return dict.fromkeys(self.coefficients, weight)

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the policy now with the policy that sampled."""
        out = model(**batch.inputs(), compute_logits=False)
        logprobs, entropy = model.head.logprobs(
            out.last_hidden_state, batch.labels, self.temperature
        )
        weight = self._token_weights(batch)
        mask = weight > 0
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        advantages = batch.advantages
        assert advantages is not None

        log_ratio = (logprobs - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.options.clip_low, 1 + self.options.clip_high)
        surrogate = torch.maximum(-advantages * ratio, -advantages * clipped)

        losses = {"policy": (surrogate * weight).sum()}
        if "entropy" in self.coefficients:
            losses["entropy"] = (entropy * weight).sum()
        if "kl" in self.coefficients:
            assert batch.ref_logprobs is not None
            kl = kl_loss(logprobs, batch.ref_logprobs, self.options.kl_kind)
            losses["kl"] = (kl * weight).sum()

        with torch.no_grad():
            count = mask.sum().double()
            is_clipped = (-advantages * clipped > -advantages * ratio) & mask
            metrics = {
                "rl/clip_fraction": (is_clipped.sum().double(), count),
                "rl/entropy": ((entropy * mask).sum().double(), count),
                "rl/approx_kl": ((kl_estimate(logprobs, old, "k3") * mask).sum().double(), count),
            }
            if batch.ref_logprobs is not None:
                kl = (kl_estimate(logprobs, batch.ref_logprobs, "k1") * mask).sum().double()
                metrics["rl/kl_ref"] = (kl, mask.any(dim=1).sum().double())
            if batch.rollout_logprobs is not None:
                gap = (old - batch.rollout_logprobs).abs() * mask
                metrics["rl/sampler_mismatch"] = (gap.sum().double(), count)
        return LossOutput(losses, metrics)

    def _token_weights(self, batch: Batch) -> Tensor:
        """[batch, seq] float64: 1 per response token, or 1 / length so that each response weighs 1."""
        assert batch.labels is not None
        mask = (batch.labels != IGNORE_INDEX).double()
        if batch.rewards is not None:
            mask = mask * torch.isfinite(batch.rewards)[:, None]
        if self.options.aggregation == "token":
            return mask
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)

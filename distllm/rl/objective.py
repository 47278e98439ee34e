"""The policy's loss: a surrogate per token, the KL and the entropy, each summed over the response tokens of a batch.

    loss = sum_t weight_t [ w_t surrogate_t + kl_coef KL_t - entropy_coef H_t ] / total

The weights and the total follow from `stage.aggregation` (`layout.py`), the surrogate from the algorithm
(`surrogate.py`), w_t from `stage.off_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from distllm.rl.advantages import kl_estimate, kl_loss
from distllm.rl.layout import Join, Tokens, collate_rollouts, hidden_states, response_tokens
from distllm.rl.options import RLOptions
from distllm.rl.surrogate import Surrogate, off_policy_weights, token_ratio
from distllm.types import Batch, LossOutput, Model, Rollout

SurrogateOf = Callable[[Tensor, Tensor, Tensor, Tokens], Surrogate]
"""(logprobs, old logprobs, advantages, tokens) -> surrogate."""


class PolicyObjective:
    """An algorithm's surrogate, optionally with KL and entropy terms, each normalised by the same weight."""

    def __init__(
        self,
        options: RLOptions,
        surrogate: SurrogateOf,
        *,
        join: Join,
        pad_id: int,
        temperature: float,
        max_response_tokens: int,
    ) -> None:
        self.options, self.surrogate = options, surrogate
        self.join, self.pad_id = join, pad_id
        self.temperature, self.max_response_tokens = temperature, max_response_tokens
        self.kl_coef = options.kl_coef

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Terms that are switched on; the KL coefficient may move while training."""
        terms = {"policy": 1.0}
        if self.options.kl_in == "loss" and self.options.kl_coef:
            terms["kl"] = self.kl_coef
        if self.options.entropy_coef:
            terms["entropy"] = -self.options.entropy_coef
        return terms

    def collate(self, examples: Sequence[Rollout]) -> Batch:
        """Lay out the rollouts that have a gradient.

        A response whose advantages are all 0, as in a group whose rewards are all equal, adds exactly nothing to the
        surrogate's gradient. Unless the KL or the entropy is a term of its own it is left out of the forward; it
        still counts in the total, so the step is the same but for rounding. The metrics of the update then describe
        the others alone; `rl/learned_share` says how many these are.
        """
        batch = collate_rollouts(examples, self.join, self.pad_id, self.options.pack)
        if len(self.coefficients) > 1:
            return batch
        # One stays in any case: a rank without a forward would leave the others waiting.
        pushing = [r for r in examples if r.advantages is None or r.advantages.any()]
        pushing = pushing or list(examples[:1])
        if len(pushing) == len(examples):
            return batch
        kept = collate_rollouts(pushing, self.join, self.pad_id, self.options.pack)
        kept.total = self._tokens(batch).total
        kept.sample_ids = batch.sample_ids
        return kept

    def pushes(self, examples: Sequence[Rollout]) -> bool:
        """Say whether an update on these can have a gradient at all."""
        return len(self.coefficients) > 1 or any(
            r.advantages is None or bool(r.advantages.any()) for r in examples
        )

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count response tokens, or responses."""
        return dict.fromkeys(self.coefficients, self._tokens(batch).total)

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the policy now with the policy that sampled."""
        tokens = self._tokens(batch)
        everywhere = model.head.logprobs(
            hidden_states(model, batch), batch.labels, self.temperature
        )
        logprobs, entropy = (x[tokens.at] for x in everywhere)
        on_policy = batch.old_logprobs is None
        old = logprobs.detach() if on_policy else tokens.take(batch.old_logprobs)
        surrogate = self.surrogate(logprobs, old, tokens.take(batch.advantages), tokens)
        ratio = token_ratio(logprobs.detach(), old)

        policy = surrogate.loss
        if self.options.off_policy != "none":
            policy = policy * self._off_policy_weights(old, batch, tokens)
        losses = {"policy": _weighted_sum(policy, tokens)}
        if "entropy" in self.coefficients:
            losses["entropy"] = _weighted_sum(entropy, tokens)
        if "kl" in self.coefficients:
            ref = tokens.take(batch.ref_logprobs)
            kl = kl_loss(logprobs, ref, self.options.kl_kind, ratio)
            losses["kl"] = _weighted_sum(kl, tokens)
        with torch.no_grad():
            metrics = self._metrics(logprobs, old, entropy, ratio, surrogate, batch, tokens)
        return LossOutput(losses, metrics)

    def _tokens(self, batch: Batch) -> Tokens:
        return response_tokens(batch, self.options.aggregation, self.max_response_tokens)

    def _off_policy_weights(self, old: Tensor, batch: Batch, tokens: Tokens) -> Tensor:
        options = self.options
        return off_policy_weights(
            old,
            tokens.take(batch.rollout_logprobs),
            tokens,
            options.off_policy,
            options.off_policy_low,
            options.off_policy_high,
        )

    def _metrics(
        self,
        logprobs: Tensor,
        old: Tensor,
        entropy: Tensor,
        ratio: Tensor,
        surrogate: Surrogate,
        batch: Batch,
        tokens: Tokens,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Describe the update, each as (sum, weight) over learned tokens or responses."""
        learned = tokens.learned
        count = learned.double().sum()

        def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
            return (x * learned).double().sum(), count

        num_rows = len(batch.input_ids) if batch.rewards is None else len(batch.rewards)
        num_given = num_rows if batch.sample_ids is None else len(batch.sample_ids)
        metrics = {
            "rl/learned_share": (count.new_tensor(num_rows), count.new_tensor(num_given)),
            "rl/clip_low": per_token(surrogate.clipped_low),
            "rl/clip_high": per_token(surrogate.clipped_high),
            "rl/clip_fraction": per_token(surrogate.clipped_low | surrogate.clipped_high),
            "rl/entropy": per_token(entropy),
            "rl/approx_kl": per_token(kl_estimate(logprobs, old, "k3")),
            "rl/ratio_mean": per_token(ratio),
            "rl/ratio_square": per_token(ratio.square()),
        }
        if batch.ref_logprobs is not None:
            ref = tokens.take(batch.ref_logprobs)
            total, _ = per_token(kl_estimate(logprobs, ref, "k1"))
            metrics["rl/kl_ref"] = (total, (tokens.counts() > 0).double().sum())
            for kind in ("k1", "k2", "k3"):
                metrics[f"rl/kl_{kind}"] = per_token(kl_estimate(logprobs, ref, kind))
        if batch.rollout_logprobs is not None:
            rollout = tokens.take(batch.rollout_logprobs)
            gap = (old - rollout).abs()
            metrics["rl/sampler_mismatch"] = per_token(gap)
            metrics["rl/sampler_mismatch_ratio"] = per_token(gap.clamp(max=20).exp())
            metrics["rl/sampler_kl"] = per_token(kl_estimate(rollout, old, "k3"))
            if self.options.off_policy != "none":
                weights = self._off_policy_weights(old, batch, tokens)
                metrics["rl/off_policy_weight"] = per_token(weights)
        return metrics


def effective_sample_size(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return (mean ratio)^2 / mean ratio^2: the share of the tokens that an update with these weights is worth, 0 to 1.

    Reference: Kong 1992, "A note on importance sampling using standardized weights".
    """
    square = metrics.get("rl/ratio_square", 0.0)
    if not square > 0:
        return {}
    share = min(1.0, metrics["rl/ratio_mean"] ** 2 / square)  # equal ratios round to above 1
    return {"rl/effective_sample_size": share}


def _weighted_sum(x: Tensor, tokens: Tokens) -> Tensor:
    # `where`, because 0 x inf of a response that is left out would be nan.
    return (torch.where(tokens.learned, x, 0.0) * tokens.weights).sum()

"""Settings that every RL algorithm shares. What one algorithm adds stands in its own file."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class RLOptions:
    """Sample responses, score them, learn from them."""

    name: str = ""
    reward: str = "auto"
    """What scores a response: `model` (a trained reward model), `exact_match` (the prompt's answer), or `auto`:
    `model` if `stage.reward_model` is set, else `exact_match`."""
    reward_model: str = ""
    """Directory of the reward model."""
    num_samples: int = 8
    """Responses per prompt."""
    rollout_batch_size: int = 0
    """Responses sampled before the updates begin; 0 takes `train.global_batch_size`, so one update per epoch."""
    num_epochs: int = 1
    """Passes over each batch of responses. More reuse each sample, with a staler policy behind it."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference (the policy that RL started from). Larger stays nearer."""
    kl_kind: str = "k1"
    """Estimator of that divergence: `k1`, `k2` or `k3`."""
    target_kl: float = 0.0
    """Steer `kl_coef` so that the KL per response is near this many nats; 0 keeps `kl_coef` fixed."""
    kl_horizon: int = 10000
    """Responses over which the controller of `target_kl` reacts; smaller reacts faster."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per token."""
    aggregation: str = "token"
    """`token`: mean over all tokens of the update. `sequence`: mean over responses of each response's token mean."""
    truncated: str = "keep"
    """Responses cut by `generation.max_new_tokens`: `keep` their reward, `penalise` it by `truncated_penalty`, or
    `mask` them out of the loss."""
    truncated_penalty: float = 1.0
    """Subtracted from the reward of a truncated response when `truncated=penalise`."""
    reward_clip: float = 0.0
    """Rewards are clipped to plus or minus this before anything else is made of them; 0 leaves them alone."""

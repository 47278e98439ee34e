"""Settings that every RL algorithm shares. What one algorithm adds stands in its own file."""

from dataclasses import dataclass

from distllm.rl.rewards.options import RewardingOptions


@dataclass(kw_only=True, slots=True)
class RLOptions(RewardingOptions):
    """Sample responses, score them, learn from them."""

    name: str = ""
    num_samples: int = 8
    """Responses per prompt."""
    environment: str = ""
    """Who answers the policy within its response: `calculator`, or the name of another file in `rl/environments/`; empty
    for nobody. What it says is read by the policy and not learned from."""
    max_turns: int = 4
    """With an environment: how often the policy may speak within one response."""
    rollout_batch_size: int = 0
    """Responses sampled before the updates begin; 0 takes `train.global_batch_size`, so one update per epoch."""
    num_epochs: int = 1
    """Passes over each batch of responses. More reuse each sample, with a staler policy behind it."""
    clip_low: float = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float = 0.0
    """Where the advantage is negative the loss is at most dual_clip x |advantage| (above 1, usually 3); 0 switches
    this off (arXiv 1912.09729)."""
    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference (the policy that RL started from). Larger stays nearer."""
    measure_kl: bool = False
    """Keep the reference even where `kl_coef` is 0, so that evaluations report the divergence from it; costs the memory
    of one more model, and no time in training."""
    kl_in: str = "loss"
    """Where the divergence enters: `loss` (a term of its own, with the gradient of the true divergence) or `reward`
    (subtracted from the rewards before anything is compared)."""
    kl_kind: str = "k1"
    """Estimator of that divergence: `k1`, `k2` or `k3`."""
    target_kl: float = 0.0
    """Steer `kl_coef` so that the KL per response is near this many nats; 0 keeps `kl_coef` fixed."""
    kl_horizon: int = 10000
    """Responses over which the controller of `target_kl` reacts; smaller reacts faster."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus per token."""
    aggregation: str = "token"
    """`token`: mean over all tokens of the update. `sequence`: mean over responses of each response's token mean.
    `constant`: sum over tokens, divided by responses x `generation.max_new_tokens`."""
    truncated: str = "keep"
    """Responses cut by `generation.max_new_tokens`: `keep` their reward, `penalise` it by `truncated_penalty`, or
    `mask` them out of the loss and of their siblings' baseline."""
    truncated_penalty: float = 1.0
    """Subtracted from the reward of a truncated response when `truncated=penalise`."""
    overlong_buffer: float = 0.0
    """Share of `generation.max_new_tokens`, at its end, over which the reward falls linearly by `overlong_penalty`;
    0 switches this off."""
    overlong_penalty: float = 1.0
    """Subtracted from the reward of a response as long as the budget when `overlong_buffer` is on."""
    reward_clip: float = 0.0
    """Scores are clipped to plus or minus this before anything else is made of them; 0 leaves them alone."""
    reward_scale: float = 1.0
    """Scores are multiplied by this after clipping."""
    whiten_rewards: bool = False
    """Scale the shaped rewards of each batch of rollouts to variance 1, keeping their mean."""
    off_policy: str = "none"
    """Correct for a sampler whose log-probabilities differ from the trainer's, by w = exp(l_old - l_rollout):
    `token_truncate` (w at most `off_policy_high`), `token_mask` (0 outside `off_policy_low` to `off_policy_high`),
    `sequence_truncate` and `sequence_mask` (the same with the product of w over the response), or `none`."""
    off_policy_low: float = 0.5
    """Smallest weight that the two masks let through."""
    off_policy_high: float = 2.0
    """Largest weight."""
    pack: bool = False
    """Lay several short responses, each with its prompt, into one row instead of padding each to the longest."""

"""Pure functions from rewards and values to advantages, and the estimators of the KL divergence.

Nothing here knows a model, a batch or a rank. Who calls these, and with which settings, is in
`rl/loop.py` and `rl/algorithms/`. Every function works in the dtype it is given, at least float32.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distllm.errors import ConfigError

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before `exp`: one outlier must not turn a whole step into inf."""


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    last_value: float = 0.0,
    mask: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate advantages of one response by generalised advantage estimation.

    With V_{T+1} = `last_value`:  delta_t = r_t + gamma V_{t+1} - V_t,
    A_t = delta_t + gamma lam A_{t+1},  R_t = A_t + V_t.

    The reward of the whole response belongs on its last generated token, `rewards[-1]`. Leave
    `last_value` at 0 when the response ended (or when a truncated one counts as ended); pass the
    value model's estimate of the state after the last token to bootstrap a truncated one.

    Args:
        rewards: `[response]`, one reward per generated token.
        values: `[response]`, the value before each token was generated.
        gamma: discount per token.
        lam: 0 trusts the value model (one-step error), 1 trusts the sampled return.
        last_value: value of the state after the last token.
        mask: False on tokens the policy did not sample (an environment's words). They are no time
            steps: V and A are carried across them, their rewards count for the token before, and
            their own advantage is 0 and return V. None means all were sampled.

    Returns:
        Advantages and returns, both `[response]`. Returns come from unwhitened advantages.

    Reference: Schulman et al., 2016, arXiv 1506.02438, equations 11 to 16.
    """
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and values {tuple(values.shape)} differ")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    # Plain floats: a loop over 64 tensor elements costs 20 times the arithmetic.
    reward_list, value_list = rewards.tolist(), values.tolist()
    advantages = [0.0] * len(reward_list)
    next_value, next_advantage, carried = last_value, 0.0, 0.0
    for t in reversed(range(len(reward_list))):
        carried += reward_list[t]
        if mask is not None and not mask[t]:
            continue
        delta = carried + gamma * next_value - value_list[t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value, carried = value_list[t], 0.0
        advantages[t] = next_advantage
    result = torch.tensor(advantages, dtype=dtype, device=rewards.device)
    return result, result + values.to(dtype)


def group_advantages(
    rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-4
) -> tuple[Tensor, float]:
    """Compare each response with the other responses to the same prompt.

    A_ij = r_ij - mean_j(r_i), divided by (std_j(r_i) + eps) when `scale_by_std`; the standard
    deviation is the unbiased one (divisor n - 1), as in TRL and verl. A reward that is not finite
    marks a response that could not be scored: it enters neither mean nor deviation and its own
    advantage is 0. A group whose scored rewards are all equal (or fewer than two) teaches nothing:
    its advantages are exactly 0, whatever rounding makes of its deviation.

    Args:
        rewards: `[prompts, samples]`.
        scale_by_std: divide by the spread (GRPO) or not (Dr. GRPO).
        eps: added to the deviation.

    Returns:
        Advantages `[prompts, samples]`, and the fraction of groups without spread.

    Raises:
        ConfigError: the groups hold one sample each, so that no response has a rival.

    Reference: Shao et al., 2024, arXiv 2402.03300, section 4.1.2; Liu et al., 2025,
    arXiv 2503.20783, for the form without division.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [prompts, samples], not {tuple(rewards.shape)}")
    num_prompts, num_samples = rewards.shape
    if num_samples < 2:
        raise ConfigError(
            f"num_samples={num_samples}: a group advantage compares the answers to one prompt, so "
            "it needs at least 2. Set num_samples=8."
        )
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    scored = torch.isfinite(rewards)
    count = scored.sum(dim=1, keepdim=True)
    known = rewards.masked_fill(~scored, 0.0)
    mean = known.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (known - mean).masked_fill(~scored, 0.0)
    highest = rewards.masked_fill(~scored, -torch.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~scored, torch.inf).amin(dim=1, keepdim=True)
    spread = highest > lowest  # exact, where a rounded deviation may come out at 1e-9
    if scale_by_std:
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    advantages = centred.masked_fill(~spread, 0.0)
    return advantages, float((~spread).sum()) / max(num_prompts, 1)


def leave_one_out(rewards: Tensor) -> tuple[Tensor, float]:
    """Compare each response with the mean of the *other* responses to the same prompt.

    A_ij = r_ij - mean_{k != j}(r_ik) = n / (n - 1) (r_ij - mean_k(r_ik)). What a response is compared
    with does not depend on itself, so the policy gradient stays unbiased. Rewards that are not
    finite are left out as in `group_advantages`.

    Args:
        rewards: `[prompts, samples]`.

    Returns:
        Advantages `[prompts, samples]`, and the fraction of groups without spread.

    Raises:
        ConfigError: the groups hold one sample each.

    Reference: Kool et al., 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et
    al., 2024, arXiv 2402.14740, equation 7.
    """
    centred, zero_spread = group_advantages(rewards, scale_by_std=False)
    count = torch.isfinite(rewards).sum(dim=1, keepdim=True)
    return centred * count / (count - 1).clamp(min=1), zero_spread


def returns_to_go(rewards: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1} of one response, `[response]` to `[response]`."""
    following, out = 0.0, [0.0] * len(rewards)
    for t, reward in reversed(list(enumerate(rewards.tolist()))):
        out[t] = following = reward + gamma * following
    return torch.tensor(out, dtype=torch.promote_types(rewards.dtype, torch.float32))


def whiten(
    x: Tensor,
    shift_mean: bool = True,
    *,
    eps: float = 1e-8,
    all_sum: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> Tensor:
    """Scale `x` to variance 1 and, with `shift_mean`, to mean 0.

    The variance is the biased one (divisor n, as in the first PPO implementations, and defined for
    a single element). Concatenate the tokens of the whole step before calling: statistics of parts
    are not statistics of the whole.

    Args:
        x: values of any shape; all of them count, so leave padding out.
        shift_mean: False keeps the mean (rewards whose sign carries meaning).
        eps: added to the variance.
        all_sum: `Engine.all_sum`, for a process that holds a part of the step; every data-parallel
            process must call. None when this process holds everything.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(torch.float64)
    totals = all_sum or (lambda parts: parts)
    count = torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)
    first = totals({"sum": wide.sum(), "count": count})
    count = first["count"].clamp(min=1)
    mean = first["sum"] / count
    # A second pass over centred values: E[x^2] - E[x]^2 loses all digits when the mean is large.
    second = totals({"squares": (wide - mean).square().sum()})
    scaled = (wide - mean) * torch.rsqrt(second["squares"] / count + eps)
    return (scaled if shift_mean else scaled + mean).to(dtype)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """Estimate KL(policy || reference) per token from one sample of the policy.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low
    variance), k3 = exp(-d) - 1 + d (unbiased, never negative). d is clamped to +-20.

    Use the value in a reward or a metric. As a loss only k2 has the right gradient: k1's vanishes
    in expectation and k3's belongs to the reverse divergence. `kl_loss` settles that.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape.
        ref_logprobs: the same under the reference.
        kind: `k1`, `k2` or `k3`.

    Raises:
        ConfigError: `kind` is none of the three.

    Reference: Schulman, "Approximating KL divergence", 2020.
    """
    difference = (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    match kind:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference
    raise ConfigError(f"kl_kind={kind} is unknown. Known: k1, k2, k3.")


def kl_loss(
    logprobs: Tensor, ref_logprobs: Tensor, kind: str, ratio: Tensor | None = None
) -> Tensor:
    """Return `kl_estimate` as a loss: the value of `kind`, the gradient of the true divergence.

    On policy the gradient of KL(policy || reference) at a state is E[d grad log policy], which is the
    gradient of k2 and of no other estimator. Of samples from an older policy the same expectation
    needs the importance weight `ratio`. The value shown stays that of `kind`. What a token does to
    the states after it is not part of a loss per token: only a KL in the reward accounts for it.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, any shape.
        ref_logprobs: the same under the reference.
        kind: `k1`, `k2` or `k3`.
        ratio: exp(l - l_old) per token, without gradient; None where the policy has not moved.

    Reference: arXiv 2506.09477, on the gradients of KL estimators.
    """
    value = kl_estimate(logprobs, ref_logprobs, kind).detach()
    carrier = kl_estimate(logprobs, ref_logprobs, "k2")
    if ratio is not None:
        carrier = carrier * ratio
    return value + (carrier - carrier.detach())

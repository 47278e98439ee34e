"""What must hold for a run of reinforcement learning: values by themselves, and against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distllm import registry
from distllm.config.rules import (
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Rule,
    by_key,
    multiples,
    one_of,
)
from distllm.errors import ConfigError
from distllm.generation.options import GenerationOptions
from distllm.rl.rewards.base import parse_reward
from distllm.rl.surrogate import OFF_POLICY

if TYPE_CHECKING:
    from distllm.config.schema import Config

_RULES: dict[Rule, str] = {
    AT_LEAST_1: "stage.num_samples stage.max_turns stage.num_epochs stage.kl_horizon stage.max_sampling_rounds",
    NOT_NEGATIVE: """
        stage.rollout_batch_size stage.clip_high stage.kl_coef stage.target_kl stage.entropy_coef
        stage.truncated_penalty stage.overlong_penalty stage.reward_clip stage.value_clip stage.value_lr
        stage.value_warmup_steps stage.advantage_eps stage.off_policy_low stage.reward_retries stage.reward_workers
        tracking.samples_per_step""",
    POSITIVE: "stage.reward_timeout_s stage.reward_scale stage.off_policy_high",
    SHARE: "stage.clip_low stage.gamma stage.gae_lambda stage.overlong_buffer",
    Rule(lambda v: v == 0 or v > 1, "must be above 1, or 0 to switch it off"): "stage.dual_clip",
    one_of("auto", "response", "joined", "pair", "dialogue"): "stage.reward_reads",
    one_of("k1", "k2", "k3"): "stage.kl_kind",
    one_of("loss", "reward"): "stage.kl_in",
    one_of(*OFF_POLICY): "stage.off_policy",
    one_of("token", "sequence", "constant"): "stage.aggregation",
    one_of("keep", "penalise", "mask"): "stage.truncated",
}  # fmt: skip

SAMPLES_FREELY = ("max_new_tokens", "temperature")
"""Settings of sampling that RL may change; every other one bends the distribution away from the one that is scored."""


def rl_rules() -> dict[str, Rule]:
    """Return dotted key -> what its value must fulfil."""
    return by_key(_RULES)


def rl_problems(config: Config) -> list[str]:
    """Check the settings of an RL stage against each other."""
    stage, problems = config.stage, []
    if stage.name not in registry.names("algorithm"):
        return problems
    batch, samples = config.train.global_batch_size, stage.num_samples
    if batch % samples:
        problems.append(
            f"train.global_batch_size={batch} (responses) is not a multiple of stage.num_samples={samples} "
            f"(responses per prompt). Set {multiples(batch, samples)}."
        )
    if stage.rollout_batch_size % batch:
        problems.append(
            f"stage.rollout_batch_size={stage.rollout_batch_size} is not a multiple of "
            f"train.global_batch_size={batch}. Set {multiples(stage.rollout_batch_size, batch)}, or 0."
        )
    if registry.get("algorithm", stage.name).compares_group and samples < 2:
        problems.append(
            f"stage.num_samples={samples}: {stage.name} compares the responses to one prompt with each other and needs "
            "at least 2. Set stage.num_samples=8."
        )
    if stage.target_kl and not stage.kl_coef:
        problems.append(
            f"stage.target_kl={stage.target_kl} steers stage.kl_coef, which is 0 and would stay 0. "
            "Set stage.kl_coef=0.05."
        )
    if stage.off_policy != "none" and stage.off_policy_low > stage.off_policy_high:
        problems.append(
            f"stage.off_policy_low={stage.off_policy_low} is above stage.off_policy_high={stage.off_policy_high}: no "
            "weight could pass. Set stage.off_policy_low=0.5 stage.off_policy_high=2."
        )
    if stage.environment and stage.environment not in registry.names("environment"):
        known = registry.names("environment")
        problems.append(registry.unknown_name("stage.environment", stage.environment, known))
    try:
        names = [name for name, _ in parse_reward(stage)]
    except ConfigError as error:
        return [*problems, str(error)]
    for name in ("model", "classifier"):
        if name in names and not stage.reward_model:
            problems.append(
                f"stage.reward={stage.reward} needs a reward model. Set stage.reward_model=DIR, such as the model/ of a "
                "stage=reward run."
            )
    problems += [
        f"stage.{key}={getattr(stage, key)!r} is for stage.reward={' or '.join(readers)}, and "
        f"stage.reward={stage.reward} does not read it. Leave it out, or set stage.reward={readers[0]}."
        for key, readers in _READ_BY.items()
        if getattr(stage, key) and not set(readers) & set(names)
    ]
    return problems + _sampling_problems(config)


_READ_BY = {
    "reward_model": ("model", "classifier"),
    "reward_weights": ("model",),
    "reward_label": ("classifier",),
    "reward_pattern": ("regex", "format"),
    "reward_url": ("http",),
}
"""Setting that is empty by default -> the rewards that read it."""


def _sampling_problems(config: Config) -> list[str]:
    """Check that what is sampled from is what is scored."""
    generation, free, problems = config.generation, GenerationOptions(), []
    names = [n for n in GenerationOptions.__slots__ if n not in SAMPLES_FREELY]  # type: ignore[attr-defined]
    if any(getattr(generation, n) != getattr(free, n) for n in names):
        given = " ".join(f"generation.{n}={getattr(generation, n)}" for n in names)
        wanted = " ".join(f"generation.{n}={_plain(getattr(free, n))}" for n in names)
        problems.append(
            f"{given}: RL learns from the distribution it samples from, so all of them must be off. Set {wanted}."
        )
    if generation.temperature == 0:
        problems.append(
            "generation.temperature=0 samples the same response each time, so there is nothing to learn from. "
            "Set generation.temperature=1."
        )
    if config.model is None and generation.max_new_tokens >= config.arch.max_seq_len:
        problems.append(
            f"generation.max_new_tokens={generation.max_new_tokens} leaves no room for a prompt in "
            f"arch.max_seq_len={config.arch.max_seq_len}. Set at most {config.arch.max_seq_len // 2}."
        )
    return problems


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

"""The RL stages: a policy and, as the algorithm asks, a reference, a value model and a reward model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from distllm import registry
from distllm.config.abilities import abilities_of
from distllm.engines.base import Engine
from distllm.engines.collectives import together
from distllm.generation.backend import sample_alone
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import (
    answer_greedily,
    answer_with,
    heldout_prompts,
    prompt_dataset,
    sample_records,
)
from distllm.pipeline.reference import build_reference
from distllm.pipeline.verdicts import known_labels
from distllm.rl.conversation import Conversation, check_can_converse
from distllm.rl.labels import label_join
from distllm.rl.loop import Learning, RolloutSource, Sampling
from distllm.rl.rewards.base import RewardContext, build_reward
from distllm.rl.scoring import score_logprobs
from distllm.tracking.base import Tracker
from distllm.train.evaluate import exact_match_metrics
from distllm.types import Prompt, Rollout

_log = logging.getLogger("distllm")


def build(builder: Builder) -> Parts:
    """Build an RL stage."""
    config = builder.config
    stage = config.stage
    if config.arch.dropout:
        _log.info(
            "arch.dropout=%s is off in RL: it would tell policy and reference apart.",
            config.arch.dropout,
        )
    head, changes = "lm", {}
    if not abilities_of(config).generates:
        builder.labels = known_labels(builder, (r.label for r in builder.data.labelled("train")))
        head, changes = "classify", {"num_labels": len(builder.labels)}
    model = builder.model(head, dropout=False, **changes)
    model.label_names = builder.labels
    join = label_join(model) if builder.labels else model.join
    policy = builder.engine("policy", model, trained=True)
    algorithm = registry.get("algorithm", stage.name)(
        stage,
        join=join,
        pad_id=builder.pad_id,
        temperature=config.generation.temperature,
        batch_size=config.train.micro_batch_size,
        max_response_tokens=config.generation.max_new_tokens,
        on_policy=stage.num_epochs == 1
        and stage.rollout_batch_size in (0, config.train.global_batch_size),
    )
    engines: dict[str, Engine] = {"policy": policy}
    if algorithm.needs_reference:
        engines["reference"] = build_reference(
            builder, policy, lambda: builder.model(head, dropout=False, **changes)
        )
    lr = {"policy": builder.peak_lr}
    trained = ["policy"]
    if algorithm.trains_value:
        lr["value"] = stage.value_lr or builder.peak_lr
        value = builder.model("value", dropout=False)
        engines["value"] = builder.engine("value", value, trained=True, lr=lr["value"])
        trained.append("value")

    def freeze(model: Any) -> Engine:
        role = "reward" if "reward" not in engines else "second reward"
        engines[role] = builder.engine(role, model, trained=False)
        return engines[role]

    (builder.run_dir / "logs").mkdir(exist_ok=True)
    reward = build_reward(
        RewardContext(
            options=stage,
            function="",
            log=builder.run_dir / "logs" / "rewards.log",
            tokenizer=builder.tokenizer,
            join=join,
            pad_id=builder.pad_id,
            batch_size=config.train.micro_batch_size,
            load=builder.load,
            freeze=freeze,
        )
    )
    parents = {"reward": stage.reward_model} if "reward" in engines else {}

    limit = model.options.max_seq_len - (0 if builder.labels else config.generation.max_new_tokens)
    if getattr(stage, "bootstrap_truncated", False):
        limit -= 1  # the value after the last token needs a place of its own
    prompts = prompt_dataset(builder, "train", limit)
    together(lambda: reward.check([prompts[i].prompt for i in range(len(prompts))]))
    sampling = Sampling(
        options=config.generation,
        end_ids=builder.end_ids,
        pad_id=builder.pad_id,
        decode=builder.decode,
        sample=conversing(builder, policy) if stage.environment else sample_alone,
    )
    source = RolloutSource(
        prompts,
        engines,
        algorithm,
        reward,
        sampling,
        Learning(lr=lr, schedule=builder.schedule(), options=config.train),
        config.run.seed,
    )
    heldout = heldout_prompts(builder)
    together(lambda: reward.check([p.prompt for p in heldout]))

    def evaluate() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        greedy = answer_greedily(builder, policy, heldout, sampling.sample)
        metrics: dict[str, Any] = dict(exact_match_metrics(greedy))
        sampled = answer_with(builder, policy, heldout, config.generation, sampling.sample)
        records = [p.prompt for p in sampled.prompts]
        rewards = reward.score(records, sampled.rollouts, sampled.texts)
        known = [r for r in rewards if math.isfinite(r)]
        if known:
            metrics["eval/reward"] = sum(known) / len(known)
        metrics["eval/rewards"] = rewards
        means: dict[str, float] = getattr(reward, "means", {})
        metrics |= {f"eval/reward/{name}": mean for name, mean in means.items()}
        metrics["eval/response_length"] = sum(len(r.response_ids) for r in sampled.rollouts) / len(
            rewards
        )
        if "reference" in engines:
            args = (sampled.rollouts, join, builder.pad_id, config.generation.temperature)
            now = score_logprobs(policy, *args, config.train.micro_batch_size)
            ref = score_logprobs(engines["reference"], *args, config.train.micro_batch_size)
            kl = [(a - b).sum().item() for a, b in zip(now, ref, strict=True)]
            metrics["eval/kl_ref"] = sum(kl) / len(kl)
        return metrics, sample_records(greedy)

    def connect(tracker: Tracker, stop_requested: Callable[[], bool]) -> None:
        source.stop_requested = stop_requested
        source.on_rollouts = lambda step, prompts, rollouts, texts: keep_samples(
            tracker, stage.name, config.tracking.samples_per_step, step, prompts, rollouts, texts
        )

    return Parts(
        connect=connect,
        close=reward.close,
        tokenizer=builder.tokenizer,
        data=builder.data,
        engines=engines,
        trained=trained,
        source=source,
        evaluate=evaluate,
        facts={"reward": "model" if "reward" in engines else stage.reward},
        parents=parents | ({"policy": config.model} if config.model else {}),
    )


def conversing(builder: Builder, policy: Engine) -> Conversation:
    """Return the sampler in which `stage.environment` answers the policy."""
    stage, model = builder.config.stage, policy.model
    check_can_converse(model, builder.pad_id)  # type: ignore[arg-type]
    return Conversation(
        environment=registry.get("environment", stage.environment)(),
        max_turns=stage.max_turns,
        encode=builder.encode,
        decode=builder.decode,
    )


def keep_samples(
    tracker: Tracker,
    stage: str,
    count: int,
    step: int,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    texts: Sequence[str],
) -> None:
    """Write `count` of the sampled responses, spread over the batch, with what the reward function said."""
    kept = range(0, len(rollouts), max(1, len(rollouts) // count)) if count else range(0)
    for i in kept[:count]:
        tracker.sample(
            {
                "step": step + 1,  # as in metrics.jsonl: the step that learns from it
                "stage": stage,
                "when": "train",
                "prompt": prompts[i].messages[-1]["content"],
                "response": texts[i],
                "answer": prompts[i].answer,
                "task": prompts[i].task,
                "reward": rollouts[i].score,
                "tokens": len(rollouts[i].response_ids),
                "finish_reason": rollouts[i].finish_reason,
            }
        )

"""The RL stages: a policy and, as the algorithm asks, a reference, a value model and a reward model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from distllm import registry
from distllm.data.datasets import PromptDataset
from distllm.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from distllm.engines.base import Engine
from distllm.errors import ConfigError
from distllm.pipeline.build import Builder, Parts
from distllm.pipeline.measure import (
    answer_greedily,
    answer_with,
    heldout_prompts,
    sample_records,
)
from distllm.pipeline.supervised import REWARD_HEADS
from distllm.rl.loop import Learning, RolloutSource, Sampling
from distllm.rl.scoring import score_logprobs
from distllm.tracking.base import Tracker
from distllm.train.evaluate import exact_match_metrics
from distllm.types import Prompt, Rollout

NUM_SAMPLES_KEPT = 4
"""Responses of each batch that are written to samples.jsonl."""

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
    policy = builder.engine("policy", builder.model("lm", dropout=False), trained=True)
    join = policy.model.join  # type: ignore[union-attr]
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
        engines["reference"] = builder.engine(
            "reference", builder.model("lm", dropout=False), trained=False
        )
    lr = {"policy": config.optim.lr}
    trained = ["policy"]
    if algorithm.trains_value:
        lr["value"] = stage.value_lr or config.optim.lr
        value = builder.model("value", dropout=False)
        engines["value"] = builder.engine("value", value, trained=True, lr=lr["value"])
        trained.append("value")
    reward, parents = _reward(builder, join, engines)

    limit = policy.model.options.max_seq_len - config.generation.max_new_tokens  # type: ignore[union-attr]
    if getattr(stage, "bootstrap_truncated", False):
        limit -= 1  # the value after the last token needs a place of its own
    prompts = PromptDataset(builder.data.prompts("train"), builder.tokenizer, limit, config.data)
    sampling = Sampling(
        options=config.generation,
        end_ids=builder.end_ids,
        pad_id=builder.pad_id,
        decode=builder.decode,
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

    def evaluate() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        greedy = answer_greedily(builder, policy, heldout)
        metrics: dict[str, Any] = dict(exact_match_metrics(greedy))
        sampled = answer_with(builder, policy, heldout, config.generation)
        records = [p.prompt for p in sampled.prompts]
        rewards = reward.score(records, sampled.rollouts, sampled.texts)
        metrics["eval/reward"] = sum(rewards) / len(rewards)
        metrics["eval/rewards"] = rewards
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
            tracker, stage.name, step, prompts, rollouts, texts
        )

    return Parts(
        connect=connect,
        tokenizer=builder.tokenizer,
        data=builder.data,
        engines=engines,
        trained=trained,
        source=source,
        evaluate=evaluate,
        facts={"reward": "model" if "reward" in engines else stage.reward},
        parents=parents | ({"policy": config.model} if config.model else {}),
    )


def keep_samples(
    tracker: Tracker,
    stage: str,
    step: int,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    texts: Sequence[str],
) -> None:
    """Write a few of the sampled responses, spread over the batch, with what the reward function said."""
    stride = max(1, len(rollouts) // NUM_SAMPLES_KEPT)
    for i in range(0, len(rollouts), stride)[:NUM_SAMPLES_KEPT]:
        tracker.sample(
            {
                "step": step,
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


def _reward(builder: Builder, join: Any, engines: dict[str, Engine]) -> tuple[Any, dict[str, str]]:
    """Build what scores responses; a reward model gets an engine of its own."""
    stage = builder.config.stage
    name = stage.reward
    if name == "auto":
        name = "model" if stage.reward_model else "exact_match"
    cls = registry.get("reward", name)
    if name != "model":
        return cls(), {}
    if not stage.reward_model:
        raise ConfigError(
            "stage.reward=model needs stage.reward_model=DIR, the directory of a reward model."
        )
    model, tokenizer = builder.load(stage.reward_model), load_tokenizer(stage.reward_model)
    if model.head_name not in REWARD_HEADS:
        raise ConfigError(
            f"stage.reward_model={stage.reward_model} has the head {model.head_name}; a reward model has last "
            "or likelihood. Train one with stage=reward."
        )
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(builder.tokenizer):
        raise ConfigError(
            f"stage.reward_model={stage.reward_model} was trained with another tokenizer ({len(tokenizer)} ids) "
            f"than the policy ({len(builder.tokenizer)} ids). Train it from the policy's own parent."
        )
    engines["reward"] = builder.engine("reward", model, trained=False)
    reward = cls(
        engines["reward"],
        join=join,
        pad_id=builder.pad_id,
        batch_size=builder.config.train.micro_batch_size,
    )
    return reward, {"reward": stage.reward_model}

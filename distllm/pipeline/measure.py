"""What is measured on held-out data, by kind of record. Stages and `distllm evaluate` share it.

Each function prepares the data once and returns a callable that measures an engine's model as it is at that moment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from distllm import registry
from distllm.config.abilities import abilities_of, packs_dialogues
from distllm.data.datasets import (
    ChatDataset,
    PairDataset,
    PairExample,
    PromptDataset,
)
from distllm.data.labelled import ChoiceDataset, JudgedDataset
from distllm.engines.base import Engine
from distllm.generation.backend import Sampler, sample_alone
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.objectives.reward import Reward
from distllm.objectives.sft import SFTOptions
from distllm.pipeline.build import Builder
from distllm.train.evaluate import (
    Answers,
    answer,
    evaluate_loss,
    exact_match_metrics,
    pair_scores,
    preference_metrics,
)
from distllm.types import Pair

Measure = Callable[[], tuple[dict[str, Any], list[dict[str, Any]]]]
"""Returns metrics `eval/...`, and records for samples.jsonl."""

NUM_SAMPLES_SHOWN = 8
"""Sample texts kept per evaluation."""
CONTINUATION_TOKENS = 32


def sft_objective(builder: Builder, model: Any) -> Any:
    """Build what imitates dialogues: one sequence for most architectures, source and target for some."""
    config = builder.config
    name = abilities_of(config).sft
    options = config.stage if config.stage.name == "sft" else SFTOptions()
    options = replace(options, pack=packs_dialogues(config))
    cls = registry.get("objective", name)
    if name == "sft":
        return cls(options, builder.pad_id, config.train.seq_len)
    return cls(options, builder.pad_id, model.join, config.train.seq_len)


def pair_dataset(builder: Builder, records: Any) -> Any:
    """Encode preference pairs: by the chat template, or as two texts for models that do not write."""
    config = builder.config
    cls = PairDataset if abilities_of(config).generates else JudgedDataset
    return cls(records, builder.tokenizer, config.train.seq_len, config.data)


def measure_dialogues(builder: Builder, engine: Engine) -> Measure:
    """Nats per assistant token and, where answers can be checked, exact match under greedy decoding."""
    train = builder.config.train
    heldout = ChatDataset(
        builder.data.dialogues("heldout"), builder.tokenizer, train.seq_len, builder.config.data
    )
    objective = sft_objective(builder, engine.model)
    shown = [heldout[i] for i in range(min(len(heldout), train.num_eval_samples))]
    prompts = heldout_prompts(builder) if builder.data.checkable else []

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, shown, train.micro_batch_size)
        if not prompts:
            return metrics, []
        answers = answer_greedily(builder, engine, prompts)
        return metrics | exact_match_metrics(answers), sample_records(answers)

    return measure


def heldout_pairs(builder: Builder) -> tuple[list[Pair], list[PairExample]]:
    """Return the held-out pairs that an evaluation judges, as records and encoded."""
    train = builder.config.train
    records = builder.data.pairs("heldout")[: train.num_eval_samples]
    pairs = pair_dataset(builder, records)
    return pairs.records, [pairs[i] for i in range(len(pairs))]


def measure_pairs(builder: Builder, engine: Engine, objective: Reward) -> Measure:
    """Pairwise accuracy with its interval, by kind of pair, and calibration."""
    records, pairs = heldout_pairs(builder)
    size = builder.config.train.micro_batch_size

    def measure() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, pairs, size)
        chosen, rejected = pair_scores(engine, objective, pairs, size)
        shown = [
            {
                "prompt": r.prompt[-1]["content"],
                "chosen": r.chosen,
                "rejected": r.rejected,
                "chosen_score": chosen[i].item(),
                "rejected_score": rejected[i].item(),
                "kind": r.kind,
            }
            for i, r in enumerate(records[:NUM_SAMPLES_SHOWN])
        ]
        scale = engine.model.head.reward_std.item()  # type: ignore[union-attr]
        return metrics | preference_metrics(chosen - rejected, pairs, scale), shown

    return measure


def heldout_prompts(builder: Builder) -> list[Any]:
    """Encode the held-out prompts that an evaluation answers."""
    train = builder.config.train
    dataset = prompt_dataset(builder, "heldout", train.seq_len, train.num_eval_samples)
    return [dataset[i] for i in range(len(dataset))]


def prompt_dataset(
    builder: Builder, split: str, max_len: int, limit: int | None = None
) -> PromptDataset | ChoiceDataset:
    """Encode at most `limit` prompts, or texts where the policy answers with labels."""
    config, tokenizer = builder.config, builder.tokenizer
    if builder.labels:
        texts = builder.data.labelled(split)[:limit]
        return ChoiceDataset(texts, tokenizer, max_len, config.data, names=builder.labels)
    return PromptDataset(builder.data.prompts(split)[:limit], tokenizer, max_len, config.data)


def answer_greedily(
    builder: Builder, engine: Engine, prompts: list[Any], sampler: Sampler = sample_alone
) -> Answers:
    """Answer each prompt with the likeliest tokens."""
    options = replace(builder.config.generation, temperature=0.0, top_k=0, top_p=1.0)
    return answer_with(builder, engine, prompts, options, sampler)


def answer_with(
    builder: Builder,
    engine: Engine,
    prompts: list[Any],
    options: GenerationOptions,
    sampler: Sampler = sample_alone,
    batch_size: int = 128,
) -> Answers:
    """Answer each prompt once under `options`, so many at a time."""
    return answer(
        engine,
        prompts,
        options,
        end_ids=builder.end_ids,
        pad_id=builder.pad_id,
        decode=builder.decode,
        seed=builder.config.run.seed,
        answer_after=builder.config.data.answer_after,
        sampler=sampler,
        batch_size=batch_size,
    )


def sample_records(answers: Answers) -> list[dict[str, Any]]:
    """Turn the first answers into records for samples.jsonl."""
    return [
        {
            "prompt": p.prompt.messages[-1]["content"],
            "response": text,
            "answer": p.prompt.answer,
            "task": p.prompt.task,
        }
        for p, text in list(zip(answers.prompts, answers.texts, strict=True))[:NUM_SAMPLES_SHOWN]
    ]


def continuations(
    builder: Builder, engine: Engine, openings: list[list[int]]
) -> list[dict[str, Any]]:
    """Continue the openings of held-out documents, as records for samples.jsonl."""
    room = engine.model.options.max_seq_len - CONTINUATION_TOKENS  # type: ignore[union-attr]
    openings = [ids[:room] for ids in openings if ids[:room]]
    if not openings:
        return []
    with engine.sampling() as model:
        rollouts = generate(
            model,  # type: ignore[arg-type]
            openings,
            GenerationOptions(max_new_tokens=CONTINUATION_TOKENS, temperature=0.7),
            end_ids=[builder.tokenizer.eos_token_id],
            pad_id=builder.pad_id,
            seed=builder.config.run.seed,
        )
    text = partial(builder.tokenizer.decode, skip_special_tokens=True)
    return [
        {"prompt": text(ids), "response": text(r.response_ids)}
        for ids, r in zip(openings, rollouts, strict=True)
    ]

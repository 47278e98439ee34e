"""The supervised stages: pretraining, SFT and reward modelling, which differ in data, objective and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from distllm import registry
from distllm.data import ngram
from distllm.data.datasets import ChatDataset, PairDataset, PromptDataset, text_rows
from distllm.engines.base import Engine
from distllm.errors import ConfigError
from distllm.objectives.reward import Reward, score
from distllm.pipeline.build import Builder, Parts
from distllm.train.evaluate import (
    Answers,
    answer,
    evaluate_loss,
    exact_match_metrics,
    pair_margins,
    preference_metrics,
)
from distllm.train.source import SampleSource

NUM_SAMPLES_SHOWN = 8
"""Sample texts kept per evaluation."""


def build(builder: Builder) -> Parts:
    """Build a pretraining, SFT or reward stage."""
    stage = builder.config.stage.name
    return {"pretrain": _pretrain, "sft": _sft, "reward": _reward}[stage](builder)


def _pretrain(builder: Builder) -> Parts:
    config = builder.config
    name = "clm" if config.stage.objective == "auto" else config.stage.objective
    train = text_rows(builder.data, builder.tokenizer, config.train.seq_len, "train")
    heldout = text_rows(builder.data, builder.tokenizer, config.train.seq_len, "heldout")
    objective = registry.get("objective", name)(config.stage, pad_id=builder.pad_id)
    engine = builder.engine("model", builder.model("lm"), trained=True)
    shown = [heldout[i] for i in range(min(len(heldout), config.train.num_eval_samples))]

    def evaluate() -> tuple[dict[str, float], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, shown, config.train.micro_batch_size)
        metrics["eval/bits_per_byte"] = heldout.bits_per_byte(metrics["eval/loss"])
        openings = [ids[:12].tolist() for ids in heldout.documents()[:4]]
        return metrics, continuations(builder, engine, openings)

    def baselines() -> dict[str, float]:
        if not config.stage.baselines:
            return {}
        documents = [[d[:-1] for d in rows.documents()] for rows in (train, heldout)]
        costs = ngram.baselines(*documents, len(builder.tokenizer), builder.tokenizer.eos_token_id)
        return {f"baseline/{name}": nats for name, nats in costs.items()}

    parts = _supervised(builder, engine, objective, train, evaluate)
    return replace(parts, baselines=baselines)


def _sft(builder: Builder) -> Parts:
    config = builder.config
    limit = config.train.seq_len
    train = ChatDataset(builder.data.dialogues("train"), builder.tokenizer, limit)
    heldout = ChatDataset(builder.data.dialogues("heldout"), builder.tokenizer, limit)
    objective = registry.get("objective", "sft")(config.stage, pad_id=builder.pad_id)
    engine = builder.engine("model", builder.model("lm"), trained=True)
    count = config.train.num_eval_samples
    shown = [heldout[i] for i in range(min(len(heldout), count))]
    prompts = heldout_prompts(builder) if builder.data.checkable else []

    def evaluate() -> tuple[dict[str, float], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, shown, config.train.micro_batch_size)
        if not prompts:
            return metrics, []
        answers = answer_greedily(builder, engine, prompts)
        return metrics | exact_match_metrics(answers), sample_records(builder, answers)

    return _supervised(builder, engine, objective, train, evaluate)


def _reward(builder: Builder) -> Parts:
    config = builder.config
    if config.stage.head not in ("last", "likelihood"):
        raise ConfigError(f"stage.head={config.stage.head} is unknown. Known: last, likelihood.")
    limit = config.train.seq_len
    train = PairDataset(builder.data.pairs("train"), builder.tokenizer, limit)
    heldout = PairDataset(builder.data.pairs("heldout"), builder.tokenizer, limit)
    model = builder.model(config.stage.head)
    objective = Reward(config.stage, pad_id=builder.pad_id, join=model.join)
    engine = builder.engine("model", model, trained=True)
    count, size = config.train.num_eval_samples, config.train.micro_batch_size
    shown = [heldout[i] for i in range(min(len(heldout), count))]

    def evaluate() -> tuple[dict[str, float], list[dict[str, Any]]]:
        metrics = evaluate_loss(engine, objective, shown, size)
        margins = pair_margins(engine, objective, shown, size)
        return metrics | preference_metrics(margins, shown), []

    def finish() -> None:
        """Centre and scale the scores of the chosen answers, so that 0 and 1 mean the same for every model."""
        scores = []
        for start in range(0, min(len(train), 512), size):
            part = [train[i] for i in range(start, min(start + size, len(train)))]
            batch = objective.collate(part).to(engine.device)
            scores.append(engine.infer(score, batch).double())
        both = torch.cat(scores)
        head: Any = model.head
        scale, shift = head.reward_std.clone(), head.reward_mean.clone()
        head.reward_mean.copy_(shift + both.mean() * scale)
        head.reward_std.copy_(both.std() * scale)

    parts = _supervised(builder, engine, objective, train, evaluate)
    baselines = partial(_likelihood_baseline, builder, objective, shown)
    return replace(parts, finish=finish, baselines=baselines)


def _likelihood_baseline(builder: Builder, objective: Reward, pairs: list[Any]) -> dict[str, float]:
    """Judge the pairs by the log-likelihood of the model that training starts from."""
    engine = builder.engine("baseline", builder.model("likelihood", dropout=False), trained=False)
    margins = pair_margins(engine, objective, pairs, builder.config.train.micro_batch_size)
    metrics = preference_metrics(margins, pairs)
    return {
        k.replace("eval/", "baseline/likelihood_"): v
        for k, v in metrics.items()
        if k.startswith("eval/accuracy")
    }


def _supervised(
    builder: Builder, engine: Engine, objective: Any, train: Any, evaluate: Callable[[], Any]
) -> Parts:
    config = builder.config
    source = SampleSource(
        train,
        engine,
        objective,
        builder.schedule(),
        config.optim.lr,
        config.train,
        config.run.seed,
    )
    return Parts(
        tokenizer=builder.tokenizer,
        data=builder.data,
        engines={"model": engine},
        trained=["model"],
        source=source,
        evaluate=evaluate,
        parents={"model": config.model} if config.model else {},
    )


def heldout_prompts(builder: Builder) -> list[Any]:
    """Encode the held-out prompts that an evaluation answers."""
    prompts = builder.data.prompts("heldout")[: builder.config.train.num_eval_samples]
    limit = builder.config.train.seq_len
    dataset = PromptDataset(prompts, builder.tokenizer, limit)
    return [dataset[i] for i in range(len(dataset))]


def answer_greedily(builder: Builder, engine: Engine, prompts: list[Any]) -> Answers:
    """Answer each prompt with the likeliest tokens."""
    options = replace(builder.config.generation, temperature=0.0, top_k=0, top_p=1.0)
    return answer_with(builder, engine, prompts, options)


def answer_with(builder: Builder, engine: Engine, prompts: list[Any], options: Any) -> Answers:
    """Answer each prompt once under `options`."""
    return answer(
        engine,
        prompts,
        options,
        end_ids=builder.end_ids,
        pad_id=builder.pad_id,
        decode=builder.decode,
        seed=builder.config.run.seed,
    )


def sample_records(builder: Builder, answers: Answers) -> list[dict[str, Any]]:
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
    from distllm.generation.generate import generate

    options = replace(builder.config.generation, max_new_tokens=32, temperature=0.7)
    room = builder.config.train.seq_len - 32
    openings = [ids[:room] for ids in openings if ids[:room]]
    with engine.sampling() as model:
        rollouts = generate(
            model,  # type: ignore[arg-type]
            openings,
            options,
            end_ids=[builder.tokenizer.eos_token_id],
            pad_id=builder.pad_id,
            seed=builder.config.run.seed,
        )
    text = partial(builder.tokenizer.decode, skip_special_tokens=True)
    return [
        {"prompt": text(ids), "response": text(r.response_ids)}
        for ids, r in zip(openings, rollouts, strict=True)
    ]

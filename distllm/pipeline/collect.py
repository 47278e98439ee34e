"""Preference pairs from the current policy: its own wrong answers, and corrupted right ones, against right answers."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distllm.config.schema import Config
from distllm.data.datasets import PromptDataset
from distllm.data.skills import exact_match
from distllm.engines import collectives
from distllm.engines.base import Engine
from distllm.engines.hardware import tune_cpu
from distllm.engines.processes import phase
from distllm.generation.generate import generate
from distllm.generation.noise import derive_seed
from distllm.generation.rollouts import spread
from distllm.pipeline.build import Builder
from distllm.pipeline.lineage import describe_lineage, describe_origin
from distllm.pipeline.session import session
from distllm.pipeline.stage import read_result
from distllm.tracking.progress import progress
from distllm.train.files import atomic_write_json, atomic_write_text
from distllm.train.rng import seed_all
from distllm.types import Pair, Prompt, Rollout

_log = logging.getLogger("distllm")

SPLITS = ("train", "heldout")
BATCH_SIZE = 128


def collect_pairs(config: Config, num_samples: int = 2) -> dict[str, Any]:
    """Write `train.jsonl` and `heldout.jsonl` of pairs to `run.dir`; return what was found.

    For each prompt the policy answers `num_samples` times at temperature 1. A wrong answer becomes the rejected side of
    a pair of kind `sampled`: of several, the one whose length is nearest to the right answer's, so that length gives
    little away. Where all answers were right, the source's corrupted answer is used, but in at most half of the pairs.

    Raises:
        ConfigError: the data offers no prompts with answers.
    """
    with session(config) as folder:
        done = collectives.from_main(lambda: read_result(folder))
        if done is not None:
            return done["metrics"]
        tune_cpu(config.hardware)
        seed_all(config.run.seed, collectives.rank())
        builder = Builder(config, folder)
        engine = builder.engine("policy", builder.model("lm", dropout=False), trained=False)
        lineage = describe_lineage(config, describe_origin(builder), {"policy": str(config.model)})
        # Each policy gets noise of its own, so that a further round does not repeat the draws of the last.
        seed = derive_seed(config.run.seed, int((lineage["parent"]["sha256"] or "0")[:8], 16))
        metrics: dict[str, Any] = {}
        found: dict[str, list[Pair]] = {}
        for split in SPLITS:
            found[split], accuracy = _pairs(builder, engine, split, num_samples, seed)
            sampled = sum(p.kind == "sampled" for p in found[split])
            metrics |= {
                f"{split}/pairs": len(found[split]),
                f"{split}/share_sampled": sampled / max(1, len(found[split])),
                f"{split}/policy_accuracy": accuracy,
            }
        collectives.on_main(lambda: _write(folder, found, lineage, metrics))
        return metrics


def _write(
    folder: Path, found: dict[str, list[Pair]], lineage: dict[str, Any], metrics: dict[str, Any]
) -> None:
    for split, pairs in found.items():
        atomic_write_text(folder / f"{split}.jsonl", "".join(_row(pair) for pair in pairs))
    atomic_write_json(folder / "lineage.json", lineage)
    atomic_write_json(
        folder / "result.json",
        {"name": folder.name, "stage": "collect", "steps": 0, "metrics": metrics},
    )


def _pairs(
    builder: Builder, engine: Engine, split: str, num_samples: int, seed: int
) -> tuple[list[Pair], float]:
    corrupted = builder.data.pairs(split)
    prompts = builder.data.prompts(split)[: len(corrupted)]
    limit = builder.config.train.seq_len
    examples = PromptDataset(prompts, builder.tokenizer, limit)
    shown = progress(len(prompts), f"collect {split}", is_main=engine.ranks.is_main)
    with phase("sampling"), engine.sampling() as model, shown as bar:

        def sample(numbers: list[int]) -> list[Rollout]:
            rollouts: list[Rollout] = []
            for start in range(0, len(numbers), BATCH_SIZE):
                part = [examples[i] for i in numbers[start : start + BATCH_SIZE]]
                rollouts += generate(
                    model,  # type: ignore[arg-type]
                    [p.prompt_ids for p in part],
                    builder.config.generation,
                    end_ids=builder.end_ids,
                    pad_id=builder.pad_id,
                    seed=seed,
                    prompt_indices=[p.sample_id for p in part],
                    num_samples=num_samples,
                )
                bar.advance(len(part) * engine.ranks.world_size)
            return rollouts

        rollouts = spread(len(prompts), sample, num_samples)
    texts = [builder.decode(r.response_ids).strip() for r in rollouts]
    answers = [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    right = sum(
        exact_match(text, p.answer or "")
        for p, texts in zip(prompts, answers, strict=True)
        for text in texts
    )
    return mix(prompts, answers, corrupted), right / (len(prompts) * num_samples)


def mix(
    prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], corrupted: Sequence[Pair]
) -> list[Pair]:
    """Pair each right answer with a sampled wrong one where there is one, else with a corrupted one.

    Corrupted pairs beyond the number of sampled ones are dropped, in order.
    """
    pairs: list[Pair] = []
    num_sampled = 0
    for prompt, texts, other in zip(prompts, answers, corrupted, strict=True):
        right = prompt.answer or ""
        wrong = [t for t in texts if t and not exact_match(t, right)]
        if wrong:
            nearest = min(wrong, key=lambda text: (abs(len(text) - len(right)), text))
            pair = Pair(
                prompt=prompt.messages,
                chosen=right,
                rejected=nearest,
                kind="sampled",
                task=prompt.task,
            )
            pairs.append(pair)
            num_sampled += 1
        else:
            pairs.append(other)
    room = num_sampled
    kept = []
    for pair in pairs:
        if pair.kind != "sampled":
            if room == 0:
                continue
            room -= 1
        kept.append(pair)
    return kept


def _row(pair: Pair) -> str:
    record = {
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "kind": pair.kind,
        "task": pair.task,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def pair_files(folder: Path) -> dict[str, str]:
    """Return the overrides that make a reward stage learn from the pairs in `folder`."""
    return {
        "data": "file",
        "data.path": str(folder / "train.jsonl"),
        "data.heldout_path": str(folder / "heldout.jsonl"),
    }

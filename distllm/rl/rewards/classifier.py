"""A sequence classifier or regressor as a reward: it reads the text of a response with a tokenizer of its own.

Ours (`stage=classify`, `stage=reward`) and Hugging Face's alike. Typed special tokens stay text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distllm.arch.hf.foreign import load_classifier
from distllm.data.chat import encode_dialogue
from distllm.engines.base import Engine
from distllm.errors import ConfigError
from distllm.registry import register
from distllm.rl.rewards.base import RewardContext
from distllm.rl.rewards.model import reward_folder
from distllm.types import Batch, Model, Prompt, Rollout


@register("reward")
class Classifier:
    """The probability of one class, or the only output, for each response."""

    def __init__(
        self, engine: Engine, tokenizer: Any, *, label: int | None, reads: str, batch_size: int
    ) -> None:
        """Score with the frozen model of `engine`.

        Args:
            engine: holds a model with `.logits` [batch, labels] or `.scores` [batch].
            tokenizer: the model's.
            label: whose probability is the reward; None takes the raw score.
            reads: `response`, `joined`, `pair` or `dialogue`.
            batch_size: responses per forward.
        """
        self.engine, self.tokenizer, self.label, self.reads = engine, tokenizer, label, reads
        self.batch_size = batch_size
        self.problems: dict[int, str] = {}

    @classmethod
    def build(cls, context: RewardContext) -> Classifier:
        """Load `stage.reward_model` and find the class."""
        options, folder = context.options, reward_folder(context)
        model, tokenizer, names = load_classifier(folder, context.load)
        if tokenizer is None:
            raise ConfigError(
                f"stage.reward_model={folder} has no tokenizer beside it. Put its tokenizer.json there."
            )
        reads = options.reward_reads
        if reads == "auto":
            reads = "dialogue" if tokenizer.chat_template else "joined"
        label = None if len(names) < 2 else _find(options.reward_label, names)
        return cls(
            context.freeze(model),
            tokenizer,
            label=label,
            reads=reads,
            batch_size=context.batch_size,
        )

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Score each of `texts`; `rollouts` are not read. Every rank scores its share and ends with all scores."""
        scores: dict[int, Tensor] = {}
        for places, counts in self.engine.share(len(texts), self.batch_size):
            batch = self._encode([prompts[i] for i in places], [texts[i] for i in places])
            verdicts = self.engine.infer(self._verdicts, batch.to(self.engine.device)).double()
            scores |= zip(places, verdicts, strict=True) if counts else {}
        values = [v.item() for v in self.engine.gather(scores, len(texts))]
        self.problems = {
            i: f"the classifier says {v}" for i, v in enumerate(values) if not math.isfinite(v)
        }
        return [v if math.isfinite(v) else math.nan for v in values]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to refuse: it judges any text."""

    def close(self) -> None:
        """Nothing to give back: the engine is the run's."""

    def _encode(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Batch:
        """Encode on the right side; what is too long loses its beginning, where the prompt is."""
        model: Any = self.engine.model
        limit: int = model.options.max_seq_len
        asked = [p.messages[-1]["content"] for p in prompts]
        if self.reads == "dialogue":
            said = [[*p.messages, _answer(t)] for p, t in zip(prompts, texts, strict=True)]
            rows = [encode_dialogue(self.tokenizer, m)[0][-limit:] for m in said]
            return _pad(rows, self.tokenizer.pad_token_id or 0)
        inputs = {
            "response": (list(texts),),
            "joined": ([a + t for a, t in zip(asked, texts, strict=True)],),
            "pair": (asked, list(texts)),
        }[self.reads]
        encoded = self.tokenizer(
            *inputs,
            split_special_tokens=True,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        return Batch(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"].bool(),
            token_type_ids=encoded.get("token_type_ids"),
        )

    def _verdicts(self, model: Model, batch: Batch) -> Tensor:
        out = model(**batch.inputs(), compute_logits=True)
        if self.label is None:
            return out.scores if out.scores is not None else out.logits[:, 0]  # type: ignore[index]
        assert out.logits is not None
        return out.logits.float().softmax(-1)[:, self.label]


def _find(label: str, names: Sequence[str]) -> int:
    if not label:
        return len(names) - 1
    if label in names:
        return list(names).index(label)
    if label.isdigit() and int(label) < len(names):
        return int(label)
    raise ConfigError(
        f"stage.reward_label={label} is no class of the reward model. It has: {', '.join(names)}."
    )


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _pad(rows: Sequence[Sequence[int]], pad_id: int) -> Batch:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return Batch(input_ids=ids, attention_mask=mask)

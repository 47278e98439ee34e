"""The source of RL work: sample, score, prepare, then hand out the updates one optimizer step at a time.

`train/loop.py` runs it like any other stage. A checkpoint may fall between two updates of one batch of rollouts, so
the rollouts themselves are part of the state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distllm.data.datasets import PromptExample
from distllm.data.sampler import Sampler
from distllm.engines.base import Engine
from distllm.generation.generate import generate
from distllm.generation.noise import derive_seed
from distllm.generation.options import GenerationOptions
from distllm.optim.constant import Constant
from distllm.rl.algorithm import Algorithm
from distllm.rl.objective import TOKEN_FIELDS
from distllm.rl.options import RLOptions
from distllm.rl.scoring import summarise
from distllm.train.ledger import Ledger
from distllm.train.loop import Work
from distllm.train.options import TrainOptions
from distllm.types import Prompt, Rollout


class RewardFunction(Protocol):
    """Scores responses; NaN marks one that could not be scored."""

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Return one reward per rollout."""
        ...


@dataclass(slots=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    options: GenerationOptions
    end_ids: list[int]
    pad_id: int
    decode: Any
    """Token ids -> text, special tokens dropped."""


@dataclass(slots=True, kw_only=True)
class Learning:
    """How the engines learn: peak learning rates and schedules by role."""

    lr: Mapping[str, float]
    schedule: Constant
    options: TrainOptions


class RolloutSource:
    """Samples with the policy as it is, and hands the responses out as mini-batches."""

    def __init__(
        self,
        prompts: Sequence[PromptExample],
        engines: Mapping[str, Engine],
        algorithm: Algorithm,
        reward: RewardFunction,
        sampling: Sampling,
        learning: Learning,
        seed: int,
    ) -> None:
        self.prompts, self.engines, self.algorithm = prompts, engines, algorithm
        self.reward, self.sampling, self.learning, self.seed = reward, sampling, learning, seed
        self.sampler = Sampler(len(prompts), seed, shuffle=learning.options.shuffle)
        self.ledger = Ledger()
        self.rollouts: list[Rollout] = []
        self.num_rollouts = 0
        """Batches of rollouts sampled so far."""
        self.next_update = 0
        """Which update of the present rollouts comes next."""
        self.on_rollouts: Any = None
        """Called with the scored rollouts and their texts, to keep samples."""

    @property
    def rollout_batch_size(self) -> int:
        """Responses per batch of rollouts."""
        return self.options.rollout_batch_size or self.learning.options.global_batch_size

    @property
    def options(self) -> RLOptions:
        """The algorithm's settings."""
        return self.algorithm.options

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps made from one batch of rollouts."""
        mini_batches = self.rollout_batch_size // self.learning.options.global_batch_size
        return self.options.num_epochs * mini_batches

    def next(self, step: int) -> tuple[list[Work], dict[str, float]]:
        """Return the work of 0-based `step`, sampling first when the last responses are used up."""
        metrics: dict[str, float] = {}
        if not self.rollouts:
            metrics = self._collect()
        examples = self._mini_batch(self.next_update)
        self.next_update += 1
        if self.next_update == self.updates_per_rollout:
            self.rollouts, self.next_update = [], 0
        return self._work(step, examples), metrics

    def _collect(self) -> dict[str, float]:
        """Sample, score, prepare."""
        clock = time.monotonic()
        count = self.rollout_batch_size // self.options.num_samples
        position = self.ledger.position
        ids = self.ledger.take(self.sampler, count)
        chosen = [self.prompts[i] for i in ids]
        with self.engines["policy"].sampling() as model:
            rollouts = generate(
                model,
                [p.prompt_ids for p in chosen],
                self.sampling.options,
                end_ids=self.sampling.end_ids,
                pad_id=self.sampling.pad_id,
                seed=derive_seed(self.seed, self.num_rollouts),
                # Positions, not ids: a prompt that comes twice at an epoch's end gets noise of its own.
                prompt_indices=range(position, position + count),
                num_samples=self.options.num_samples,
            )
        self.num_rollouts += 1
        sampled = time.monotonic()

        for rollout in rollouts:
            rollout.prompt_index = ids[rollout.prompt_index - position]
        texts = [self.sampling.decode(r.response_ids) for r in rollouts]
        prompts = [p.prompt for p in chosen for _ in range(self.options.num_samples)]
        for rollout, reward in zip(
            rollouts, self.reward.score(prompts, rollouts, texts), strict=True
        ):
            rollout.reward = self._shape(reward, rollout)
        metrics = summarise(rollouts)
        if self.on_rollouts is not None:
            self.on_rollouts(self.num_rollouts, prompts, rollouts, texts)
        scored = time.monotonic()

        metrics |= self.algorithm.prepare(rollouts, self.engines)
        self.rollouts, self.next_update = rollouts, 0
        metrics["time/sampling_s"] = sampled - clock
        metrics["time/reward_s"] = scored - sampled
        metrics["time/prepare_s"] = time.monotonic() - scored
        return metrics

    def _shape(self, reward: float, rollout: Rollout) -> float:
        """Clip the reward, and treat a truncated response as configured (NaN leaves it out)."""
        if self.options.reward_clip:
            reward = float(np.clip(reward, -self.options.reward_clip, self.options.reward_clip))
        if rollout.finish_reason == "length":
            if self.options.truncated == "penalise":
                return reward - self.options.truncated_penalty
            if self.options.truncated == "mask":
                return float("nan")
        return reward

    def _mini_batch(self, update: int) -> list[Rollout]:
        """Return this process's share of update number `update`, in an order drawn anew for each epoch."""
        size = self.learning.options.global_batch_size
        per_epoch = len(self.rollouts) // size
        epoch, index = divmod(update, per_epoch)
        order = np.random.default_rng([self.seed, self.num_rollouts, epoch]).permutation(
            len(self.rollouts)
        )
        return [self.rollouts[i] for i in order[index * size : (index + 1) * size]]

    def _work(self, step: int, examples: list[Rollout]) -> list[Work]:
        warm_up = getattr(self.options, "value_warmup_steps", 0)
        work = []
        for role, objective in self.algorithm.objectives().items():
            if role == "policy" and step < warm_up:
                continue
            size = self.learning.options.micro_batch_size
            batches = [
                objective.collate(examples[i : i + size]) for i in range(0, len(examples), size)
            ]
            if not sum(w.sum() for b in batches for w in objective.weights(b).values()):
                continue  # every response was masked or unscorable: nothing to learn from
            work.append(
                Work(
                    self.engines[role],
                    objective,
                    batches,
                    self.learning.schedule,
                    self.learning.lr[role],
                )
            )
        return work

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the rollouts in use as tensors, and counters as JSON."""
        state = {
            "ledger": self.ledger.state(),
            "num_rollouts": self.num_rollouts,
            "next_update": self.next_update,
            "algorithm": self.algorithm.state(),
            "finish_reasons": [r.finish_reason for r in self.rollouts],
        }
        return pack_rollouts(self.rollouts), state

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.ledger.load_state(state["ledger"])
        self.num_rollouts, self.next_update = state["num_rollouts"], state["next_update"]
        self.algorithm.load_state(state["algorithm"])
        self.rollouts = unpack_rollouts(tensors, state["finish_reasons"])


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Flatten rollouts into a few tensors."""
    if not rollouts:
        return {}
    tensors = {
        "prompt_ids": torch.tensor([t for r in rollouts for t in r.prompt_ids]),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in rollouts]),
        "response_ids": torch.tensor([t for r in rollouts for t in r.response_ids]),
        "response_lengths": torch.tensor([len(r.response_ids) for r in rollouts]),
        "prompt_index": torch.tensor([r.prompt_index for r in rollouts]),
        "sample_index": torch.tensor([r.sample_index for r in rollouts]),
        "reward": torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
    }
    for name in TOKEN_FIELDS:
        parts = [getattr(r, name) for r in rollouts]
        if parts[0] is not None:
            tensors[name] = torch.cat(parts)
    return tensors


def unpack_rollouts(tensors: Mapping[str, Tensor], finish_reasons: Sequence[str]) -> list[Rollout]:
    """Undo `pack_rollouts`."""
    if not tensors:
        return []
    lengths = tensors["response_lengths"].tolist()
    prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
    responses = tensors["response_ids"].split(lengths)
    token_fields = {n: tensors[n].split(lengths) for n in TOKEN_FIELDS if n in tensors}
    rollouts = []
    for i, reason in enumerate(finish_reasons):
        bare = Rollout(
            prompt_ids=prompts[i].tolist(),
            response_ids=responses[i].tolist(),
            rollout_logprobs=token_fields["rollout_logprobs"][i].clone(),
            finish_reason=reason,
            prompt_index=int(tensors["prompt_index"][i]),
            sample_index=int(tensors["sample_index"][i]),
            reward=tensors["reward"][i].item(),
        )
        rollouts.append(replace(bare, **{n: v[i].clone() for n, v in token_fields.items()}))
    return rollouts

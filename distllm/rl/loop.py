"""The source of RL work: sample, score, prepare, then hand out the updates one optimizer step at a time.

Ranks share the work of sampling and scoring; afterwards each holds all rollouts, so that whatever an algorithm does with
a whole batch (groups, whitening) knows no ranks. Each update is cut into shares again.

`train/loop.py` runs it like any other stage. A checkpoint may fall between two updates of one batch of rollouts, so
the rollouts themselves are part of the state.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from distllm.data.datasets import PromptExample
from distllm.data.mixture import make_sampler
from distllm.engines.base import Engine
from distllm.engines.collectives import any_true, together
from distllm.engines.processes import phase
from distllm.generation.generate import generate
from distllm.generation.noise import derive_seed
from distllm.generation.options import GenerationOptions
from distllm.generation.rollouts import pack_rollouts, spread, unpack_rollouts
from distllm.optim.constant import Constant
from distllm.rl.algorithm import Algorithm
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
        self.sampler = make_sampler(prompts, seed, shuffle=learning.options.shuffle)
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
        chosen = together(lambda: [self.prompts[i] for i in ids])
        with phase("sampling"), self.engines["policy"].sampling() as model:

            def sample(numbers: list[int]) -> list[Rollout]:
                return generate(
                    model,  # type: ignore[arg-type]
                    [chosen[n].prompt_ids for n in numbers],
                    self.sampling.options,
                    end_ids=self.sampling.end_ids,
                    pad_id=self.sampling.pad_id,
                    seed=derive_seed(self.seed, self.num_rollouts),
                    # Positions, not ids: a prompt that comes twice at an epoch's end gets noise of its own.
                    prompt_indices=[position + n for n in numbers],
                    num_samples=self.options.num_samples,
                )

            rollouts = spread(count, sample, self.options.num_samples)
        self.num_rollouts += 1
        sampled = time.monotonic()

        for rollout in rollouts:
            rollout.prompt_index = ids[rollout.prompt_index - position]
        texts = [self.sampling.decode(r.response_ids) for r in rollouts]
        prompts = [p.prompt for p in chosen for _ in range(self.options.num_samples)]
        with phase("reward"):
            rewards = self.reward.score(prompts, rollouts, texts)
        for rollout, reward in zip(rollouts, rewards, strict=True):
            rollout.reward = self._shape(reward, rollout)
        metrics = summarise(rollouts)
        if self.on_rollouts is not None:
            self.on_rollouts(self.num_rollouts, prompts, rollouts, texts)
        scored = time.monotonic()

        with phase("reward"):
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
        """Return the responses of update number `update`, in an order drawn anew for each epoch."""
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
            size, ranks = self.learning.options.micro_batch_size, self.engines[role].ranks
            mine = examples[ranks.dp_rank :: ranks.dp_size]
            batches = [objective.collate(mine[i : i + size]) for i in range(0, len(mine), size)]
            if not any_true(any(w.sum() for b in batches for w in objective.weights(b).values())):
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
        }
        return pack_rollouts(self.rollouts), state

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.ledger.load_state(state["ledger"])
        self.num_rollouts, self.next_update = state["num_rollouts"], state["next_update"]
        self.algorithm.load_state(state["algorithm"])
        self.rollouts = unpack_rollouts(tensors)

"""The source of RL work: sample, reward, prepare, then hand out the updates one optimizer step at a time.

Ranks share the work of sampling and scoring; afterwards each holds all rollouts, so that whatever an algorithm does with
a whole batch (groups, whitening) knows no ranks. Each update is cut into shares again.

`train/loop.py` runs it like any other stage. A checkpoint may fall between any two of these phases, and between two
updates of one batch of rollouts, so the rollouts themselves are part of the state.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from distllm.data.datasets import PromptExample
from distllm.data.mixture import make_sampler
from distllm.data.sampler import Samples
from distllm.engines.base import Engine
from distllm.engines.collectives import any_true, together
from distllm.engines.processes import phase
from distllm.generation.backend import Sampler, sample_alone
from distllm.generation.noise import derive_seed
from distllm.generation.options import GenerationOptions
from distllm.generation.rollouts import pack_rollouts, spread, unpack_rollouts
from distllm.optim.constant import Constant
from distllm.rl.algorithm import Algorithm
from distllm.rl.objective import effective_sample_size
from distllm.rl.options import RLOptions
from distllm.rl.rewards.base import Reward
from distllm.rl.scoring import summarise
from distllm.rl.shaping import shape_rewards
from distllm.train.ledger import Ledger
from distllm.train.options import TrainOptions
from distllm.train.work import Work
from distllm.types import Rollout


@dataclass(slots=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    options: GenerationOptions
    end_ids: list[int]
    pad_id: int
    decode: Any
    """Token ids -> text, special tokens dropped."""
    sample: Sampler = sample_alone
    """Draws the responses: the policy alone, or with an environment that answers it (`rl/conversation.py`)."""


@dataclass(slots=True, kw_only=True)
class Learning:
    """How the engines learn: peak learning rates and schedules by role."""

    lr: Mapping[str, float]
    schedule: Constant
    options: TrainOptions


_log = logging.getLogger("distllm")

PHASE_TIMES = ("time/sample_s", "time/reward_s", "time/prepare_s")
"""Seconds of the phases of this file; the loop adds `time/update_s`."""

GREEDY = -1
"""`sample_index` of the greedy response that some algorithms compare with."""


class RolloutSource:
    """Samples with the policy as it is, and hands the responses out as mini-batches."""

    def __init__(
        self,
        prompts: Samples[PromptExample],
        engines: Mapping[str, Engine],
        algorithm: Algorithm,
        reward: Reward,
        sampling: Sampling,
        learning: Learning,
        seed: int,
    ) -> None:
        self.prompts, self.engines, self.algorithm = prompts, engines, algorithm
        self.reward, self.sampling, self.learning, self.seed = reward, sampling, learning, seed
        self.sampler = make_sampler(prompts, seed, shuffle=learning.options.shuffle)
        self.ledger = Ledger()
        self.phase = "sample"
        """What comes next: `sample`, `reward`, `prepare`, or `update`."""
        self.rollouts: list[Rollout] = []
        """What the updates learn from; while a batch is being collected, what was accepted so far."""
        self.fresh: list[Rollout] = []
        """Sampled in this round and not scored yet."""
        self.spare: list[Rollout] = []
        """Scored and not accepted: they fill the batch up when the rounds are used up."""
        self.num_rounds = 0
        """Rounds of sampling for the present batch."""
        self.num_rollouts = 0
        """Batches of rollouts begun so far."""
        self.next_update = 0
        """Which update of the present rollouts comes next."""
        self.pending: dict[str, float] = {}
        """Metrics of the phases that are done, handed out with the first update."""
        self.stop_requested: Callable[[], bool] = lambda: False
        """Asked between two phases: sampling and scoring may take longer than a signal can wait."""
        self.on_rollouts: Callable[..., None] = lambda *_: None
        """Called with (step, prompts, rollouts, texts) once they are scored, to keep samples."""

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

    @property
    def _group_size(self) -> int:
        """Responses to one prompt, the greedy one included."""
        return self.options.num_samples + self.algorithm.samples_greedy

    def next(self, step: int) -> tuple[list[Work], dict[str, float]] | None:
        """Return the work of 0-based `step`, sampling first when the last responses are used up.

        Returns None when a stop was requested between two phases; the state then says how far they came.
        """
        while self.phase != "update":
            if self.stop_requested():
                return None
            clock = time.monotonic()
            key = f"time/{self.phase}_s"
            {"sample": self._sample, "reward": self._reward, "prepare": self._prepare}[self.phase](
                step
            )
            self.pending[key] = self.pending.get(key, 0.0) + time.monotonic() - clock
        # Seconds per optimizer step: a step that samples nothing counts as none, so that the phases add up.
        metrics, self.pending = dict.fromkeys(PHASE_TIMES, 0.0) | self.pending, {}
        examples = self._mini_batch(self.next_update)
        self.next_update += 1
        if self.next_update == self.updates_per_rollout:
            self.rollouts, self.next_update, self.phase = [], 0, "sample"
        return self._work(step, examples), metrics

    def _sample(self, step: int) -> None:
        """Answer as many prompts as the batch still lacks."""
        if not self.num_rounds:
            self.num_rollouts += 1
        self.num_rounds += 1
        num_prompts = self.rollout_batch_size // self.options.num_samples
        count = num_prompts - len(self.rollouts) // self._group_size
        position = self.ledger.position
        ids = self.ledger.take(self.sampler, count)
        sampled = self._generate(ids, position, self.sampling.options, self.options.num_samples)
        if self.algorithm.samples_greedy:
            greedy = self._generate(ids, position, replace(self.sampling.options, temperature=0), 1)
            size = self.options.num_samples
            for i, rollout in enumerate(greedy):
                rollout.sample_index = GREEDY
                self.fresh += [*sampled[i * size : (i + 1) * size], rollout]
        else:
            self.fresh = sampled
        self.phase = "reward"

    def _generate(
        self, ids: list[int], position: int, options: GenerationOptions, num_samples: int
    ) -> list[Rollout]:
        chosen = together(lambda: [self.prompts[i] for i in ids])
        with phase("sampling"), self.engines["policy"].sampling() as model:
            self.sampling.sample.sync(model)

            def sample(numbers: list[int]) -> list[Rollout]:
                return self.sampling.sample(
                    model,
                    [chosen[n] for n in numbers],
                    options,
                    end_ids=self.sampling.end_ids,
                    pad_id=self.sampling.pad_id,
                    seed=derive_seed(self.seed, self.num_rollouts - 1),
                    # Positions, not ids: a prompt that comes twice at an epoch's end gets noise of its own.
                    prompt_indices=[position + n for n in numbers],
                    num_samples=num_samples,
                )

            rollouts = spread(len(ids), sample, num_samples)
            self.sampling.sample.sleep()
        for rollout in rollouts:
            rollout.prompt_index = ids[rollout.prompt_index - position]
        return rollouts

    def _reward(self, step: int) -> None:
        """Score what was sampled, and keep the groups that the algorithm accepts."""
        fresh, size = self.fresh, self._group_size
        texts = [self.sampling.decode(r.response_ids) for r in fresh]
        prompts = [self.prompts[r.prompt_index].prompt for r in fresh]
        with phase("reward"):
            scores = self.reward.score(prompts, fresh, texts)
        for rollout, score in zip(fresh, scores, strict=True):
            rollout.score = score
        self._report_problems(step, len(fresh))
        self.on_rollouts(step, prompts, fresh, texts)
        for start in range(0, len(fresh), size):
            group = fresh[start : start + size]
            accepted = self.algorithm.accept([r for r in group if r.sample_index != GREEDY])
            (self.rollouts if accepted else self.spare).extend(group)
        self.fresh = []
        wanted = self.rollout_batch_size // self.options.num_samples * size
        lacks = wanted - len(self.rollouts)
        if lacks and self.num_rounds < self.algorithm.max_rounds:
            self.phase = "sample"
            return
        num_sampled = len(self.rollouts) + len(self.spare)
        if self.algorithm.max_rounds > 1:
            self.pending["rl/sampling_rounds"] = float(self.num_rounds)
            self.pending["rl/rejected_groups"] = len(self.spare) / num_sampled
        self.rollouts += self.spare[:lacks]
        self.spare, self.num_rounds, self.phase = [], 0, "prepare"

    def _report_problems(self, step: int, num_responses: int) -> None:
        """Count what could not be scored, and say why."""
        problems = self.reward.problems
        for name, mean in getattr(self.reward, "means", {}).items():
            self.pending[f"rl/reward/{name}"] = mean
        self.pending["rl/reward_errors"] = len(problems) / num_responses
        if problems:
            kinds = Counter(problems.values()).most_common(3)
            _log.warning(
                "Step %d: %d of %d responses have no reward and are left out: %s",
                step + 1,
                len(problems),
                num_responses,
                "; ".join(f"{why} ({count}x)" for why, count in kinds),
            )

    def _prepare(self, step: int) -> None:
        """Shape the rewards, and fill in what the objectives need."""
        shape_rewards(self.rollouts, self.options, self.sampling.options.max_new_tokens)
        greedy = {r.prompt_index: r.reward for r in self.rollouts if r.sample_index == GREEDY}
        self.rollouts = [r for r in self.rollouts if r.sample_index != GREEDY]
        for rollout in self.rollouts:
            rollout.baseline = greedy.get(rollout.prompt_index, 0.0)
        self.pending |= summarise(self.rollouts, self.options.num_samples)
        with phase("reward"):
            self.pending |= self.algorithm.prepare(self.rollouts, self.engines)
        self.next_update, self.phase = 0, "update"

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
            learns = any(w.sum() for b in batches for w in objective.weights(b).values())
            learns = learns and (role != "policy" or self.algorithm.policy.pushes(mine))
            if not any_true(learns):
                # Every response was masked, unscorable or worth as much as the others. A step without a gradient would
                # still decay the weights and follow the optimizer's momentum.
                continue
            work.append(
                Work(
                    self.engines[role],
                    objective,
                    batches,
                    self.learning.schedule,
                    self.learning.lr[role],
                )
            )
            if role == "policy":
                work[-1].derive = effective_sample_size
        return work

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the rollouts in use as tensors, and counters as JSON."""
        state = {
            "ledger": self.ledger.state(),
            "phase": self.phase,
            "num_rollouts": self.num_rollouts,
            "num_rounds": self.num_rounds,
            "next_update": self.next_update,
            "pending": self.pending,
            "algorithm": self.algorithm.state(),
            "counts": [len(self.rollouts), len(self.spare), len(self.fresh)],
        }
        return pack_rollouts([*self.rollouts, *self.spare, *self.fresh]), state

    def load_state(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.ledger.load_state(state["ledger"])
        for name in ("phase", "num_rollouts", "num_rounds", "next_update", "pending"):
            setattr(self, name, state[name])
        self.algorithm.load_state(state["algorithm"])
        everything = iter(unpack_rollouts(tensors))
        self.rollouts, self.spare, self.fresh = (
            [next(everything) for _ in range(count)] for count in state["counts"]
        )

    def pass_over(self, state: dict[str, Any]) -> None:
        """Go on behind the prompts that had been handed out when `state` was taken, with new responses."""
        self.ledger.pass_over(self.sampler, state["ledger"]["position"])
        self.num_rollouts = state["num_rollouts"]
        self.rollouts, self.fresh, self.spare, self.pending = [], [], [], {}
        self.next_update, self.num_rounds, self.phase = 0, 0, "sample"

"""Chat tasks with verifiable answers, generated from a seed (`skill_tasks.py` has the tasks).

Record i is a function of (seed, split, i) alone. Train and held-out are disjoint by content: a
question belongs to the side that its hash says, whatever the seed.
"""

from __future__ import annotations

import functools
import hashlib
from random import Random

from distllm.data.options import DataOptions
from distllm.data.skill_tasks import TASKS, Exercise, Material, gather
from distllm.data.source import SPLITS, Source, check_fraction, check_split, hash_share
from distllm.data.stdlib import read_stdlib
from distllm.errors import ConfigError
from distllm.registry import register, unknown_name
from distllm.types import Dialogue, Pair, Prompt

MAX_TRIES = 2000
"""Draws for one record before a task is said to have no question left."""


def exact_match(response: str, answer: str) -> bool:
    """Say whether a response is the answer, spaces around it aside."""
    return response.strip() == answer.strip()


@register("data")
class SkillsSource(Source):
    """Dialogues, pairs and prompts of the chosen tasks, taking turns."""

    serves = ("dialogues", "pairs", "prompts", "unpaired")
    checkable = True

    def __init__(self, options: DataOptions, seed: int) -> None:
        super().__init__(options, seed)
        check_fraction(options.heldout_fraction)
        self.tasks = list(options.tasks) or list(TASKS)
        for task in self.tasks:
            if task not in TASKS:
                raise ConfigError(unknown_name("data.tasks", task, TASKS))
        for name in ("num_train", "num_prompts", "num_heldout"):
            if getattr(options, name) < 1:
                raise ConfigError(f"data.{name}={getattr(options, name)} must be at least 1.")
        self._drawn: dict[str, list[tuple[str, Exercise]]] = {}

    def dialogues(self, split: str) -> list[Dialogue]:
        """Return questions with their right answers."""
        return [
            Dialogue(messages=[*_ask(e), {"role": "assistant", "content": e.answer}], task=task)
            for task, e in self._exercises(split, self.options.num_train)
        ]

    def pairs(self, split: str) -> list[Pair]:
        """Return the right answer against a corrupted one with as many characters."""
        return [
            Pair(prompt=_ask(e), chosen=e.answer, rejected=e.wrong, kind="corrupted", task=task)
            for task, e in self._exercises(split, self.options.num_train)
        ]

    def prompts(self, split: str) -> list[Prompt]:
        """Return questions with their answers; the training ones go on where the dialogues end."""
        return [
            Prompt(messages=_ask(e), answer=e.answer, task=task)
            for task, e in self._exercises(split, self.options.num_prompts)
        ]

    def fingerprint(self) -> str:
        """Hash every exercise once (sha256, hex): all that is served is made of the same ones."""
        digest = hashlib.sha256()
        most = max(self.options.num_train, self.options.num_prompts)
        for split in SPLITS:
            for task, e in self._exercises(split, most):
                digest.update(f"{split}\t{task}\t{e.question}\t{e.answer}\t{e.wrong}\n".encode())
        return digest.hexdigest()

    def _exercises(self, split: str, num_train: int) -> list[tuple[str, Exercise]]:
        """Draw the exercises of `split`: `num_train` of them, or `num_heldout` different ones."""
        check_split(split)
        count = num_train if split == "train" else self.options.num_heldout
        drawn = self._drawn.setdefault(split, [])
        if len(drawn) < count:
            self._draw(split, count)
        return drawn[:count]

    def _draw(self, split: str, count: int) -> None:
        """Extend the exercises of `split` to `count`."""
        material = _material()
        held, fraction = split == "heldout", self.options.heldout_fraction
        if held and fraction == 0:
            raise ConfigError("data.heldout_fraction=0 leaves nothing to evaluate on. Set 0.05.")
        drawn = self._drawn[split]
        seen = {exercise.question for _, exercise in drawn}
        for index in range(len(drawn), count):
            task = self.tasks[index % len(self.tasks)]
            rng = Random(f"{self.seed} {split} {index}")
            for _ in range(MAX_TRIES):
                exercise = TASKS[task](rng, material)
                ours = (hash_share(exercise.question) < fraction) == held
                if ours and not (held and exercise.question in seen):
                    break
            else:
                raise ConfigError(
                    f"data.num_heldout={count} is more than data.tasks={task} has to offer: "
                    f"{index} records were drawn, then {MAX_TRIES} draws found no new question. "
                    f"Lower data.num_heldout or raise data.heldout_fraction={fraction}."
                )
            seen.add(exercise.question)
            drawn.append((task, exercise))


@functools.cache
def _material() -> Material:
    return gather(read_stdlib())


def _ask(exercise: Exercise) -> list[dict[str, str]]:
    return [{"role": "user", "content": exercise.question}]

"""What every reward function offers, how `stage.reward` is read, and the sum of several.

Each kind of reward is a file beside this one; a Python function of the user's runs through `function.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distllm import registry
from distllm.errors import ConfigError
from distllm.registry import unknown_name
from distllm.rl.layout import Join
from distllm.rl.rewards.options import RewardingOptions
from distllm.types import Prompt, Rollout

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class Reward(Protocol):
    """Scores responses. NaN marks one that could not be scored; `problems` says why."""

    problems: dict[int, str]
    """Of the last call: place of a response -> what went wrong."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse data that it could judge no response by, before anything is sampled.

        Raises:
            ConfigError: none of `prompts` has what it needs.
        """
        ...

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Return one reward per rollout. All ranks pass all rollouts and get all rewards."""
        ...

    def close(self) -> None:
        """Give back what it holds (processes)."""
        ...


@dataclass(slots=True, kw_only=True)
class RewardContext:
    """What a reward may need to be built."""

    options: RewardingOptions
    function: str
    """`MODULE:FUNCTION`, for the reward that runs one."""
    log: Path | None
    """File that takes what reward functions print."""
    tokenizer: Any
    """The policy's."""
    join: Join
    pad_id: int
    batch_size: int
    """Responses per forward of a model."""
    load: Callable[[str], Any]
    """Read a model from its directory, as the engine wants it."""
    freeze: Callable[[Any], Any]
    """Put a model under an engine of its own that does not train."""


class WeightedSum:
    """Several reward functions; a response that one of them cannot score has no reward."""

    def __init__(self, parts: Sequence[tuple[str, float, Reward]]) -> None:
        self.parts = parts
        self.problems: dict[int, str] = {}
        self.means: dict[str, float] = {}
        """Of the last call: name -> mean of that function alone, over what it could score."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Let every part check the data."""
        for _, _, reward in self.parts:
            reward.check(prompts)

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Add up the weighted rewards."""
        self.problems, self.means = {}, {}
        total = [0.0] * len(texts)
        for name, weight, reward in self.parts:
            scores = reward.score(prompts, rollouts, texts)
            known = [s for s in scores if math.isfinite(s)]
            if known:
                self.means[name] = sum(known) / len(known)
            total = [t + weight * s for t, s in zip(total, scores, strict=True)]
            self.problems |= {i: f"{name}: {p}" for i, p in reward.problems.items()}
        return total

    def close(self) -> None:
        """Close all parts."""
        for _, _, reward in self.parts:
            reward.close()


def parse_reward(options: RewardingOptions) -> list[tuple[str, float]]:
    """Split `math_verify + 0.2*my_rewards:brevity` into (name, weight); `auto` is replaced.

    Raises:
        ConfigError: `stage.reward` is not of that form, or a name is unknown.
    """
    found = []
    for term in options.reward.split("+"):
        weight_text, star, name = term.rpartition("*")
        name = name.strip()
        try:
            weight = float(weight_text) if star else 1.0
        except ValueError:
            raise ConfigError(
                f"stage.reward={options.reward}: {weight_text.strip()!r} is not a weight. Write it as in "
                "stage.reward='math_verify + 0.2*my_rewards:brevity'."
            ) from None
        if name == "auto":
            name = "model" if options.reward_model else "exact_match"
        known = [n for n in registry.names("reward") if n != "function"]
        if name not in known and not _FUNCTION.fullmatch(name):
            raise ConfigError(
                f"{unknown_name('stage.reward', name, ['auto', *known])} "
                "A Python function is given as MODULE:FUNCTION."
            )
        found.append((name, weight))
    if len({name for name, _ in found}) < len(found):
        raise ConfigError(
            f"stage.reward={options.reward} names a reward twice. Add up its weights instead."
        )
    return found


def build_reward(context: RewardContext) -> Reward:
    """Build what `context.options` asks for.

    Raises:
        ConfigError: a name is unknown, a function cannot be imported, or a model does not fit.
    """
    parts: list[tuple[str, float, Reward]] = []
    for name, weight in parse_reward(context.options):
        context.function = name
        cls: Any = registry.get("reward", "function" if ":" in name else name)
        parts.append((name, weight, cls.build(context)))
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][2]
    return WeightedSum(parts)

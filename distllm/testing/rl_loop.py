"""The RL loop at toy size, without text: prompts and responses are ids, a reward is a function of ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distllm.data.datasets import PromptExample
from distllm.engines.base import Engine
from distllm.generation.backend import Sampler, sample_alone
from distllm.generation.options import GenerationOptions
from distllm.optim.constant import Constant
from distllm.optim.options import ScheduleOptions
from distllm.rl.loop import Learning, RolloutSource, Sampling
from distllm.testing.rl import make_algorithm
from distllm.testing.tiny import PAD_ID
from distllm.train.options import TrainOptions
from distllm.types import Prompt, Rollout

Judge = Callable[[list[int], list[int]], float]
"""(prompt ids, response ids) -> reward."""


class IdReward:
    """A reward computed from ids in this process."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.problems: dict[int, str] = {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to refuse."""

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Judge each rollout."""
        return [self.judge(r.prompt_ids, r.response_ids) for r in rollouts]

    def close(self) -> None:
        """Nothing to give back."""


def make_source(
    algorithm: str,
    engines: Mapping[str, Engine],
    prompts: Sequence[Sequence[int]],
    reward: Any,
    *,
    end_id: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
    lr: float = 1e-3,
    value_lr: float = 0.0,
    temperature: float = 1.0,
    decode: Callable[[list[int]], str] = lambda ids: " ".join(map(str, ids)),
    sample: Sampler = sample_alone,
    **options: Any,
) -> RolloutSource:
    """Build a source of RL work over lists of ids; `batch_size` responses make one update, in one micro-batch."""
    rollout_batch = options.get("rollout_batch_size", 0)
    made = make_algorithm(
        algorithm,
        engines["policy"].model,
        temperature=temperature,
        batch_size=batch_size,
        max_response_tokens=max_new_tokens,
        **options,
    )
    made.on_policy = made.options.num_epochs == 1 and rollout_batch in (0, batch_size)
    examples = [
        PromptExample(list(ids), Prompt(messages=[{"role": "user", "content": str(ids)}]), index)
        for index, ids in enumerate(prompts)
    ]
    return RolloutSource(
        examples,
        engines,
        made,
        reward if hasattr(reward, "score") else IdReward(reward),
        Sampling(
            options=GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature),
            end_ids=[end_id],
            pad_id=PAD_ID,
            decode=decode,
            sample=sample,
        ),
        Learning(
            lr={"policy": lr, "value": value_lr or lr},
            schedule=Constant(ScheduleOptions(), 10**9),
            options=TrainOptions(global_batch_size=batch_size, micro_batch_size=batch_size),
        ),
        seed,
    )

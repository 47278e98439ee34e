"""Every RL algorithm learns every toy task, from a seed that its settings were not chosen on.

`python -m distllm.testing.learned RECORD.jsonl` measures all cells that the record lacks; `tests/rl/test_learned.py` runs the
same cells, `tests/rl/learned_table.py` makes `docs/learned_rl.md` of the record. The tasks are in `rl_tasks.py`.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from distllm import registry
from distllm.data.datasets import ChatExample
from distllm.engines.base import Engine
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.objectives.sft import SFT, SFTOptions
from distllm.testing.rl_loop import make_source
from distllm.testing.rl_tasks import END, PAD, TASKS, Task
from distllm.testing.tiny import single_engine, tiny_decoder
from distllm.train.loop import Loop
from distllm.train.options import TrainOptions
from distllm.train.step import optimizer_step

VOCAB_SIZE = 16
BATCH_SIZE = 128
WARM_UP_LR = 3e-3
SHARE_OF_GAP = 0.8
"""How much of the way from the first score to the optimum, 1, must be gone."""
SEEDS = (1, 2, 3, 4)
NEEDED_SEEDS = 3
"""On how many of them an algorithm must get so far."""

COMMON: dict[str, Any] = {"lr": 1e-3, "kl_coef": 0.0}
"""What is learned here is the reward, so that no divergence holds it back."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"value_lr": 3e-3, "value_clip": 0.0, "gae_lambda": 1.0},
}
"""Algorithm -> what else differs from its defaults; an algorithm that is not named here is tried with `COMMON`."""
NUM_STEPS = {"reverse": 240, "sort": 200, "sums": 150, "walks": 100, "digits": 120}
"""Task -> the budget: optimizer steps of RL, each on `BATCH_SIZE` responses."""


@dataclass(slots=True)
class Learned:
    """What one algorithm reached on one task with one seed."""

    algorithm: str
    task: str
    seed: int
    before: float
    """Mean reward of responses sampled for all prompts, before RL."""
    after: float
    num_steps: int
    cpu_s: float
    """Processor seconds of RL, without imitation and measurements."""

    @property
    def share(self) -> float:
        """Share of the gap between the first score and the optimum that was closed."""
        return (self.after - self.before) / (1 - self.before)


def learn(algorithm: str, task_name: str, seed: int, **changes: Any) -> Learned:
    """Train one cell: imitate for a moment, then RL with the settings of this file and `changes`."""
    task, num_steps = TASKS[task_name], changes.pop("num_steps", NUM_STEPS[task_name])
    roles = {"policy": "lm"}
    if registry.get("algorithm", algorithm).trains_value:
        roles["value"] = "value"
    engines = {role: _engine(role, head, seed) for role, head in roles.items()}
    before, weights = _warm_start(task_name, seed)
    engines["policy"].model.load_state_dict(weights)
    source = make_source(
        algorithm,
        engines,
        task.prompts,
        task.judge,
        end_id=END,
        max_new_tokens=task.budget,
        batch_size=BATCH_SIZE,
        seed=seed,
        **(COMMON | SETTINGS.get(algorithm, {}) | changes),
    )
    started = time.process_time()
    Loop(
        options=TrainOptions(
            global_batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, max_steps=num_steps
        ),
        stage=algorithm,
        source=source,
        log=lambda step, metrics: None,
        evaluate=lambda step: {},
        save=lambda loop: None,
        stop_requested=lambda: False,
        progress=lambda step, metrics: None,
    ).run()
    cpu_s = time.process_time() - started
    after = score(engines["policy"], task, seed)
    return Learned(algorithm, task_name, seed, before, after, num_steps, cpu_s)


def score(engine: Engine, task: Task, seed: int, num_samples: int = 8) -> float:
    """Mean reward of responses sampled at temperature 1 for all prompts, with noise of their own."""
    with engine.sampling() as model:
        rollouts = generate(
            model,
            task.prompts,
            GenerationOptions(max_new_tokens=task.budget),
            end_ids=[END],
            pad_id=PAD,
            seed=10_000 + seed,
            prompt_indices=range(len(task.prompts)),
            num_samples=num_samples,
        )
    rewards = [task.judge(r.prompt_ids, r.response_ids) for r in rollouts]
    return sum(rewards) / len(rewards)


def _engine(role: str, head: str, seed: int) -> Engine:
    model = tiny_decoder(
        head, seed, vocab_size=VOCAB_SIZE, d_model=48, d_ff=96, max_seq_len=32, init_std=0.1
    )
    return single_engine(model, role, weight_decay=0.0, beta2=0.98)


@functools.cache
def _warm_start(task_name: str, seed: int) -> tuple[float, Mapping[str, Tensor]]:
    """Imitate the task's expert; return the score and the weights, from which all algorithms start."""
    task, rng = TASKS[task_name], Random(seed)
    engine, objective = _engine("policy", "lm", seed), SFT(SFTOptions(), PAD)
    for _ in range(task.warm_up_steps):
        examples = []
        for index in range(BATCH_SIZE):
            prompt = rng.choice(task.prompts)
            response = task.demonstrate(prompt, rng)
            mask = [False] * len(prompt) + [True] * len(response)
            examples.append(ChatExample([*prompt, *response], mask, index))
        optimizer_step(engine, objective, [objective.collate(examples)], WARM_UP_LR)
    weights = {name: value.clone() for name, value in engine.model.state_dict().items()}
    return score(engine, task, seed), weights


def read_record(record: Path) -> list[Learned]:
    """Read what was measured."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    return [Learned(**json.loads(line)) for line in lines]


def main(record: Path, algorithms: list[str]) -> None:
    """Measure all algorithms, or those named, on one seed after another until enough reach the aim; add to the record."""
    names = algorithms or registry.names("algorithm")
    for seed, task, algorithm in itertools.product(SEEDS, TASKS, names):
        known = [r for r in read_record(record) if (r.algorithm, r.task) == (algorithm, task)]
        is_enough = sum(r.share >= SHARE_OF_GAP for r in known) >= NEEDED_SEEDS
        if is_enough or seed in {r.seed for r in known}:
            continue
        found = learn(algorithm, task, seed)
        with record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")
        sys.stdout.write(f"{found} closed {found.share:.0%}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

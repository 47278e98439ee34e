"""Turn what `python -m distllm.testing.learned RECORD.jsonl` measured into `docs/learned_rl.md`.

python tests/rl/learned_table.py RECORD.jsonl ... > docs/learned_rl.md
"""

import sys
from pathlib import Path

from distllm.testing.learned import (
    BATCH_SIZE,
    COMMON,
    NUM_STEPS,
    SEEDS,
    SETTINGS,
    SHARE_OF_GAP,
    read_record,
)
from distllm.testing.rl_tasks import TASKS

HEAD = """# What each RL algorithm learned

Five toy tasks on token ids, a decoder of 2 layers and width 48 (42,480 parameters), one thread of an AMD EPYC, fp32. The
policy first imitates an expert for the given number of steps, so that some of its answers are right; the walks that it
imitates are random ones. A cell is the mean reward of eight responses to every prompt, sampled at temperature 1 with noise
of their own, before and after RL, with seed 1 and below it with seed 2: whether three of four seeds would reach the aim
has not been measured. Prompts are those that RL practised on: what is shown is that the reward is learned, not that it carries
over to other prompts. The best possible
reward is 1 in every task, and a random policy is near 0. The aim is at least {share:.0%} of the way from the first figure to 1;
{reached} of {measured} cells reach it, **those that miss it are bold**.

Every update is made of {batch} responses. Settings that differ from the defaults, for all: {common}{own}.
They were chosen on seed 11, where `reverse` was tried most. CPU seconds are the process's own; the machine was shared. `grpo`
and `cispo` are one algorithm while each batch of responses is used for one update, as here.

What misses on `sums` runs out of variety: on seed 11 the entropy of `grpo`, `gspo` and `dr_grpo` was below 0.25 nats per token
after 45 steps, when more than half of the groups had no spread left to learn from. An entropy bonus was tried and not adopted:
on seed 1, `gspo` with `entropy_coef=0.05` closed 76% on `sums`, and `dr_grpo` with `entropy_coef=0.02` 86% on `sums` but
72% on `sort`.

| task | the response must be | reward | imitation steps | RL steps |
|---|---|---|---|---|
{tasks}

| algorithm | {names} | CPU seconds per cell, RL alone |
|---|{dashes}---|
{rows}

    python -m distllm.testing.learned runs/learned.jsonl                       # measures what the record lacks
    python tests/rl/learned_table.py runs/learned.jsonl > docs/learned_rl.md   # writes this page
    pytest -m "slow or not slow" tests/rl/test_learned.py                      # the same cells as tests
"""
REWARDS = {
    "reverse": "share of right places",
    "sort": "share of right places",
    "sums": "1 or 0",
    "walks": "1 for a shortest walk, less for each further step, 0 for no walk to the goal",
    "digits": "share of right places",
}


def show(settings):
    return ", ".join(f"`{name}={value:g}`" for name, value in settings.items())


def cell(result):
    if result is None:
        return "not measured"
    change = f"{result.before:.2f} to {result.after:.2f}"
    return change if result.share >= SHARE_OF_GAP else f"**{change}**"


def main(records):
    found = {
        (r.algorithm, r.task, r.seed): r
        for path in records
        for r in read_record(path)
        if r.seed in SEEDS
    }
    algorithms = sorted({a for a, _, _ in found})
    rows = []
    for algorithm in algorithms:
        cells, seconds = [], []
        for task in TASKS:
            results = [found.get((algorithm, task, seed)) for seed in SEEDS]
            cells.append("<br>".join(map(cell, results)))
            seconds += [r.cpu_s for r in results if r]
        rows.append(
            f"| `{algorithm}` | {' | '.join(cells)} | {min(seconds):.0f} to {max(seconds):.0f} |"
        )
    tasks = [
        f"| {name} | {task.what} | {REWARDS[name]} | {task.warm_up_steps} | {NUM_STEPS[name]} |"
        for name, task in TASKS.items()
    ]
    own = "".join(f"; for `{name}`: {show(settings)}" for name, settings in SETTINGS.items())
    print(
        HEAD.format(
            share=SHARE_OF_GAP,
            reached=sum(r.share >= SHARE_OF_GAP for r in found.values()),
            measured=len(found),
            batch=BATCH_SIZE,
            common=show(COMMON),
            own=own,
            tasks="\n".join(tasks),
            names=" | ".join(TASKS),
            dashes="---|" * len(TASKS),
            rows="\n".join(rows),
        ),
        end="",
    )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])

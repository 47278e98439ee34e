"""Turn what `python -m distllm.testing.learned RECORD.jsonl` measured into `docs/learned_rl.md`.

python tests/rl/learned_table.py RECORD.jsonl ... > docs/learned_rl.md
"""

import sys
from pathlib import Path

from distllm.testing.learned import (
    BATCH_SIZE,
    COMMON,
    NEEDED_SEEDS,
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
imitates are random ones. A figure is the mean reward of eight responses to every prompt, sampled at temperature 1 with noise
of their own, before and after RL, a line for each of the seeds {seeds}; the last is run where one before it misses. Prompts are those that RL practised on: what is shown
is that the reward is learned, not that it carries over to other prompts. The best possible reward is 1 in every task, and a
random policy is near 0. The aim is at least {share:.0%} of the way from the first figure to 1 on {needed} of {of} seeds:
**{reached} of {measured} cells reach it**; a line that does not is in italics, a cell that does not says so.

Every update is made of {batch} responses. Settings that differ from the defaults, for all: {common}{own}.
They and the steps were chosen on seeds 11 and 12 with `grpo`, `gspo` and `remax`. With `lr=0.002` and half of the steps the
policies ran out of variety on `sums`: `dr_grpo` was at 65% of the gap on seed 11, below 0.25 nats of entropy per token after 45
steps, and 8 of the 66 cells that had been run on seeds 1 and 2 missed the aim. At `lr=0.001` those three closed 91% to 96% there, and no more (89% to 94%) with an entropy bonus of 0.01.
CPU seconds are the process's own; the machine was shared. `grpo` and `cispo` are one algorithm while each batch of responses is
used for one update, as here.

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


def line(result):
    change = f"{result.before:.2f} to {result.after:.2f}"
    return change if result.share >= SHARE_OF_GAP else f"*{change}*"


def is_reached(results):
    return sum(r.share >= SHARE_OF_GAP for r in results) >= NEEDED_SEEDS


def main(records):
    found = {
        (r.algorithm, r.task, r.seed): r
        for path in records
        for r in read_record(path)
        if r.seed in SEEDS
    }
    algorithms = sorted({a for a, _, _ in found})
    rows, reached = [], 0
    for algorithm in algorithms:
        cells, seconds = [], []
        for task in TASKS:
            results = [r for s in SEEDS if (r := found.get((algorithm, task, s)))]
            reached += is_reached(results)
            cells.append(
                "<br>".join(map(line, results)) + "<br>(missed)" * (not is_reached(results))
            )
            seconds += [r.cpu_s for r in results]
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
            seeds=", ".join(map(str, SEEDS)),
            needed=NEEDED_SEEDS,
            of=len(SEEDS),
            reached=reached,
            measured=len(algorithms) * len(TASKS),
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

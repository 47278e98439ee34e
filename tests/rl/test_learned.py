"""Every RL algorithm learns every toy task: at least 80% of the way to the best possible reward."""

import dataclasses
import itertools
from pathlib import Path
from random import Random

import pytest

from distllm import registry
from distllm.testing import learned
from distllm.testing.learned import NEEDED_SEEDS, SEEDS, SHARE_OF_GAP, learn
from distllm.testing.rl_tasks import END, FIRST, TASKS

MISSED: dict[tuple[str, str], str] = {}
"""Algorithm and task that do not reach the aim on three of four seeds, with what they reach; whoever makes one do takes it out."""


def marks_of(cell):
    missed = [pytest.mark.xfail(strict=True, reason=MISSED[cell])] if cell in MISSED else []
    return [pytest.mark.slow, *missed]


CELLS = [
    pytest.param(*cell, marks=marks_of(cell))
    for cell in itertools.product(registry.names("algorithm"), TASKS)
]
PAGE = (Path(__file__).parents[2] / "docs/learned_rl.md").read_text(encoding="utf-8")


def test_walks_are_learned():
    result = learn("grpo", "walks", 1)
    assert result.before < 0.8, "nothing left to learn"
    assert result.share >= SHARE_OF_GAP, result


@pytest.mark.parametrize(("algorithm", "task"), CELLS)
@pytest.mark.timeout(900)
def test_the_task_is_learned_on_three_of_four_seeds(algorithm, task):
    results = []
    for seed in SEEDS:
        results.append(learn(algorithm, task, seed))
        assert results[-1].before < 0.8, "nothing left to learn"
        if sum(r.share >= SHARE_OF_GAP for r in results) == NEEDED_SEEDS:
            return
    pytest.fail(f"{NEEDED_SEEDS} of {len(SEEDS)} seeds must reach {SHARE_OF_GAP:.0%}: {results}")


def test_without_a_reward_nothing_is_learned(monkeypatch):
    blind = dataclasses.replace(TASKS["walks"], judge=lambda prompt, response: 0.0)
    source = learned.make_source
    monkeypatch.setattr(
        learned,
        "make_source",
        lambda name, engines, prompts, judge, **more: source(
            name, engines, prompts, blind.judge, **more
        ),
    )
    result = learn("grpo", "walks", 1, num_steps=10)
    assert result.after == result.before < 0.8


@pytest.mark.parametrize("name", TASKS)
def test_the_optimum_is_one_and_noise_is_worth_little(name):
    task, rng = TASKS[name], Random(0)
    for prompt in task.prompts:
        best = task.solve(prompt)
        assert task.judge(prompt, best) == 1.0
        assert (
            len(best) < task.budget
        )  # the end fits in, and so does what dapo keeps free of its length penalty
    scores = [
        task.judge(prompt, [rng.randrange(16) for _ in range(task.budget)])
        for prompt in task.prompts
    ]
    assert 0 <= min(scores) <= sum(scores) / len(scores) < 0.2


def test_a_walk_is_judged_as_all_walks_are():
    """Enumerate: the shortest walks found by trying all are the ones that are worth 1."""
    task = TASKS["walks"]
    nodes = range(FIRST, FIRST + 10)
    for prompt in task.prompts:
        for length in range(1, 5):
            walks = [[*w, END] for w in itertools.product(nodes, repeat=length)]
            values = {task.judge(prompt, walk) for walk in walks}
            if values != {0.0}:  # nothing shorter arrives
                assert values == {0.0, 1.0}
                break
        else:
            assert len(task.solve(prompt)) > 5


def test_sums_accept_every_right_pair_and_no_other():
    task = TASKS["sums"]
    for prompt in task.prompts[:: len(task.prompts) // 20]:
        numbers, target = [t - FIRST for t in prompt[:3]], prompt[4] - FIRST
        for a, b in itertools.product(range(4), repeat=2):
            left = list(numbers)
            given = a in left and (left.remove(a) or b in left)
            right = given and a + b == target
            assert task.judge(prompt, [FIRST + a, FIRST + b, END]) == float(right)
        assert task.judge(prompt, task.solve(prompt)[:-1]) == 0  # it must end


def test_the_page_shows_every_algorithm_and_task():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == registry.names("algorithm")
    assert f"| algorithm | {' | '.join(TASKS)} |" in PAGE
    assert all(row.count(" to ") >= NEEDED_SEEDS * len(TASKS) for row in rows)
    assert sum(row.count("(missed)") for row in rows) == len(MISSED)

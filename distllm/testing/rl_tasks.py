"""Tasks that an RL algorithm must learn in seconds: prompts and responses are token ids, a judge gives 0 to 1.

The judges are plain Python and know no model. How the tasks are learned and measured is in `learned.py`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

PAD, END, SEP, FIRST = 0, 1, 2, 3
"""Ids of padding, the end of a response, the end of a prompt, and the first symbol."""

Ids = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Prompts, a judge and an expert."""

    what: str
    """What the response must be, for readers."""
    prompts: Sequence[Ids]
    judge: Callable[[Ids, Ids], float]
    """(prompt, response with its end token if it has one) -> reward from 0 to the optimum, 1."""
    demonstrate: Callable[[Ids, Random], Ids]
    """(prompt, randomness) -> a response to imitate before RL begins; not always a good one."""
    solve: Callable[[Ids], Ids]
    """prompt -> a response that the judge gives 1."""
    budget: int
    """Most tokens of a response."""
    warm_up_steps: int
    """Steps of imitation before RL begins; 0 starts RL from random weights."""


def share_right(response: Ids, wanted: Ids) -> float:
    """Share of positions where both agree, over the longer of the two."""
    agree = sum(a == b for a, b in zip(response, wanted, strict=False))
    return agree / max(len(response), len(wanted))


def _copying(what: str, change: Callable[[Ids], Ids], num_symbols: int, warm_up_steps: int) -> Task:
    """Make a task whose answer is the prompt's three symbols in another order."""
    symbols = range(FIRST, FIRST + num_symbols)
    prompts = [[*p, SEP] for p in itertools.product(symbols, repeat=3)]

    def solve(prompt: Ids) -> Ids:
        return [*change(prompt[:-1]), END]

    return Task(
        what=what,
        prompts=prompts,
        judge=lambda prompt, response: share_right(response, solve(prompt)),
        demonstrate=lambda prompt, rng: solve(prompt),
        solve=solve,
        budget=6,
        warm_up_steps=warm_up_steps,
    )


def digits() -> Task:
    """Count on from a digit, from random weights."""

    def solve(prompt: Ids) -> Ids:
        return [*(FIRST + (prompt[0] - FIRST + i) % 10 for i in range(1, 4)), END]

    prompts = [[FIRST + d, SEP] for d in range(10)]
    return Task(
        what="the next three digits, round and round",
        prompts=prompts,
        judge=lambda prompt, response: share_right(response, solve(prompt)),
        demonstrate=lambda prompt, rng: solve(prompt),
        solve=solve,
        budget=6,
        warm_up_steps=8,
    )


def sums() -> Task:
    """Pick two of three numbers that make the target, as in the countdown game; several answers may be right."""
    prompts = []
    for numbers in itertools.product(range(4), repeat=3):
        for target in sorted({a + b for a, b in itertools.combinations(numbers, 2)}):
            prompts.append([*(FIRST + n for n in numbers), SEP, FIRST + target, SEP])

    def pairs(prompt: Ids) -> list[Ids]:
        numbers, target = [t - FIRST for t in prompt[:3]], prompt[4] - FIRST
        return [
            [FIRST + a, FIRST + b] for a, b in itertools.permutations(numbers, 2) if a + b == target
        ]

    def judge(prompt: Ids, response: Ids) -> float:
        return float(response[-1] == END and response[:-1] in pairs(prompt))

    return Task(
        what="two of three numbers whose sum is the target",
        prompts=prompts,
        judge=judge,
        demonstrate=lambda prompt, rng: [*rng.choice(pairs(prompt)), END],
        solve=lambda prompt: [*pairs(prompt)[0], END],
        budget=5,
        warm_up_steps=14,
    )


def walks(num_nodes: int = 10, longest: int = 6) -> Task:
    """Walk through a graph to its goal by the shortest way, after imitating walks at random.

    The reward is 1 for a shortest walk, falls linearly to 0 at `longest` steps, and is 0 for a walk that takes an edge
    that is not there or does not end at the goal. Reference: the random walks of Chen et al. 2021, arXiv 2106.01345,
    section 3, with the goal fixed.
    """
    rng = Random(5)
    edges = {n: {(n + 1) % num_nodes} for n in range(num_nodes)}
    for n in range(num_nodes):
        edges[n] |= set(rng.sample([m for m in range(num_nodes) if m != n], 2))
    distance = {0: 0}
    queue = deque([0])
    while queue:
        goal = queue.popleft()
        for n in range(num_nodes):
            if goal in edges[n] and n not in distance:
                distance[n] = distance[goal] + 1
                queue.append(n)

    def walk(prompt: Ids, pick: Callable[[list[int]], int]) -> Ids:
        at, steps = prompt[0] - FIRST, []
        while at and len(steps) < longest:
            at = pick(sorted(edges[at]))
            steps.append(FIRST + at)
        return [*steps, END]

    def judge(prompt: Ids, response: Ids) -> float:
        path = [prompt[0] - FIRST, *(t - FIRST for t in response[:-1])]
        legal = all(b in edges.get(a, ()) for a, b in itertools.pairwise(path))
        if response[-1] != END or not legal or path[-1] != 0:
            return 0.0
        shortest = distance[path[0]]
        return max(0.0, 1 - (len(path) - 1 - shortest) / (longest - shortest))

    prompts = [[FIRST + n, SEP] for n in range(1, num_nodes)]
    return Task(
        what="a shortest way through a graph of ten nodes",
        prompts=prompts,
        judge=judge,
        demonstrate=lambda prompt, rng: walk(prompt, rng.choice),
        solve=lambda prompt: walk(prompt, lambda nodes: min(nodes, key=distance.__getitem__)),
        budget=8,
        warm_up_steps=60,
    )


TASKS: dict[str, Task] = {
    "reverse": _copying("the three letters of the prompt, backwards", lambda ids: ids[::-1], 4, 15),
    "sort": _copying("the three letters of the prompt, in order", sorted, 4, 15),
    "sums": sums(),
    "walks": walks(),
    "digits": digits(),
}
"""Name -> task."""

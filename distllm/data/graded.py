"""Rows that hold a solution judged step by step; how it becomes token ids is in `labelled.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.data.messages import check_string, read_prompt, shown
from distllm.types import Stepwise


def read_steps(row: Mapping[str, Any]) -> Stepwise:
    """Read `prompt`, `completions` (a list of steps) and `labels` (true or false for each), as TRL names them.

    Raises:
        ValueError: a column does not hold this; the message names it.
    """
    steps, labels = row["completions"], row["labels"]
    for name, value in (("completions", steps), ("labels", labels)):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} is {shown(value)}, must be a list with an item per step")
    if len(steps) != len(labels):
        raise ValueError(f"{len(steps)} completions have {len(labels)} labels")
    for number, label in enumerate(labels, start=1):
        if label not in (0, 1):
            raise ValueError(f"labels[{number}] is {shown(label)}, must be true or false")
    return Stepwise(
        prompt=read_prompt(row["prompt"], "prompt"),
        steps=[check_string(s, f"completions[{n}]") for n, s in enumerate(steps, start=1)],
        right=[bool(label) for label in labels],
    )

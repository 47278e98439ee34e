"""Rows that hold several verdicts: on the steps of a solution (token ids: `labelled.py`), or by several objectives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.data.columns import number_of
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


def read_objectives(value: Any) -> dict[str, float]:
    """Read objective -> probability that the chosen answer is the better one by it; null where it does not compare.

    Raises:
        ValueError: it is something else, a number is not from 0 to 1, or nothing is compared.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"objectives is {shown(value)}, must be an object such as {{helpful: 1}}")
    found = {str(k): number_of(value, k, 0.5) for k, v in value.items() if v is not None}
    for name, chance in found.items():
        if not 0 <= chance <= 1:
            raise ValueError(
                f"objectives.{name} is {chance:g}, must be from 0 (rejected is better) to 1 (chosen is)"
            )
    if not found:
        raise ValueError("objectives compares nothing, must hold a number for at least one")
    return dict(sorted(found.items()))

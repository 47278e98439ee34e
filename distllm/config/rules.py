"""Conditions on one value, in code and in words. Which setting must fulfil which is in `checks.py` and `rl_checks.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition on one value."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Rule(lambda v: v > 0, "must be above 0")
AT_LEAST_1 = Rule(lambda v: v >= 1, "must be at least 1")
NOT_NEGATIVE = Rule(lambda v: v >= 0, "must not be negative")
SHARE = Rule(lambda v: 0 <= v <= 1, "must be from 0 to 1")
BELOW_1 = Rule(lambda v: 0 <= v < 1, "must be from 0 to below 1")
ABOVE_0_TO_1 = Rule(lambda v: 0 < v <= 1, "must be above 0 and at most 1")


def one_of(*words: str) -> Rule:
    """Return the rule that the value is one of `words`."""
    return Rule(lambda v: v in words, f"must be one of {', '.join(words)}")


def by_key(listed: dict[Rule, str]) -> dict[str, Rule]:
    """Turn rule -> keys with spaces between into key -> rule."""
    return {key: rule for rule, keys in listed.items() for key in keys.split()}


def multiples(value: int, unit: int) -> str:
    """Name the multiples of `unit` next to `value`."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below else f"{above}"

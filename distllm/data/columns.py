"""Single columns of a row, checked. Each function raises ValueError, naming the column, what it holds and what it must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distllm.data.messages import check_string, shown


def string_of(row: Mapping[str, Any], key: str) -> str:
    """Return a text."""
    return check_string(row[key], key)


def label_of(row: Mapping[str, Any], key: str) -> str:
    """Return a text, empty where there is none."""
    value = row.get(key)
    return "" if value is None else check_string(value, key, empty=True)


def number_of(row: Mapping[str, Any], key: str, default: float) -> float:
    """Return a finite number, `default` where there is none."""
    value = row.get(key)
    if value is None:
        return default
    if isinstance(value, str):  # a table of texts
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{key} is {shown(value)}, must be a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {shown(value)}, must be a finite number")
    return float(value)


def boolean_of(row: Mapping[str, Any], key: str) -> bool:
    """Return a verdict, however it is written."""
    value = row[key]
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if value in (True, False) and isinstance(value, bool | int):
        return bool(value)
    raise ValueError(f"{key} is {shown(value)}, must be true (good) or false (bad)")

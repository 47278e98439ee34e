"""The end of what was read as held-out data, the way character-level corpora are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from distllm.data.source import check_fraction
from distllm.types import Document, Record

R = TypeVar("R", bound=Record)


def cut_end(records: Sequence[R], fraction: float) -> tuple[list[R], list[R]]:
    """Return (beginning, last `fraction`) of records in order; a single document is cut between two characters."""
    check_fraction(fraction)
    if len(records) == 1 and isinstance(records[0], Document):
        whole = records[0]
        at = int(len(whole.text) * (1 - fraction))
        both = [replace(whole, text=whole.text[:at]), replace(whole, text=whole.text[at:])]
        return both[:1], [part for part in both[1:] if part.text]
    at = int(len(records) * (1 - fraction))
    return list(records[:at]), list(records[at:])

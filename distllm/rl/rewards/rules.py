"""Rules as plain functions of one response: they run in the reward processes, so no torch in here."""

from __future__ import annotations

import functools
import json
import re
import time
import urllib.request
from typing import Any


def regex(response: str, pattern: str, answer: str | None = None) -> float:
    """Compare the last match of `pattern` in the response with the last one in the answer: 1 if equal, else 0.

    The first group counts, or the whole match. An answer without a match is compared as it is; without an answer any
    match is worth 1. Spaces around, and commas within numbers, do not matter.
    """
    found = _last(response, pattern)
    if found is None:
        return 0.0
    if answer is None:
        return 1.0
    return float(_plain(found) == _plain(_last(answer, pattern) or answer))


def has_form(response: str, pattern: str) -> float:
    """Return 1 if the response holds a match of `pattern`, else 0."""
    return float(_last(response, pattern) is not None)


def math_verify(response: str, answer: str | None) -> float | None:
    """Return 1 if the response states the mathematical value of the answer, else 0; None without a usable answer."""
    if answer is None:
        return None
    gold = _parse_gold(answer)
    if not gold:
        return None
    from math_verify import parse, verify

    # Time limits by signals are off: the process itself is under one.
    found = parse(response, parsing_timeout=None)  # type: ignore[arg-type]
    return float(verify(list(gold), found, timeout_seconds=None))


def http(url: str, timeout_s: float, retries: int, **sample: object) -> float:
    """Post the sample as JSON; return `reward` of the answer.

    After a failure it waits 0.5 s, then 1 s, 2 s and so on, but an attempt and its wait take `timeout_s` at most.

    Raises:
        OSError: every attempt failed.
        ValueError: the answer holds no reward.
    """
    data = json.dumps(sample).encode()
    for attempt in range(retries + 1):
        started = time.monotonic()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return _reward_in(answer.read())
        except OSError:
            if attempt == retries:
                raise
        left = timeout_s - (time.monotonic() - started)
        time.sleep(max(0.0, min(0.5 * 2**attempt, left)))
    raise AssertionError("unreachable")


def _reward_in(answer: bytes) -> float:
    try:
        return float(json.loads(answer)["reward"])
    except (ValueError, KeyError, TypeError):
        said = answer[:100].decode("utf-8", "replace")
        raise ValueError(f'the endpoint answers {said!r} instead of {{"reward": NUMBER}}') from None


def _last(text: str, pattern: str) -> str | None:
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    return matches[-1].group(1) if matches[-1].re.groups else matches[-1].group(0)


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3})", "", text).strip()


@functools.lru_cache(maxsize=4096)
def _parse_gold(answer: str) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(answer, parsing_timeout=None))  # type: ignore[arg-type]

"""Small made-up data sets, one for each kind of record, that a toy model learns in seconds; held out are unseen prompts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

LETTERS = "abcdefghijklmnopqrst"
PEOPLE = ("ann", "bob", "eve", "max")
PLACES = ("new york", "los angeles", "san jose")
VERBS = ("sees", "meets", "calls")


def write_toy(kind: str, path: Path, count: int = 4000, seed: int = 0) -> Path:
    """Write `count` records of a kind as JSON lines: texts, parallel, pairs, labelled, labelled_pairs or tagged."""
    rng = Random(seed)
    records = itertools.islice(_MAKERS[kind](rng), count)
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def toy_texts() -> list[str]:
    """Return texts that hold every word of every toy, for a tokenizer."""
    words = [*LETTERS, *PEOPLE, *PLACES, *VERBS, "low", "high", "in"]
    return [" ".join(words), " ".join(reversed(words))] * 20


def _texts(rng: Random) -> Iterator[dict[str, Any]]:
    """Write runs of the alphabet from anywhere on, round and round."""
    while True:
        start, length = rng.randrange(len(LETTERS)), rng.randint(20, 60)
        letters = (LETTERS[(start + i) % len(LETTERS)] for i in range(length))
        yield {"text": " ".join(letters)}


def _questions(rng: Random) -> list[tuple[str, str]]:
    """List two letters each, in random order, to be answered with the first."""
    both = [(f"{a} {b}", a) for a, b in itertools.permutations(LETTERS, 2)]
    rng.shuffle(both)
    return both


def _parallel(rng: Random) -> Iterator[dict[str, Any]]:
    for asked, answer in _questions(rng):
        yield {"source": asked, "target": answer}


def _pairs(rng: Random) -> Iterator[dict[str, Any]]:
    """Reject the second letter, both, and several others, so that a judge has no loophole for RL to find."""
    for asked, answer in _questions(rng):
        others = rng.sample([x for x in LETTERS if x not in asked], 8)
        for wrong in (asked[-1], asked, *others):
            yield {"prompt": asked, "chosen": answer, "rejected": wrong}


def _labelled(rng: Random) -> Iterator[dict[str, Any]]:
    """Tell whether the first of two letters is in the first half of the alphabet."""
    for asked, answer in _questions(rng):
        yield {"text": asked, "label": "low" if LETTERS.index(answer) < 10 else "high"}


def _labelled_pairs(rng: Random) -> Iterator[dict[str, Any]]:
    """Tell whether the first text's letter comes before the second's."""
    for asked, _ in _questions(rng):
        first, second = asked.split()
        yield {"text": first, "text_pair": second, "label": "low" if first < second else "high"}


def _tagged(rng: Random) -> Iterator[dict[str, Any]]:
    """Tag people and places in short sentences, letters between."""
    while True:
        tokens, tags = [], []
        for kind in rng.choices(("person", "place", "verb", "letter"), k=rng.randint(3, 7)):
            if kind == "person":
                tokens.append(rng.choice(PEOPLE))
                tags.append("B-PER")
            elif kind == "place":
                words = rng.choice(PLACES).split()
                tokens += words
                tags += ["B-LOC", *["I-LOC"] * (len(words) - 1)]
            else:
                tokens.append(rng.choice(VERBS if kind == "verb" else LETTERS))
                tags.append("O")
        yield {"tokens": tokens, "tags": tags}


_MAKERS = {
    "texts": _texts,
    "parallel": _parallel,
    "pairs": _pairs,
    "labelled": _labelled,
    "labelled_pairs": _labelled_pairs,
    "tagged": _tagged,
}

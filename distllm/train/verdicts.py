"""What a labelling model gets right: accuracy, F1 over classes, F1 over the entities that tags spell out.

Reference: Tjong Kim Sang and De Meulder 2003, CoNLL-2003 shared task, for what counts as an entity (IOB2; an `I-` that
continues nothing begins one, as in the task's own scorer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

Entity = tuple[str, int, int]
"""Type, first word, word behind the last."""


def macro_f1(predicted: Sequence[int], right: Sequence[int], num_labels: int) -> float:
    """Average the F1 of all classes that occur in `right` or `predicted`."""
    hits = Counter(p for p, r in zip(predicted, right, strict=True) if p == r)
    said, true = Counter(predicted), Counter(right)
    present = [c for c in range(num_labels) if said[c] + true[c]]
    return sum(2 * hits[c] / (said[c] + true[c]) for c in present) / max(len(present), 1)


def entities(tags: Sequence[str]) -> list[Entity]:
    """List the entities of a sentence in the order of their first words."""
    found: list[Entity] = []
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        goes_on = prefix == "I" and name == kind
        if kind and not goes_on:
            found.append((kind, start, place))
            kind = ""
        if not goes_on and prefix in ("B", "I") and name:
            kind, start = name, place
    return found


def entity_metrics(
    predicted: Iterable[Sequence[str]], right: Iterable[Sequence[str]]
) -> dict[str, float]:
    """Return precision, recall and F1 of exact entities, all in all (`f1`) and per type (`f1/TYPE`)."""
    hits: Counter[str] = Counter()
    said: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for ours, theirs in zip(predicted, right, strict=True):
        mine, gold = set(entities(ours)), set(entities(theirs))
        said.update(kind for kind, _, _ in mine)
        true.update(kind for kind, _, _ in gold)
        hits.update(kind for kind, _, _ in mine & gold)
    num_hits, num_said, num_true = (sum(c.values()) for c in (hits, said, true))
    metrics = {
        "precision": num_hits / num_said if num_said else 0.0,
        "recall": num_hits / num_true if num_true else 0.0,
        "f1": _f1(num_hits, num_said, num_true),
    }
    for kind in sorted(true):
        metrics[f"f1/{kind}"] = _f1(hits[kind], said[kind], true[kind])
    return metrics


def _f1(hits: int, said: int, true: int) -> float:
    return 2 * hits / (said + true) if said + true else 0.0

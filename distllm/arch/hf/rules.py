"""How tensors of a checkpoint become ours and back: renamed, transposed, fused, stacked. Which ones is each family's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """Some of their tensors are some of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    load: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """Theirs -> ours."""
    store: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    """Ours -> theirs."""


def _unchanged(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def same(theirs: str, ours: str) -> Rule:
    """One tensor under two names."""
    return Rule((theirs,), (ours,), _unchanged, _unchanged)


def transposed(theirs: str, ours: str) -> Rule:
    """One matrix, stored (in, out) by them."""

    def turn(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0].t()]

    return Rule((theirs,), (ours,), turn, turn)


def fused(theirs: str, ours: Sequence[str], *, turned: bool = False) -> Rule:
    """Equal parts of ours, one below the other in theirs; `turned` = stored (in, out)."""

    def load(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = tensors[0].t() if turned else tensors[0]
        return whole.chunk(len(ours))

    def store(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = torch.cat(list(tensors))
        return [whole.t() if turned else whole]

    return Rule((theirs,), tuple(ours), load, store)


def load_all(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate their tensors to ours; a rule whose tensors are not all there gives nothing."""
    state: dict[str, Tensor] = {}
    for rule in rules:
        if all(name in tensors for name in rule.theirs):
            made = rule.load([tensors[name] for name in rule.theirs])
            state |= dict(zip(rule.ours, made, strict=True))
    return state


def store_all(rules: Sequence[Rule], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate our tensors to theirs."""
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        if all(name in state for name in rule.ours):
            made = rule.store([state[name] for name in rule.ours])
            tensors |= dict(zip(rule.theirs, made, strict=True))
    return tensors


def their_names(rules: Sequence[Rule]) -> dict[str, tuple[str, ...]]:
    """Map our names to theirs, for messages."""
    return {ours: rule.theirs for rule in rules for ours in rule.ours}

"""Which samples have been consumed: proof that none is lost or seen twice over stops and resumes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distllm.data.sampler import Sampler


@dataclass(slots=True)
class Ledger:
    """Which samples have been consumed: how many, and a rolling hash of their ids in order."""

    position: int = 0
    digest: str = ""
    passed_over: list[list[int]] = field(default_factory=list)
    """[first, end) of positions that were taken and not learned from, after a rollback."""

    def take(self, sampler: Sampler, count: int) -> list[int]:
        """Return the next `count` sample ids and enter them into the ledger."""
        ids = sampler.indices(self.position, count)
        self.position += count
        self.digest = hashlib.sha256(
            self.digest.encode() + np.asarray(ids, dtype="<i8").tobytes()
        ).hexdigest()
        return ids

    def pass_over(self, sampler: Sampler, end: int) -> None:
        """Take the samples up to position `end` without learning from them, and note which those are."""
        if end > self.position:
            self.passed_over.append([self.position, end])
            self.take(sampler, end - self.position)

    def state(self) -> dict[str, Any]:
        """Return the ledger as JSON."""
        known = {"position": self.position, "digest": self.digest}
        return known | ({"passed_over": self.passed_over} if self.passed_over else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.position, self.digest = state["position"], state["digest"]
        self.passed_over = [list(p) for p in state.get("passed_over", ())]

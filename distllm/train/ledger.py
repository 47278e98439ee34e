"""Which samples have been consumed: proof that none is lost or seen twice over stops and resumes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from distllm.data.sampler import Sampler


@dataclass(slots=True)
class Ledger:
    """Which samples have been consumed: how many, and a rolling hash of their ids in order."""

    position: int = 0
    digest: str = ""

    def take(self, sampler: Sampler, count: int) -> list[int]:
        """Return the next `count` sample ids and enter them into the ledger."""
        ids = sampler.indices(self.position, count)
        self.position += count
        self.digest = hashlib.sha256(
            self.digest.encode() + np.asarray(ids, dtype="<i8").tobytes()
        ).hexdigest()
        return ids

    def state(self) -> dict[str, Any]:
        """Return the ledger as JSON."""
        return {"position": self.position, "digest": self.digest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.position, self.digest = state["position"], state["digest"]

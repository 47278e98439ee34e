"""What is reported between two log lines: means of step metrics, throughput, memory, model FLOPs."""

from __future__ import annotations

import math
import resource
import sys
from typing import Any

import torch


class Meters:
    """Collects step metrics and empties itself at each log line."""

    def __init__(self, flops_per_token: float = 0.0, peak_flops_per_s: float = 0.0) -> None:
        self.flops_per_token, self.peak_flops_per_s = flops_per_token, peak_flops_per_s
        self._clear()

    def add(self, metrics: dict[str, float], tokens: int, seconds: float) -> None:
        """Take in one step. Tokens are those that the first engine learned from, over all ranks."""
        for key, value in metrics.items():
            self._sums.setdefault(key, []).append(value)
        self._tokens += tokens
        self._seconds += seconds
        self._steps += 1

    def flush(self) -> dict[str, float]:
        """Return the means since the last flush, with throughput."""
        out = {k: sum(v) / len(v) for k, v in self._sums.items()}
        rate = self._tokens / self._seconds if self._seconds else 0.0
        out["perf/tokens_per_s"] = rate
        out["perf/step_s"] = self._seconds / max(1, self._steps)
        if self.peak_flops_per_s:
            out["perf/mfu"] = rate * self.flops_per_token / self.peak_flops_per_s
        out["mem/peak_gib"] = peak_memory_gib()
        self._clear()
        return {k: v for k, v in out.items() if not (isinstance(v, float) and math.isnan(v))}

    def state(self) -> dict[str, Any]:
        """Return the collected numbers as JSON; times start anew after a resume."""
        return {"sums": self._sums, "steps": self._steps, "tokens": self._tokens}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self._sums = {k: list(v) for k, v in state["sums"].items()}
        self._steps, self._tokens = state["steps"], state["tokens"]

    def _clear(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._tokens, self._seconds, self._steps = 0, 0.0, 0


def peak_memory_gib() -> float:
    """Return the peak memory so far: of the CUDA device if one is in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

"""What is reported between two log lines: means of step metrics, throughput, memory, model FLOPs."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from distllm.train.micro_batches import filling, num_tokens
from distllm.types import Batch


class Cost(Protocol):
    """Floating-point operations of training."""

    def __call__(self, batch: Batch, *, causal_half: bool) -> float:
        """Return those of one micro-batch, in one of the two published conventions."""
        ...


class Meters:
    """Collects step metrics and empties itself at each log line.

    Model FLOPs utilisation counts what the trained models have to compute for the tokens they learn from; sampling and
    scoring in RL count as time only.
    """

    def __init__(self, costs: dict[str, Cost] | None = None, peak_flops_per_s: float = 0.0) -> None:
        """Start empty.

        Args:
            costs: role of a trained engine -> what a micro-batch costs it.
            peak_flops_per_s: of all processes together; 0 = unknown.
        """
        self.costs, self.peak_flops_per_s = costs or {}, peak_flops_per_s
        self.measured_flops_per_s = 0.0
        """What large matrix products reach on all devices together; 0 = unknown."""
        self._clear()

    def add(
        self, metrics: dict[str, float], work: Sequence[Any], tokens: int, seconds: float
    ) -> None:
        """Take in one step.

        Args:
            metrics: of the step.
            work: what each engine learned, on this rank; its micro-batches stand for those of all ranks.
            tokens: what the first engine learned from, over all ranks.
            seconds: of the step.
        """
        for key, value in metrics.items():
            self._sums.setdefault(key, []).append(value)
        self._tokens += tokens
        for part in work:
            cost = self.costs.get(part.engine.role)
            own = sum(map(num_tokens, part.micro_batches))
            for batch in part.micro_batches:
                self._fill = [a + b for a, b in zip(self._fill, filling(batch), strict=True)]
            if cost is not None and own:
                for batch in part.micro_batches:
                    self._flops += tokens / own * cost(batch, causal_half=False)
                    self._causal_flops += tokens / own * cost(batch, causal_half=True)
        self._seconds += seconds
        self._steps += 1

    def flush(self) -> dict[str, float]:
        """Return the means since the last flush, with throughput."""
        out = {k: sum(v) / len(v) for k, v in self._sums.items()}
        seconds = self._seconds or math.inf
        out["perf/tokens_per_s"] = self._tokens / seconds
        out["perf/step_s"] = self._seconds / max(1, self._steps)
        if self._tokens and self._flops:
            out["perf/flops_per_token"] = self._flops / self._tokens
            out["perf/flops_per_token_causal"] = self._causal_flops / self._tokens
            if self.peak_flops_per_s:
                available = self.peak_flops_per_s * seconds
                out["perf/mfu"] = self._flops / available
                out["perf/mfu_causal"] = self._causal_flops / available
            if self.measured_flops_per_s:
                reached = self.measured_flops_per_s * seconds
                out["perf/measured_peak_share"] = self._flops / reached
        places, filled, rows, documents = self._fill
        if places:
            out["data/padding_waste"] = 1 - filled / places
            out["data/packing_efficiency"] = filled / places
            out["data/documents_per_row"] = documents / rows
        out["mem/peak_gib"] = peak_memory_gib()
        self._clear()
        return {k: v for k, v in out.items() if not (isinstance(v, float) and math.isnan(v))}

    def state(self) -> dict[str, Any]:
        """Return the collected numbers as JSON; times start anew after a resume."""
        return {
            "sums": self._sums,
            "steps": self._steps,
            "tokens": self._tokens,
            "flops": [self._flops, self._causal_flops],
            "fill": self._fill,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self._sums = {k: list(v) for k, v in state["sums"].items()}
        self._steps, self._tokens = state["steps"], state["tokens"]
        self._flops, self._causal_flops = state.get("flops", (0.0, 0.0))
        self._fill = list(state.get("fill", (0, 0, 0, 0)))

    def _clear(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._tokens, self._seconds, self._steps = 0, 0.0, 0
        self._flops = self._causal_flops = 0.0
        self._fill = [0, 0, 0, 0]


def peak_memory_gib() -> float:
    """Return the peak memory so far: of the CUDA device if one is in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

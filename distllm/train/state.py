"""Everything that resumes: engines, position in the data, random generators, meters, offsets of the logs.

A checkpoint holds one safetensors file per trained engine, one for the source's tensors, one for the generators, and
JSON for the rest. Ten steps equal five, a stop, a resume and five more, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distllm.engines.base import Engine
from distllm.train.checkpoint import Checkpoints
from distllm.train.loop import Loop
from distllm.train.rng import rng_state, set_rng_state


@dataclass(slots=True)
class RunState:
    """Turns a loop into a checkpoint and back."""

    checkpoints: Checkpoints
    engines: Mapping[str, Engine]
    """The trained engines, by role."""
    tracker_state: Callable[[], dict[str, Any]]
    notes: dict[str, Any]
    """JSON that the stage keeps, such as the metrics before training."""

    def save(self, loop: Loop) -> None:
        """Write a checkpoint of the loop as it stands between two steps."""
        source_tensors, source_state = loop.source.state()
        tensors = {role: engine.state() for role, engine in self.engines.items()}
        tensors["rng"] = rng_state()
        if source_tensors:
            tensors["source"] = source_tensors
        state = {
            "step": loop.step,
            "num_skipped": loop.num_skipped,
            "data_position": loop.source.ledger.state(),
            "source": source_state,
            "meters": loop.meters.state(),
            "tracker": self.tracker_state(),
            "notes": self.notes,
        }
        self.checkpoints.save(loop.step, tensors, state)

    def restore(self, loop: Loop) -> dict[str, Any] | None:
        """Load the newest good checkpoint into the loop; return the tracker's state, or None without a checkpoint."""
        found = self.checkpoints.latest()
        if found is None:
            return None
        for role, engine in self.engines.items():
            engine.load_state(found.tensors(role))
        state = found.state
        source_tensors = found.tensors("source") if "source" in found.stems else {}
        loop.source.load_state(source_tensors, state["source"])
        loop.step, loop.num_skipped = state["step"], state["num_skipped"]
        loop.meters.load_state(state["meters"])
        self.notes.clear()
        self.notes.update(state["notes"])
        set_rng_state(found.tensors("rng"))
        return state["tracker"]

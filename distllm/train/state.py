"""Everything that resumes: engines, position in the data, random generators, meters, offsets of the logs.

A checkpoint holds the tensors of each trained engine, of the source and of each rank's generators, and JSON for the rest.
Ten steps equal five, a stop, a resume and five more, bit for bit. Engine and number of ranks may change in between: then
only the generators start anew (dropout draws other noise).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from distllm.engines import collectives
from distllm.engines.base import Engine
from distllm.engines.processes import phase
from distllm.errors import CheckpointError
from distllm.generation.noise import derive_seed
from distllm.train.checkpoint import Checkpoints, Loaded
from distllm.train.loop import Loop
from distllm.train.rng import rng_state, seed_all, set_rng_state
from distllm.train.tensor_files import Named

_log = logging.getLogger("distllm")


@dataclass(slots=True)
class RunState:
    """Turns a loop into a checkpoint and back. All ranks call both methods."""

    checkpoints: Checkpoints
    engines: Mapping[str, Engine]
    """The trained engines, by role."""
    tracker_state: Callable[[], dict[str, Any]]
    notes: dict[str, Any]
    """JSON that the stage keeps, such as the metrics before training."""
    origin: dict[str, str]
    """Hashes of what the run rests on, by name; `code` may change on the way, the rest should not."""
    allow_other_data: bool = False
    """Whether the rest may change too."""
    seed: int = 0
    """Of the run; seeds the generators where no saved state fits."""

    def save(self, loop: Loop) -> None:
        """Write a checkpoint of the loop as it stands between two steps."""
        with phase("save"):
            self._save(loop)

    def _save(self, loop: Loop) -> None:
        source_tensors, source_state = loop.source.state()
        tensors: dict[str, Named] = {role: engine.state() for role, engine in self.engines.items()}
        generators = enumerate(collectives.gather_tensors(rng_state()))
        tensors["rng"] = {f"rank_{r}/{k}": v for r, part in generators for k, v in part.items()}
        if source_tensors:
            tensors["source"] = source_tensors
        state = {
            "step": loop.step,
            "num_skipped": loop.num_skipped,
            "num_rollbacks": loop.num_rollbacks,
            "data_position": loop.source.ledger.state(),
            "source": source_state,
            "meters": loop.meters.state(),
            "tracker": self.tracker_state(),
            "notes": self.notes,
            "origin": self.origin,
        }
        self.checkpoints.save(loop.step, tensors, state, self._world())

    def restore(self, loop: Loop) -> dict[str, Any] | None:
        """Load the newest good checkpoint into the loop; return the tracker's state, or None without a checkpoint.

        Raises:
            CheckpointError: it rests on other data, or on another tokenizer.
        """
        with phase("load"):
            found = self.checkpoints.latest()
            if found is None:
                return None
            self._compare(found)
            for role, engine in self.engines.items():
                engine.load_state(found.tensors(role))
        state = found.state
        source_tensors = found.tensors("source") if "source" in found.stems else {}
        loop.source.load_state(source_tensors, state["source"])
        loop.step, loop.num_skipped = state["step"], state["num_skipped"]
        loop.num_rollbacks = state.get("num_rollbacks", 0)
        loop.meters.load_state(state["meters"])
        self.notes.clear()
        self.notes.update(state["notes"])
        saved_world = {k: found.manifest["world"].get(k) for k in self._world()}
        if saved_world == self._world():
            prefix = f"rank_{collectives.rank()}/"
            generators = found.tensors("rng")
            set_rng_state(
                {k[len(prefix) :]: generators[k] for k in generators if k.startswith(prefix)}
            )
        else:
            seed_all(derive_seed(self.seed, loop.step), collectives.rank())
        return state["tracker"]

    def _compare(self, found: Loaded) -> None:
        """Say what the run rests on now that it did not when the checkpoint was written."""
        there = found.state.get("origin", {})  # older checkpoints have none
        changed = {k: v for k, v in self.origin.items() if there.get(k, v) != v}
        if changed.pop("code", None):
            _log.warning(
                "%s was written by other code: what follows may differ from what that code would have done.",
                found.path,
            )
        if not changed:
            return
        listed = "\n".join(f"  {k}: {there[k]} there, {v} now" for k, v in changed.items())
        if not self.allow_other_data:
            raise CheckpointError(
                f"{found.path} rests on other data:\n{listed}\nRestore the data, set another run.dir, or set "
                "train.allow_other_data=true to go on with what there is now."
            )
        _log.warning("%s rests on other data, and goes on as allowed:\n%s", found.path, listed)

    def _world(self) -> dict[str, Any]:
        ranks = next(iter(self.engines.values())).ranks
        return {"world_size": ranks.world_size, "dp_size": ranks.dp_size, "tp_size": ranks.tp_size}

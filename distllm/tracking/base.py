"""What a tracker is, and how the trackers of a run are put together.

A tracker takes metrics and sample texts, and can be cut back to an earlier step when a run resumes.
The services live in their own files (`jsonl.py`, `wandb.py`, `tensorboard.py`); plots are made from the
written files by `report.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from distllm import registry
from distllm.tracking.options import TrackingOptions


class Tracker(Protocol):
    """Receives what a run reports. All calls come from one thread of one process."""

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Record `metrics` of optimizer step `step`; steps never decrease between calls."""
        ...

    def sample(self, record: Mapping[str, Any]) -> None:
        """Record one sampled text: `step`, `stage`, `prompt`, `response`, `when`, and what else is known."""
        ...

    def state(self) -> dict[str, Any]:
        """Make everything recorded so far durable and return, as JSON, how to come back to this moment."""
        ...

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Forget everything recorded after `state` was taken, at `step`.

        Call it before the first `log`, and again where a run returns to a checkpoint. `restore({}, 0)` clears what a run that never saved left behind.
        """
        ...

    def close(self) -> None:
        """Finish within ten seconds. A second call does nothing."""
        ...


class MultiTracker:
    """Several trackers as one. Without any (ranks other than the main one) it does nothing."""

    def __init__(self, trackers: Mapping[str, Tracker]):
        self.trackers = dict(trackers)

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Pass `metrics` on to every tracker."""
        for tracker in self.trackers.values():
            tracker.log(step, metrics)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Pass `record` on to every tracker."""
        for tracker in self.trackers.values():
            tracker.sample(record)

    def state(self) -> dict[str, Any]:
        """Return the state of every tracker under its name."""
        return {name: tracker.state() for name, tracker in self.trackers.items()}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Cut every tracker back; one that was not part of the run before gets an empty state."""
        for name, tracker in self.trackers.items():
            tracker.restore(state.get(name, {}), step)

    def close(self) -> None:
        """Close every tracker, in reverse, even if one fails."""
        errors = []
        for tracker in reversed(self.trackers.values()):
            try:
                tracker.close()
            except Exception as error:  # the others still have to be closed
                errors.append(error)
        if errors:
            raise errors[0]


def make_trackers(
    options: TrackingOptions, run_dir: Path, is_main: bool, config_dict: Mapping[str, Any]
) -> Tracker:
    """Build what `options` asks for: the JSON lines always, first, and one service beside them.

    Args:
        options: which service.
        run_dir: the run directory; everything local is written below it.
        is_main: whether this process writes shared files; the others get a tracker that does nothing.
        config_dict: the resolved config as plain data, shown by services that have a place for it.

    Raises:
        ConfigError: `options.name` is unknown or its package is not installed.
    """
    wanted: Sequence[str] = list(dict.fromkeys(["jsonl", options.name]))
    classes = {name: registry.get("tracking", name) for name in wanted}
    if not is_main:
        return MultiTracker({})
    built = {  # services first: they check that they are installed, before any file is touched
        name: cls(options, Path(run_dir), config_dict) for name, cls in reversed(classes.items())
    }
    return MultiTracker({name: built[name] for name in wanted})

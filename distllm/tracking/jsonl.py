"""The two files every run writes: `metrics.jsonl` and `samples.jsonl`, one JSON object a line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distllm.registry import register
from distllm.tracking.lines import AppendOnlyFile
from distllm.tracking.options import TrackingOptions


@register("tracking")
class JsonlTracker:
    """Appends to the two files; every line is handed to the operating system at once."""

    Options = TrackingOptions

    def __init__(self, options: TrackingOptions, run_dir: Path, config_dict: Mapping[str, Any]):
        self.metrics = AppendOnlyFile(run_dir / "metrics.jsonl")
        self.samples = AppendOnlyFile(run_dir / "samples.jsonl")

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Append one object with `step` first."""
        self.metrics.append({"step": step, **metrics})

    def sample(self, record: Mapping[str, Any]) -> None:
        """Append `record`."""
        self.samples.append(record)

    def state(self) -> dict[str, Any]:
        """Sync both files to the disk and return their lengths in bytes."""
        return {"metrics_bytes": self.metrics.sync(), "samples_bytes": self.samples.sync()}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Cut both files back to the lengths in `state`; without any, to nothing."""
        self.metrics.cut(state.get("metrics_bytes", 0))
        self.samples.cut(state.get("samples_bytes", 0))

    def close(self) -> None:
        """Sync and close both files."""
        self.metrics.close()
        self.samples.close()

"""TensorBoard: event files below `run_dir/tensorboard`, written through `torch.utils.tensorboard`."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distllm.errors import ConfigError
from distllm.registry import register
from distllm.tracking.lines import numbers
from distllm.tracking.options import TrackingOptions


@register("tracking")
class TensorboardTracker:
    """Writes scalars and sample texts; the event file is opened at the first call."""

    Options = TrackingOptions

    def __init__(self, options: TrackingOptions, run_dir: Path, config_dict: Mapping[str, Any]):
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracking=tensorboard needs the package tensorboard, which is not installed. "
                "Type: pip install tensorboard, or set tracking=jsonl."
            )
        self.folder = run_dir / "tensorboard"
        self._purge_step: int | None = None
        self._opened: Any = None

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Write the numbers among `metrics`."""
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Write `record` as a text under its stage, indented so that it is shown as it is."""
        text = "\n\n".join(f"{key}:\n\n{_verbatim(value)}" for key, value in record.items())
        name = f"samples/{record.get('stage', '')}/{record.get('when', 'train')}"
        self._writer.add_text(name, text, int(record.get("step", 0)))

    def state(self) -> dict[str, Any]:
        """Flush. Nothing needs to be remembered: the step alone says where to cut."""
        if self._opened is not None:
            self._opened.flush()
        return {}

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Have TensorBoard hide everything after `step`."""
        self.close()
        self._purge_step = step + 1 if step else 0

    def close(self) -> None:
        """Flush and close."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    @property
    def _writer(self) -> Any:
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        return self._opened


def _verbatim(value: Any) -> str:
    """Indent by four, which Markdown shows as code."""
    return "\n".join(f"    {line}" for line in str(value).split("\n"))

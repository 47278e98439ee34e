"""The two files every run writes: `metrics.jsonl` and `samples.jsonl`, one JSON object a line.

Floats are written so that they read back bit for bit. JSON has no word for what is not finite: it is written
as the strings "NaN", "Infinity" and "-Infinity", which Python's `float` understands.
"""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distllm.errors import EngineError
from distllm.registry import register
from distllm.tracking.options import TrackingOptions

logger = logging.getLogger("distllm")


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


class AppendOnlyFile:
    """A file of JSON lines that survives being killed: a line that was cut short is dropped on opening."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one write a line, so that a kill loses nothing and `tail -f` follows.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self._drop_torn_line()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line.

        Raises:
            EngineError: the disk is full or not writable any more.
        """
        line = to_json(record) + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError as error:
            raise EngineError(
                f"Cannot write {len(line)} bytes to {self.path}: {error.strerror}. "
                "Make room and start again with the same run.dir to resume from the last checkpoint."
            ) from error

    def sync(self) -> int:
        """Make the file durable and return its length in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def cut(self, length: int) -> None:
        """Shorten the file to `length` bytes. A file that is shorter already lost lines: say so, keep the rest."""
        size = os.fstat(self._file.fileno()).st_size
        if size < length:
            logger.warning(
                "%s holds %d bytes, but held %d at the last checkpoint: lines are missing.",
                self.path, size, length,
            )  # fmt: skip
        else:
            self._file.truncate(length)
        self._drop_torn_line()
        self.sync()

    def close(self) -> None:
        """Sync and close; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _drop_torn_line(self) -> None:
        """Remove what follows the last newline."""
        size = os.fstat(self._file.fileno()).st_size
        with open(self.path, "rb") as file:
            end, chunk = size, 1 << 16
            while end > 0:
                start = max(0, end - chunk)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
        if end < size:
            self._file.truncate(end)


def to_json(record: Mapping[str, Any]) -> bytes:
    """Encode `record` as one line of strict JSON in UTF-8."""
    plain = _plain(record)
    try:
        return json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8 form, but an escape
        return json.dumps(plain, allow_nan=False).encode()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines; a missing file has none, damaged lines are passed over."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:  # bytes are split at newlines only, never at U+2028 and its like
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _plain(value: Any) -> Any:
    """Turn mappings, sequences, scalars of any library and non-finite floats into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if not isinstance(value, float) and hasattr(value, "item"):  # a scalar of torch or numpy
        return _plain(value.item())
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return str(value)

"""Files of JSON lines: appending so that a kill loses nothing, cutting back, and reading. No torch in here.

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

logger = logging.getLogger("distllm")

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


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


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what is a number among `metrics`, without `step`; texts, lists and absent values are left out."""
    found = {}
    for name, value in metrics.items():
        spelled = isinstance(value, str) and value in NOT_FINITE
        if name != "step" and (spelled or hasattr(value, "__float__")):
            found[name] = float(value)
    return found


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

"""What a worker tells whoever started it: that it can be asked to stop, and why it failed.

Under the files of `launch/` that is the supervisor (`cli/supervise.py`), told through small files in a private
directory; under bare torchrun it is torchrun, whose summary shows what stands in its error file. Without either,
nothing is written. Signals themselves are the business of `signals.py`.
"""

import atexit
import contextlib
import json
import os
import time
import traceback
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = "DISTLLM_SUPERVISOR_DIR"
"""Environment variable: where the supervisor reads what workers write."""
PID = "DISTLLM_SUPERVISOR_PID"
"""Environment variable: the supervisor's process."""

_TORCHELASTIC_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable of torchrun: where it looks for a worker's error."""


@dataclass(kw_only=True, slots=True)
class Failure:
    """Why a worker ended."""

    rank: int
    code: int
    """Its exit code."""
    text: str
    """What the user is to read: a message, or a traceback where it is a defect."""
    at_s: float
    """Clock time."""
    is_cause: bool = True
    """False: it only follows from what happened to another rank."""
    is_told: bool = True
    """The worker told so itself; False: it was found dead."""


def rank() -> int:
    """Return this process's rank as its launcher gave it; 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def supervisor_pid() -> int | None:
    """Return the supervisor's process id, if there is one on this machine."""
    is_here = Path(os.environ.get(DIRECTORY) or "/nowhere").is_dir()
    return int(os.environ[PID]) if is_here and PID in os.environ else None


def enlist() -> None:
    """Tell the supervisor that this process is a worker, and at its exit that it left by itself. Call first of all."""
    _write("worker", {"rank": rank()})
    atexit.register(_write, "left", {})


def announce_ready() -> None:
    """Tell the supervisor that this process saves when it gets a signal. Call when the handlers stand."""
    _write("ready", {})


def report_failure(
    error: BaseException, code: int, message: str = "", *, is_cause: bool = True
) -> None:
    """Leave word of why this worker ends: `message`, or the traceback of `error`."""
    text = message or "".join(traceback.format_exception(error)).rstrip()
    failure = Failure(rank=rank(), code=code, text=text, at_s=time.time(), is_cause=is_cause)
    _write("failure", asdict(failure))
    path = os.environ.get(_TORCHELASTIC_ERROR_FILE)
    if path and is_cause:
        extra = {"py_callstack": text, "timestamp": str(int(failure.at_s))}
        record = {"message": message or f"{type(error).__name__}: {error}", "extraInfo": extra}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": record}), encoding="utf-8")


def enlisted(folder: Path, known: Container[int] = ()) -> Iterator[tuple[int, int]]:
    """Yield (process id, rank) of workers that are not among the `known`, in the order of their coming."""
    for path in sorted(folder.glob("*.worker"), key=lambda p: p.stat().st_mtime_ns):
        if int(path.stem) not in known:
            yield int(path.stem), json.loads(path.read_text())["rank"]


def is_ready(folder: Path, pid: int) -> bool:
    """Tell whether a worker can be asked to stop."""
    return (folder / f"{pid}.ready").exists()


def left_by_itself(folder: Path, pid: int) -> bool:
    """Tell whether a worker that has ended did so in good order, with an error or without: it was not killed."""
    return (folder / f"{pid}.left").exists()


def read_failure(folder: Path, pid: int) -> Failure | None:
    """Read what a worker left when it failed; None if it left nothing."""
    path = folder / f"{pid}.failure"
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _write(kind: str, record: dict) -> None:
    """Put a record where the supervisor finds it whole or not at all; a full disk is no reason to fail."""
    folder = os.environ.get(DIRECTORY)
    if not folder:
        return
    path = Path(folder) / f"{os.getpid()}.{kind}"
    aside = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        aside.write_text(json.dumps(record), encoding="utf-8")
        aside.rename(path)

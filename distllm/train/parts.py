"""How ranks that write a checkpoint in the background tell rank 0 that their files are complete: by small files beside them.

Their threads must not take part in collectives, which belong to training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distllm.errors import CheckpointError
from distllm.train.files import atomic_write_json

_POLL_S = 0.05


def hand_in(folder: Path, rank: int, write: Callable[[], dict[str, Any]]) -> None:
    """Call `write` and leave what it returns, or its error, for `collect_parts`."""
    try:
        part = {"files": write()}
    except Exception as error:
        atomic_write_json(_path(folder, rank), {"error": str(error)})
        raise
    atomic_write_json(_path(folder, rank), part)


def collect_parts(folder: Path, num_ranks: int, wait_s: float) -> dict[str, Any]:
    """Wait for all ranks; return the files they wrote, and remove their messages.

    Raises:
        CheckpointError: a rank failed, or said nothing in `wait_s` seconds.
    """
    files: dict[str, Any] = {}
    deadline = time.monotonic() + wait_s
    for rank in range(num_ranks):
        path = _path(folder, rank)
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"Checkpoint {folder}: rank {rank} did not finish writing in {wait_s:g} s. Earlier checkpoints "
                    "are untouched. Look at its log; raise engine.long_timeout_s if its disk is slow."
                )
            time.sleep(_POLL_S)
        part = json.loads(path.read_text(encoding="utf-8"))
        if "error" in part:
            raise CheckpointError(f"Rank {rank}: {part['error']}")
        files |= part["files"]
        path.unlink()
    return files


def _path(folder: Path, rank: int) -> Path:
    return folder / f"part_{rank}.json"

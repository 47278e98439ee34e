"""Writes that survive a kill and a power cut, and the switch by which tests kill us in the middle of one.

Every durable write goes aside first, is fsynced, renamed into place, and the folder is fsynced after.
What is written lives elsewhere: `checkpoint.py`, `run_dir.py`.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

_log = logging.getLogger("distllm")

CHUNK_BYTES = 8 * 2**20
"""Bytes handed to the kernel and to the hash at a time."""

_hits: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Kill this process with SIGKILL if DISTLLM_TEST_FAULT asks for it here; otherwise do nothing.

    The variable holds `NAME`, or `NAME@N` for the N-th time that the point is passed; DISTLLM_TEST_FAULT_RANK says
    on which rank (0 by default).
    """
    wanted = os.environ.get("DISTLLM_TEST_FAULT")
    if not wanted or os.environ.get("RANK", "0") != os.environ.get("DISTLLM_TEST_FAULT_RANK", "0"):
        return
    point, _, nth = wanted.partition("@")
    if point != name:
        return
    _hits[name] = _hits.get(name, 0) + 1
    if _hits[name] == int(nth or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def write_file(path: Path, *parts: bytes | memoryview, midway: str = "") -> str:
    """Create `path` with `parts` one after the other, fsync it, and return the SHA-256 of the bytes in hex.

    `midway` names a fault point passed when about half of the bytes are written.
    """
    digest = hashlib.sha256()
    total = sum(len(part) for part in parts)
    middle, written = total // 2, 0
    chunk_bytes = max(1, min(CHUNK_BYTES, (total + 1) // 2))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), chunk_bytes):
                chunk = view[start : start + chunk_bytes]
                digest.update(chunk)
                before, written = written, written + len(chunk)
                while chunk:
                    chunk = chunk[os.write(fd, chunk) :]
                if midway and before < middle <= written:
                    fault_point(midway)
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_dir(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(path: Path) -> None:
    """Make a folder and those above it that are missing, each durable in the one above."""
    missing = [p for p in [path, *path.parents] if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_dir(made.parent)


def free_bytes(path: Path) -> int:
    """Return how many bytes an ordinary user can still write on the disk that holds `path`."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def atomic_write_text(path: Path, text: str) -> None:
    """Replace `path` with `text`: a reader, a kill or a power cut sees the old file or the new one."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        aside.unlink(missing_ok=True)
        write_file(aside, text.encode())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def atomic_write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON. See `atomic_write_text`."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; fine if it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_quietly(path: Path) -> None:
    """Delete it; where that fails, say so and go on."""
    try:
        remove(path)
    except OSError as error:
        _log.warning("Could not remove %s: %s", path, error)

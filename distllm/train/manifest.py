"""What a checkpoint folder claims to hold, and whether it does: `manifest.json` and its verification.

The manifest lists every other file with its size and SHA-256, and carries its own digest. It is encoded in
one way only, so a flipped bit that JSON would read as the same value is found too.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distllm.errors import CheckpointError
from distllm.train.files import hash_file

FORMAT = 1
"""Version of the layout; raised when an older reader could misread it."""

SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_MANIFEST_LIMIT_BYTES = 64 * 2**20


class Damaged(CheckpointError):
    """One file of a checkpoint is not what was written."""


def verify(path: Path) -> dict[str, Any]:
    """Check size and SHA-256 of every file of the checkpoint at `path`; return its manifest.

    Raises:
        CheckpointError: a file is missing or differs (the message names it), or the format is newer.
    """
    manifest_path = path / "manifest.json"
    manifest = _read_manifest(manifest_path)
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{manifest_path} has format {manifest['format']}; this distllm reads up to {FORMAT}. "
            "Use the version that wrote it, or a newer one."
        )
    if path.name != f"step_{manifest['step']:08d}":
        raise Damaged(f"{manifest_path}: belongs to step {manifest['step']}")
    for name, written in manifest["files"].items():
        file = path / name
        if not SAFE_NAME.fullmatch(name) or file.is_symlink():
            raise Damaged(f"{file}: not a plain file of this checkpoint")
        try:
            size = file.stat().st_size
            if size != written["bytes"]:
                raise Damaged(f"{file}: has {size} bytes, {written['bytes']} were written")
            if hash_file(file) != written["sha256"]:
                raise Damaged(f"{file}: SHA-256 differs from the one written")
        except OSError as error:
            raise Damaged(f"{file}: {error.strerror or error}") from error
    return manifest


def same_checkpoint(there: Path, new: Path) -> bool:
    try:
        verify(there)
    except CheckpointError:
        return False
    return (there / "manifest.json").read_bytes() == (new / "manifest.json").read_bytes()


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """Encode a manifest together with the SHA-256 of its encoding without that field."""
    digest = hashlib.sha256(encode(manifest)).hexdigest()
    return encode({**manifest, "sha256": digest})


def encode(value: Any) -> bytes:
    """Encode as JSON in one way only: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def checked_json(value: Any, where: str) -> Any:
    """Return `value`; refuse what JSON would change on the way without a word."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON would turn it into a string")
            checked_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            checked_json(item, f"{where}[{index}]")
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON does not keep")
    return value


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or path.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise Damaged(f"{path}: not a manifest")
        raw = path.read_bytes()
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror or error}") from error
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = raw == sealed(body)
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise Damaged(f"{path}: does not match its own SHA-256")
    return manifest

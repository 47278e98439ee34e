"""Checkpoints on disk: written aside and renamed, verified before anything is read, a few kept.

One folder a step: `<stem>.safetensors` (tensors by name), `state.json` (everything else), and
`manifest.json`, written last, with the size and SHA-256 of the others and of itself. No pickle is
written or read. What goes into a checkpoint is decided in `state.py`.

Names beginning with a dot are not checkpoints: `.step_N.tmp` is being written, `.step_N.old` is being
replaced, `.step_N.trash` is being deleted.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from distllm.errors import CheckpointError, ConfigError
from distllm.train.files import fault_point, free_bytes, hash_file, remove, sync_dir, write_file

FORMAT = 1
"""Version of the layout; raised when an older reader could misread it."""

_STEP_DIR = re.compile(r"step_(\d{8,})")
_DEBRIS = re.compile(r"\.(step_\d{8,})\.(tmp|old|trash)")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_MANIFEST_LIMIT_BYTES = 64 * 2**20

_log = logging.getLogger("distllm")


class Loaded:
    """A verified checkpoint. Tensors are read when asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = json.loads((path / "state.json").read_bytes())

    @property
    def stems(self) -> list[str]:
        """Names under which tensors were saved, sorted."""
        suffix = ".safetensors"
        return sorted(f.removesuffix(suffix) for f in self.manifest["files"] if f.endswith(suffix))

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """Read the tensors saved under `stem`, on the CPU.

        Raises:
            CheckpointError: the checkpoint has no such stem.
        """
        if stem not in self.stems:
            has = ", ".join(self.stems) or "none"
            raise CheckpointError(f"{self.path} holds no tensors named {stem}; it has {has}.")
        return safetensors.torch.load_file(self.path / f"{stem}.safetensors")


class Checkpoints:
    """The checkpoints of one run, in `folder`. Only the process that holds the run's lock writes."""

    def __init__(self, folder: Path | str, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ConfigError(
                f"train.keep_last={keep_last} would keep no checkpoint. Set 1 or more."
            )
        self.folder = Path(folder)
        self.keep_last = keep_last

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        world: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint, then delete those beyond `keep_last` and those of later steps.

        Later steps can only be damaged ones that `latest` passed over. Saving what is there already
        changes nothing. While a stem is written, its bytes are held in memory once more.

        Args:
            step: Steps done so far.
            tensors: File stem -> tensors by name.
            state: JSON: string keys, no tuples. Its `data_position`, if any, is shown in the manifest.
            world: How the tensors are laid out over processes; one process holds all by default.

        Raises:
            CheckpointError: the disk is full or refuses; earlier checkpoints are untouched.
        """
        path = self.folder / f"step_{step:08d}"
        aside = self.folder / f".{path.name}.tmp"
        state_text = _encode(_checked_json(state, "state"))
        needed_bytes = _estimate_bytes(tensors, state_text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(aside)
            free = free_bytes(self.folder)
            if needed_bytes > free:
                raise CheckpointError(_no_space(path, needed_bytes, free))
            fault_point("checkpoint:before_write")
            aside.mkdir()
            manifest = {
                "format": FORMAT,
                "step": step,
                "world": dict(world or {"world_size": 1}),
                "data_position": state.get("data_position"),
                "files": _write_files(aside, tensors, state_text),
            }
            fault_point("checkpoint:before_manifest")
            write_file(aside / "manifest.json", _sealed(manifest))
            sync_dir(aside)
            fault_point("checkpoint:before_rename")
            self._put_in_place(aside, path)
            fault_point("checkpoint:after_rename")
        except OSError as error:
            _remove_quietly(aside)
            raise CheckpointError(_write_failed(path, needed_bytes, error)) from error
        except BaseException:
            _remove_quietly(aside)
            raise
        self._retire(step)
        return path

    def latest(self) -> Loaded | None:
        """Return the newest checkpoint whose every byte is as it was written; None if none was ever made.

        A damaged one is named in a warning and passed over. Call `clean` first.

        Raises:
            CheckpointError: there are checkpoints but all are damaged, or the newest needs newer code.
        """
        problems = []
        for path in reversed(self._paths()):
            try:
                found = Loaded(path, verify(path))
            except _Damaged as damage:
                problems.append(str(damage))
                _log.warning("Damaged checkpoint passed over: %s", damage)
                continue
            if problems:
                _log.warning("Going on from the earlier checkpoint %s.", found.path)
            return found
        if problems:
            tried = "\n".join(f"  {problem}" for problem in problems)
            raise CheckpointError(
                f"Every checkpoint in {self.folder} is damaged; tried:\n{tried}\n"
                f"Restore one from a copy, or start over with another run.dir."
            )
        return None

    def clean(self) -> None:
        """Remove what a killed process left half done. Call under the run's lock, before `latest`."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            debris = _DEBRIS.fullmatch(path.name)
            if debris is None:
                continue
            target = self.folder / debris[1]
            if debris[2] == "old" and not target.exists():
                os.rename(path, target)
                _log.warning("Put back %s: it was being replaced when the run was killed.", target)
            else:
                remove(path)
                _log.info("Removed %s, left by a killed run.", path)
        sync_dir(self.folder)

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _STEP_DIR.fullmatch(p.name)]
        return sorted(found, key=_step_of)

    def _put_in_place(self, aside: Path, path: Path) -> None:
        old = self.folder / f".{path.name}.old"
        if path.exists():
            if _same_checkpoint(path, aside):
                remove(aside)
                return
            remove(old)
            os.rename(path, old)
        os.rename(aside, path)
        sync_dir(self.folder)
        remove(old)

    def _retire(self, step: int) -> None:
        """Delete under another name, so that a kill never leaves half of something that looks whole."""
        paths = self._paths()
        kept = [p for p in paths if _step_of(p) <= step][-self.keep_last :]
        doomed = [p for p in paths if p not in kept]
        try:
            for path in doomed:
                trash = self.folder / f".{path.name}.trash"
                remove(trash)
                os.rename(path, trash)
                sync_dir(self.folder)
                (trash / "manifest.json").unlink(missing_ok=True)
                fault_point("checkpoint:mid_delete")
                remove(trash)
        except OSError as error:
            _log.warning("Could not delete an old checkpoint in %s: %s", self.folder, error)


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
        raise _Damaged(f"{manifest_path}: belongs to step {manifest['step']}")
    for name, written in manifest["files"].items():
        file = path / name
        if not _SAFE_NAME.fullmatch(name) or file.is_symlink():
            raise _Damaged(f"{file}: not a plain file of this checkpoint")
        try:
            size = file.stat().st_size
            if size != written["bytes"]:
                raise _Damaged(f"{file}: has {size} bytes, {written['bytes']} were written")
            if hash_file(file) != written["sha256"]:
                raise _Damaged(f"{file}: SHA-256 differs from the one written")
        except OSError as error:
            raise _Damaged(f"{file}: {error.strerror or error}") from error
    return manifest


class _Damaged(CheckpointError):
    """One file of a checkpoint is not what was written."""


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.is_symlink() or path.stat().st_size > _MANIFEST_LIMIT_BYTES:
            raise _Damaged(f"{path}: not a manifest")
        raw = path.read_bytes()
    except OSError as error:
        raise _Damaged(f"{path}: {error.strerror or error}") from error
    try:
        manifest = json.loads(raw)
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = raw == _sealed(body)
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise _Damaged(f"{path}: does not match its own SHA-256")
    return manifest


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """Encode a manifest together with the SHA-256 of its encoding without that field."""
    digest = hashlib.sha256(_encode(manifest)).hexdigest()
    return _encode({**manifest, "sha256": digest})


def _encode(value: Any) -> bytes:
    """Encode as JSON in one way only: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _write_files(
    aside: Path, tensors: Mapping[str, Mapping[str, Tensor]], state_text: bytes
) -> dict[str, dict[str, Any]]:
    files = {}
    for stem in sorted(tensors):
        if not _SAFE_NAME.fullmatch(stem):
            raise ValueError(f"{stem!r} is not usable as the stem of a file name")
        data = safetensors.torch.save(_owned(tensors[stem]))
        files[f"{stem}.safetensors"] = _write_one(aside / f"{stem}.safetensors", data)
    files["state.json"] = _write_one(aside / "state.json", state_text)
    return files


def _write_one(path: Path, data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": write_file(path, data, midway="checkpoint:mid_write")}


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are strided or share memory: safetensors refuses both."""
    owned: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        owned[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return owned


def _checked_json(value: Any, where: str) -> Any:
    """Return `value`; refuse what JSON would change on the way without a word."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}: JSON would turn it into a string")
            _checked_json(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _checked_json(item, f"{where}[{index}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{where} is a {type(value).__name__}, which JSON does not keep")
    return value


def _estimate_bytes(tensors: Mapping[str, Mapping[str, Tensor]], state_text: bytes) -> int:
    """Bound what a checkpoint takes on disk from above, headers and half-filled blocks included."""
    total = len(state_text) + 16384
    for group in tensors.values():
        total += 8192 + sum(t.nbytes + len(name) + 128 for name, t in group.items())
    return total


def _no_space(path: Path, needed_bytes: int, free: int) -> str:
    return (
        f"No room for checkpoint {path}: it needs {needed_bytes} bytes and the disk has {free} free. "
        "Free some space or lower train.keep_last, then start again to resume; "
        "earlier checkpoints are untouched."
    )


def _write_failed(path: Path, needed_bytes: int, error: OSError) -> str:
    try:
        free = str(free_bytes(path.parent))
    except OSError:
        free = "an unknown number"
    return (
        f"Could not write checkpoint {path}: {error.strerror or error} (it needs {needed_bytes} bytes, "
        f"the disk has {free} free). Earlier checkpoints are untouched: "
        "make room or repair the folder, then start again to resume."
    )


def _same_checkpoint(there: Path, new: Path) -> bool:
    try:
        verify(there)
    except CheckpointError:
        return False
    return (there / "manifest.json").read_bytes() == (new / "manifest.json").read_bytes()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _remove_quietly(path: Path) -> None:
    try:
        remove(path)
    except OSError as error:
        _log.warning("Could not remove %s: %s", path, error)

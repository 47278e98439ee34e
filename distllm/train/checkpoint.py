"""Checkpoints on disk: written aside and renamed, verified before anything is read, a few kept.

One folder a step: `<stem>.safetensors` (tensors by name), `state.json` (everything else), and
`manifest.json`, written last, with the size and SHA-256 of the others and of itself. Several ranks
divide the tensors of a stem, each whole and in one of the files `<stem>-RANK-of-SIZE.safetensors`, so
that any number of ranks can read them. No pickle is written or read. What goes into a checkpoint is
decided in `state.py`; `manifest.py` verifies; the tensor format is in `tensor_files.py`.

Names beginning with a dot are not checkpoints: `.step_N.tmp` is being written, `.step_N.old` is being
replaced, `.step_N.trash` is being deleted.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distllm.engines import collectives
from distllm.errors import CheckpointError, ConfigError
from distllm.train.background import Background
from distllm.train.files import (
    fault_point,
    free_bytes,
    make_dirs,
    remove,
    remove_quietly,
    sync_dir,
    write_file,
)
from distllm.train.manifest import (
    FORMAT,
    SAFE_NAME,
    Damaged,
    checked_json,
    encode,
    same_checkpoint,
    sealed,
    verify,
)
from distllm.train.parts import collect_parts, hand_in
from distllm.train.tensor_files import Named, StoredTensors, refuse_non_finite, share, write_tensors

_STEP_DIR = re.compile(r"step_(\d{8,})")
_DEBRIS = re.compile(r"\.(step_\d{8,})\.(tmp|old|trash)")
_TENSOR_FILE = re.compile(r"(?P<stem>.+?)(-\d{5,}-of-\d{5,})?\.safetensors")

_NO_FALLBACK = (
    "Restore it, or set train.checkpoint_fallback=true to go on from the checkpoint before."
)

_log = logging.getLogger("distllm")


class Loaded:
    """A verified checkpoint. Tensors are read when asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
        self._files: dict[str, list[Path]] = {}
        for name in sorted(manifest["files"]):
            found = _TENSOR_FILE.fullmatch(name)
            if found is not None:
                self._files.setdefault(found["stem"], []).append(path / name)

    @property
    def stems(self) -> list[str]:
        """Names under which tensors were saved, sorted."""
        return sorted(self._files)

    def tensors(self, stem: str) -> Mapping[str, Tensor]:
        """Open the tensors saved under `stem`; each is read, to the CPU, when it is looked up.

        Raises:
            CheckpointError: the checkpoint has no such stem.
        """
        if stem not in self._files:
            has = ", ".join(self.stems) or "none"
            raise CheckpointError(f"{self.path} holds no tensors named {stem}; it has {has}.")
        return StoredTensors(self._files[stem])


@dataclass(frozen=True, slots=True)
class _Draft:
    """One checkpoint on its way to the disk, as one rank sees it."""

    path: Path
    shares: Mapping[str, Mapping[str, Tensor]]
    """File name -> the tensors that this rank writes into it."""
    state_text: bytes
    manifest: dict[str, Any]
    needed_bytes: int
    """Over all ranks."""

    @property
    def aside(self) -> Path:
        """Where it grows."""
        return self.path.with_name(f".{self.path.name}.tmp")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what the disk says into an error for people."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(_write_failed(self.path, self.needed_bytes, error)) from error

    def write(self) -> dict[str, Any]:
        """Write this rank's files; return their sizes and digests. After an error none is left to fill the disk."""
        with self.explained():
            try:
                return {
                    name: write_tensors(self.aside / name, part, midway="checkpoint:mid_write")
                    for name, part in self.shares.items()
                }
            except OSError:
                for name in self.shares:
                    (self.aside / name).unlink(missing_ok=True)
                raise


class Checkpoints:
    """The checkpoints of one run, in `folder`, which all ranks see. All ranks call each method; rank 0 has the lock."""

    def __init__(
        self,
        folder: Path | str,
        keep_last: int = 2,
        background: bool = False,
        wait_s: float = 1800,
        fallback: bool = True,
    ) -> None:
        """Keep the newest `keep_last` checkpoints of `folder`.

        Args:
            folder: made when the first one is written.
            keep_last: at least 1.
            background: `save` returns as soon as the tensors are copied; files are written while training goes on.
            wait_s: how long a background save waits for the files of the other ranks.
            fallback: whether `latest` passes over a damaged checkpoint.
        """
        if keep_last < 1:
            raise ConfigError(
                f"train.keep_last={keep_last} would keep no checkpoint. Set 1 or more."
            )
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.wait_s = wait_s
        self.fallback = fallback
        self._runs_behind = background
        self._pending: Background | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Named],
        state: Mapping[str, Any],
        world: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint, then delete those beyond `keep_last` and those of later steps.

        Later steps can only be damaged ones that `latest` passed over. Saving what is there already
        changes nothing. A rank holds no more than the tensors that fall to it while it writes.

        Args:
            step: Steps done so far.
            tensors: File stem -> tensors by name; equal names in equal order on all ranks.
            state: JSON: string keys, no tuples. Its `data_position`, if any, is shown in the manifest.
            world: How the run was laid out over processes, for the manifest.

        Raises:
            EngineError: a weight is not finite.
            CheckpointError: the disk is full or refuses, now or, in the background, for the save before; earlier
                checkpoints are untouched.
        """
        self.wait()
        path = self.folder / f"step_{step:08d}"
        rank, size = collectives.rank(), collectives.world_size()
        state_text = encode(checked_json(state, "state"))
        shares = {
            _file_name(stem, rank, size): share(named, rank, size, copy=self._runs_behind)
            for stem, named in tensors.items()
        }
        collectives.together(lambda: refuse_non_finite(path, shares.values()))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world": dict(world or {"world_size": size}),
            "data_position": state.get("data_position"),
        }
        needed_bytes = sum(collectives.gather_json(_estimate_bytes(shares, state_text)))
        draft = _Draft(path, shares, state_text, manifest, needed_bytes)
        collectives.on_main(lambda: self._begin(draft))
        if self._runs_behind:
            self._pending = Background(lambda: self._write_behind(draft, rank, size))
            return path
        try:
            written = collectives.together(draft.write)
            files = {k: v for part in collectives.gather_json(written) for k, v in part.items()}
            collectives.on_main(lambda: self._finish(draft, files))
        except BaseException:
            if rank == 0:
                remove_quietly(draft.aside)
            raise
        return path

    @property
    def has_failed(self) -> bool:
        """True on a rank whose part of a save in the background failed; `wait` says why."""
        return self._pending is not None and self._pending.has_failed

    def wait(self) -> None:
        """Wait until a save in the background is complete. All ranks take part.

        Raises:
            CheckpointError: it failed; earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if self._runs_behind:
            collectives.together(lambda: pending.wait() if pending else None)

    def _write_behind(self, draft: _Draft, rank: int, size: int) -> None:
        """Write without a word to the other ranks, whose training collectives must not be disturbed: files tell."""
        try:
            hand_in(draft.aside, rank, draft.write)
            if rank == 0:
                self._finish(draft, collect_parts(draft.aside, size, self.wait_s))
        except BaseException:
            if rank == 0:
                remove_quietly(draft.aside)
            raise

    def _begin(self, draft: _Draft) -> None:
        with draft.explained():
            make_dirs(self.folder)
            remove(draft.aside)
            free = free_bytes(self.folder)
            if draft.needed_bytes > free:
                raise CheckpointError(_no_space(draft.path, draft.needed_bytes, free))
            fault_point("checkpoint:before_write")
            draft.aside.mkdir()

    def _finish(self, draft: _Draft, files: dict[str, Any]) -> None:
        aside = draft.aside
        with draft.explained():
            files["state.json"] = {
                "bytes": len(draft.state_text),
                "sha256": write_file(aside / "state.json", draft.state_text),
            }
            fault_point("checkpoint:before_manifest")
            write_file(aside / "manifest.json", sealed(draft.manifest | {"files": files}))
            sync_dir(aside)
            fault_point("checkpoint:before_rename")
            self._put_in_place(aside, draft.path)
            fault_point("checkpoint:after_rename")
            self._retire(draft.manifest["step"])

    def latest(self) -> Loaded | None:
        """Return the newest checkpoint whose every byte is as it was written; None if none was ever made.

        A damaged one is named in a warning and passed over. Call `clean` first.

        Raises:
            CheckpointError: all of them are damaged, or the newest is and there is no `fallback`, or needs newer code.
        """
        found = collectives.from_main(self._newest)
        if found is None:
            return None
        return Loaded(self.folder / found["name"], found["manifest"])

    def _newest(self) -> dict[str, Any] | None:
        problems = []
        for path in reversed(self._paths()):
            try:
                manifest = verify(path)
            except Damaged as damage:
                if not self.fallback:
                    raise CheckpointError(f"{damage}. {_NO_FALLBACK}") from damage
                problems.append(str(damage))
                _log.warning("Damaged checkpoint passed over: %s", damage)
                continue
            if problems:
                _log.warning("Going on from the earlier checkpoint %s.", path)
            return {"name": path.name, "manifest": manifest}
        if problems:
            tried = "\n".join(f"  {problem}" for problem in problems)
            raise CheckpointError(
                f"Every checkpoint in {self.folder} is damaged; tried:\n{tried}\n"
                f"Restore one from a copy, or start over with another run.dir."
            )
        return None

    def clean(self) -> None:
        """Remove what a killed process left half done. Call under the run's lock, before `latest`."""
        collectives.on_main(self._clean)

    def _clean(self) -> None:
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
            if same_checkpoint(path, aside):
                remove(aside)
                return
            remove(old)
            os.rename(path, old)
            fault_point("checkpoint:mid_replace")
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


def _file_name(stem: str, rank: int, size: int) -> str:
    found = _TENSOR_FILE.fullmatch(f"{stem}.safetensors")
    if not SAFE_NAME.fullmatch(stem) or found is None or found["stem"] != stem:
        raise ValueError(f"{stem!r} is not usable as the stem of a file name")
    return f"{stem}.safetensors" if size == 1 else f"{stem}-{rank:05d}-of-{size:05d}.safetensors"


def _estimate_bytes(shares: Mapping[str, Mapping[str, Tensor]], state_text: bytes) -> int:
    """Bound what a checkpoint takes on disk from above, headers and half-filled blocks included."""
    total = len(state_text) + 16384
    for part in shares.values():
        total += 8192 + sum(t.nbytes + len(name) + 128 for name, t in part.items())
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


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))

"""A run's directory: one process at a time, one configuration for life.

`lock` keeps a second start out; `claim` writes `config.yaml` at the first start and compares it at later
ones. Files inside are the business of those who write them: `checkpoint.py`, `tracking/`.
"""

import contextlib
import enum
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from distllm.errors import CheckpointError, EngineError
from distllm.train.files import atomic_write_text, make_dirs

_HEADER = "# distllm: resolved configuration of this run, compared when it is started again.\n"
_BEFORE_CLAIM = {".lock", ".config.yaml.tmp", "logs"}
"""What a start that was killed early may leave behind."""

_ABSENT = "(absent)"

_log = logging.getLogger("distllm")


class RunDir:
    """The directory of one run. Lock first, then claim, then write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def config_path(self) -> Path:
        """Where the resolved configuration is kept."""
        return self.path / "config.yaml"

    @contextlib.contextmanager
    def lock(self) -> Iterator["RunDir"]:
        """Hold the directory, made if need be, for this process alone.

        A kill -9 frees it at once: the kernel drops the lock on `.lock` with the process.

        Raises:
            EngineError: another live process holds it, or it cannot be written.
            CheckpointError: the path is taken by something that is not a run.
        """
        self._check_ours()
        file = self.path / ".lock"
        with self._writing():
            make_dirs(self.path)
            fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with self._writing():
                self._acquire(fd, file)
            # A forked child must not keep the lock alive after us.
            _held.add(fd)
            try:
                yield self
            finally:
                _held.discard(fd)
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)

    def claim(
        self,
        config: Mapping[str, Any],
        fields: Mapping[str, str],
        defaults: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make this the directory of `config`, or check that it is. Call under the lock.

        Fields marked `free` are brought up to date in `config.yaml`.

        Args:
            config: Nested plain mapping.
            fields: Dotted key -> `same` or `free`. A key that exists only in the file counts as `same`
                unless all fields beside it are free.
            defaults: Dotted key -> what a file without the key stands for: it may be older than the setting.

        Returns:
            True at the first start, False at a later one.

        Raises:
            CheckpointError: the directory holds other things, or a run whose `same` fields differ.
        """
        self._check_ours()
        new = _plain(config)
        text = _HEADER + yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=100)
        first = not self.config_path.exists()
        if not first:
            self._refuse_differences(self._read(), new, fields, _plain(defaults or {}))
        if first or self.config_path.read_text(encoding="utf-8") != text:
            with self._writing():
                atomic_write_text(self.config_path, text)
        return first

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EngineError(
                f"run.dir={self.path} cannot be written: {error.strerror or error}. "
                "Set run.dir to a folder that you may write to, on a disk with room."
            ) from error

    def _check_ours(self) -> None:
        if self.config_path.exists():
            with open(self.config_path, "rb") as file:
                ours = file.read(len(_HEADER)) == _HEADER.encode()
            reason = "its config.yaml was not written by distllm"
        elif self.path.is_dir():
            others = sorted(p.name for p in self.path.iterdir() if p.name not in _BEFORE_CLAIM)
            ours = not others
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            reason = f"it holds {', '.join(others[:3])}{more} but no config.yaml"
        else:
            ours = not self.path.exists()
            reason = "it is a file"
        if not ours:
            raise CheckpointError(
                f"run.dir={self.path} is not empty and not a run directory: {reason}. "
                "Nothing was written there. Set run.dir to a new or empty directory."
            )

    def _read(self) -> dict[str, Any]:
        try:
            value = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.config_path} cannot be read: {reason}. Restore it, or set another run.dir."
            ) from error
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.config_path} holds no mapping. Restore it, or set another run.dir."
            )
        return value

    def _refuse_differences(
        self,
        old: dict[str, Any],
        new: dict[str, Any],
        fields: Mapping[str, str],
        defaults: Mapping[str, Any],
    ) -> None:
        same = {key for key, mark in fields.items() if mark == "same"}
        same |= {key for key in _leaves(old) if not _covered(key, fields) and _bound(key, fields)}
        lines = []
        for key in sorted(same):
            was, now = _look_up(old, key), _look_up(new, key)
            meant = defaults.get(key, _ABSENT) if was == _ABSENT else was
            if _canonical(meant) != _canonical(now):
                lines.append(f"  {key}: {_shown(was)} there, {_shown(now)} now")
        if lines:
            listed = "\n".join(lines)
            raise CheckpointError(
                f"run.dir={self.path} belongs to a run with another configuration:\n{listed}\n"
                "Set another run.dir, or restore the value there."
            )

    def _acquire(self, fd: int, file: Path) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineError(_in_use(self.path, _read_holder(fd))) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL):
                raise
            _log.info("No kernel locks on %s: relying on the process id in it alone.", file)
        holder = _read_holder(fd)
        if holder:
            if holder.get("host") != socket.gethostname():
                raise EngineError(
                    f"{_in_use(self.path, holder)} If that process is gone, delete {file}."
                )
            if _alive(holder):
                raise EngineError(_in_use(self.path, holder))
            _log.info("Took over %s: process %s is gone.", file, holder.get("pid"))
        pid = os.getpid()
        mine = {"host": socket.gethostname(), "pid": pid, "started": _start_time(pid)}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(mine).encode() + b"\n", 0)
        os.fsync(fd)


_held: set[int] = set()


def _close_in_child() -> None:
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _read_holder(fd: int) -> dict[str, Any]:
    """Return who wrote the lock file; empty when it was released, torn, or is just being written."""
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _alive(holder: Mapping[str, Any]) -> bool:
    """Tell whether the very process that wrote the lock still runs, not another with its number."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # One that has ended stays in the table, a zombie, until its parent asks; in a container that may be never.
    return _start_time(pid) == holder.get("started") and not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat[stat.rindex(b")") + 2 :].split()[0] in (b"Z", b"X")


def _start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The command name, second of the fields, may itself hold spaces and brackets: count after it.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def _in_use(path: Path, holder: Mapping[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return f"run.dir={path} is in use by {who}. Wait for it, stop it, or set another run.dir."


def _plain(value: Any) -> Any:
    """Reduce to what YAML keeps: mappings, lists, strings, numbers, booleans, null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} has no place in a configuration")


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _covered(key: str, fields: Mapping[str, str]) -> bool:
    """Tell whether `key` or something it lies in is a field."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in fields for n in range(1, len(parts) + 1))


def _bound(key: str, fields: Mapping[str, str]) -> bool:
    """Tell whether any field in the innermost known group around `key` is marked `same`."""
    parts = key.split(".")
    for n in range(len(parts) - 1, 0, -1):
        group = ".".join(parts[:n]) + "."
        marks = {mark for field, mark in fields.items() if field.startswith(group)}
        if marks:
            return "same" in marks
    return True


def _look_up(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _canonical(value: Any) -> str:
    """Tell 1, 1.0 and true apart; call not-a-number equal to itself."""
    return json.dumps(value, sort_keys=True, default=str)


def _shown(value: Any) -> str:
    return value if value is _ABSENT else json.dumps(value, ensure_ascii=False, default=str)

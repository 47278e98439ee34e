"""Stopping on request, and children that do not outlive us.

SIGTERM, SIGINT and SIGUSR1 ask for one checkpoint at the next step boundary and exit code 3. Asked again
at least 2 s later, the process ends at once with 128 + the signal's number and saves nothing more.
"""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from distllm.train import supervision

STOPPED_EXIT_CODE = 3
"""Exit code after a clean save on request: start again to resume."""

GRACE_S = 2.0
"""Signals this soon after the first are copies of it (terminal, launcher and scheduler all forward)."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class StopFlag:
    """Turns signals into a flag that the loop reads between steps.

    Use as a context manager. Leaving it puts the earlier handlers back; after a stop it does so only when
    the copies of the signal are over, lest one of them spoil the exit code. Outside the main thread
    Python delivers no signals, so there the flag just stays down.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The first signal that arrived."""
        self._first_s = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self.signum is not None

    def __enter__(self) -> "StopFlag":
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._before[signum] = signal.signal(signum, self._handle)
            supervision.announce_ready()
        return self

    def __exit__(self, *_: object) -> None:
        if self.requested:
            for signum in self._before:
                signal.signal(signum, self._handle_late)
        else:
            self._put_back()

    def _put_back(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _is_copy(self) -> bool:
        return time.monotonic() - self._first_s < GRACE_S

    def _handle_late(self, signum: int, _frame: FrameType | None) -> None:
        if not self._is_copy():
            self._put_back()
            os.kill(os.getpid(), signum)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        name = signal.Signals(signum).name
        if self.signum is None:
            self.signum = signum
            self._first_s = time.monotonic()
            _tell(f"{name}: saving after this step, then stopping. Again after 2 s stops at once.")
        elif not self._is_copy():
            _tell(f"{name} again: stopping at once.")
            os._exit(128 + signum)


def die_with_parent(*, parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies. Call in the child; Linux only.

    For `subprocess`: `preexec_fn=functools.partial(die_with_parent, parent_pid=os.getpid())`. In a
    `multiprocessing` child the parent is known: call without arguments. Trap: the kernel counts the
    *thread* that started the child as the parent, so start children from a thread that stays.
    """
    if _libc is None:
        return
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    known_parent = multiprocessing.parent_process()
    if parent_pid is None and known_parent is not None:
        if os.getppid() != known_parent.pid:
            threading.Thread(target=_end_with, args=(known_parent,), daemon=True).start()
    elif parent_pid is not None and os.getppid() != parent_pid:
        # It died before the call above took effect: no signal comes any more.
        os._exit(128 + signal.SIGKILL)


def follow_launcher() -> None:
    """In a worker of a launcher, such as torchrun: end with it, however it ends. Elsewhere do nothing.

    The supervisor is told, and followed too: it may stand above a launcher that outlives it. Linux only.
    Call first of all.
    """
    supervision.enlist()
    if "LOCAL_RANK" in os.environ:
        die_with_parent(parent_pid=os.getppid())
    supervisor = supervision.supervisor_pid()
    if supervisor is not None and hasattr(os, "pidfd_open"):
        threading.Thread(target=_end_with_pid, args=(supervisor,), daemon=True).start()


def _end_with_pid(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it is gone already
        select.select([os.pidfd_open(pid)], [], [])
    os._exit(128 + signal.SIGKILL)


def _end_with(parent: Any) -> None:
    """Wait for a parent that is not the kernel's: it has died, or a fork server stands between."""
    parent.join()
    os._exit(128 + signal.SIGKILL)


def _tell(text: str) -> None:
    """Write to stderr without the buffers and locks that the interrupted code may hold."""
    show_cursor = "\x1b[?25h" if sys.stderr is not None and os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{show_cursor}distllm: {text}\n".encode())

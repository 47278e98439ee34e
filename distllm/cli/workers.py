"""The processes below a supervisor: which of them are workers, how each ended, and who failed first.

What to do about it is decided in `supervise.py`. Exit codes of processes that are not our children come from /proc,
read in the moment of their death (Linux; elsewhere a worker's own report has to do).
"""

import contextlib
import ctypes
import math
import os
import select
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from distllm.train.supervision import (
    Failure,
    enlisted,
    is_ready,
    left_by_itself,
    read_failure,
)

POLL_S = 0.05

_PR_SET_CHILD_SUBREAPER = 36
_PEERS_S = 5.0
"""Within this time, a rank that was killed is the cause of what its peers report: they report the loss of it. And what
a rank reports is the cause of an exit without a word: ranks end so that heard of it."""

_PATIENCE_S = 10.0
"""How long a worker may go on after another has failed. It hears of it in its next collective; what does not end then is
stopped or stuck, and launchers wait for it up to their whole time-out."""

_GONE_S = 10.0
"""How long to wait for killed processes: one inside a driver's call goes when that returns, if ever."""

_FATAL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL)


@dataclass(slots=True)
class Worker:
    """One rank's process."""

    rank: int
    pid: int
    pidfd: int | None
    """Becomes readable when the process dies; None if it is dead already, or where the system has none."""
    failure: Failure | None = None
    is_alive: bool = True
    is_told: bool = False
    """It got the signal to stop."""
    came_s: float = field(default_factory=time.monotonic)
    died_s: float = 0.0
    verdict: str = ""
    """Why it was ended, if it was ended here."""

    def tell(self, signum: int) -> None:
        """Send it a signal; through the pidfd, so that no later process of the same number gets it."""
        self.is_told = True
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd is None:
                os.kill(self.pid, signum)
            else:
                signal.pidfd_send_signal(self.pidfd, signum)


@dataclass(slots=True)
class Workers:
    """All workers that enlisted in `folder`, restarted ones included."""

    folder: Path
    by_pid: dict[int, Worker] = field(default_factory=dict)
    last_death_s: float = 0.0

    def watch(self) -> list[str]:
        """Take note of who came and who ended, waiting a moment; return lines that the user should read."""
        for pid, rank in enlisted(self.folder, known=self.by_pid):
            self.by_pid[pid] = Worker(rank, pid, _pidfd(pid))
        fds = {w.pidfd: w.pid for w in self.by_pid.values() if w.is_alive and w.pidfd is not None}
        died, _, _ = select.select(list(fds), [], [], POLL_S)
        codes = {fds[fd]: _exit_code(fds[fd]) for fd in died}
        lines = []
        for pid, worker in self.by_pid.items():
            if not worker.is_alive:
                continue
            if pid in codes or (worker.pidfd is None and not psutil.pid_exists(pid)):
                lines += self._take_leave(worker, codes.get(pid))
        return lines

    def tell_once(self, signum: int) -> int:
        """Send `signum` to each worker that can save and has not had it; return how many got it."""
        ready = [
            w
            for w in self.by_pid.values()
            if w.is_alive and not w.is_told and is_ready(self.folder, w.pid)
        ]
        for worker in ready:
            worker.tell(signum)
        return len(ready)

    def is_any_saving(self) -> bool:
        """Tell whether a worker that was asked to stop is still at it."""
        return any(w.is_told and w.is_alive for w in self.by_pid.values())

    def end_stuck(self) -> list[str]:
        """End workers that have outlived the failure of another one for long; return lines that the user should read."""
        began_s = min((w.died_s for w in self._failed()), default=math.inf)
        if time.monotonic() - began_s < _PATIENCE_S:
            return []
        lines = []
        for worker in self.by_pid.values():
            # One that came later was started again, and has nothing to do with the failure.
            if worker.is_alive and worker.came_s < began_s and not worker.verdict:
                worker.verdict = f"{_state(worker.pid)} and was ended"
                worker.tell(signal.SIGKILL)
                lines.append(
                    f"rank {worker.rank}: the process (pid {worker.pid}) {worker.verdict}."
                )
        return lines

    def failures(self) -> list[Failure]:
        """Return the failures that stand: none of a rank that was started again since."""
        return [w.failure for w in self._failed() if w.failure is not None]

    def _failed(self) -> list[Worker]:
        newest = {w.rank: w for w in self.by_pid.values()}  # in the order of their coming
        return [w for w in newest.values() if w.failure is not None]

    def silent_s(self) -> float:
        """Return for how long all workers have been gone, one of them at least in failure; 0 where it is not so."""
        if any(w.is_alive for w in self.by_pid.values()) or not self.failures():
            return 0.0
        return time.monotonic() - self.last_death_s

    def first_failure(self) -> Failure | None:
        """Return the failure that the others followed from."""

        def began_s(failure: Failure) -> float:
            if failure.is_told:
                return failure.at_s + (0 if failure.is_cause else _PEERS_S)
            return failure.at_s + (-_PEERS_S if -failure.code in _FATAL else 2 * _PEERS_S)

        return min(self.failures(), key=began_s, default=None)

    def descendants(self) -> list[psutil.Process]:
        """Return every process below this one that has not ended."""
        return [p for p in psutil.Process().children(recursive=True) if _is_alive(p)]

    def kill_all(self, launcher_pid: int) -> None:
        """End everything below this process, and what is left of the launcher's group; wait until it is gone."""
        with contextlib.suppress(OSError):
            os.killpg(launcher_pid, signal.SIGKILL)
        deadline = time.monotonic() + _GONE_S
        while (left := self.descendants()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(POLL_S)
        for worker in self.by_pid.values():
            if worker.pidfd is not None:
                os.close(worker.pidfd)
                worker.pidfd = None

    def _take_leave(self, worker: Worker, code: int | None) -> list[str]:
        worker.is_alive = False
        worker.died_s = self.last_death_s = time.monotonic()
        if worker.verdict:
            first_s = min((f.at_s for f in self.failures()), default=time.time())
            text = f"the process (pid {worker.pid}) {worker.verdict}."
            worker.failure = Failure(
                rank=worker.rank, code=-signal.SIGKILL, text=text, at_s=first_s, is_told=False
            )
            return []
        worker.failure = read_failure(self.folder, worker.pid)
        left = left_by_itself(self.folder, worker.pid)
        if worker.failure is not None or (left and not code):
            return []
        if left or (code is not None and code >= 0):
            how = f"exited with {code}"
        elif code is None:
            how = "died without a word (kill -9, or a crash in native code)"
        else:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (kill -9, or the kernel for want of memory)" if code == -signal.SIGKILL else ""
        text = f"the process (pid {worker.pid}) {how}."
        code = -signal.SIGKILL if code is None else code
        worker.failure = Failure(
            rank=worker.rank, code=code, text=text, at_s=time.time(), is_told=False
        )
        return [f"rank {worker.rank}: {text}"]


def adopt_orphans() -> None:
    """Make processes whose parent dies children of this one, so that none is lost. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury_orphans(launcher_pid: int) -> None:
    """Take the exit status of adopted processes that have ended, lest they stay as zombies."""
    with contextlib.suppress(ChildProcessError, AttributeError):  # none left; macOS has no waitid
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while (dead := os.waitid(os.P_ALL, 0, look)) and dead.si_pid != launcher_pid:
            os.waitpid(dead.si_pid, os.WNOHANG)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _exit_code(pid: int) -> int | None:
    """Return how a process ended that nobody has waited for yet; negative for a signal. None if it is gone."""
    try:
        last = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[-1]
    except OSError:
        return None
    return os.waitstatus_to_exitcode(int(last))


def _state(pid: int) -> str:
    """Say what a process that does not end is doing."""
    with contextlib.suppress(psutil.Error):
        if psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "is stopped (SIGSTOP, or a debugger)"
    return f"went on for {_PATIENCE_S:g} s after another rank had failed"


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False

"""Runs a launcher (torchrun, deepspeed, accelerate) so that a signal means one save and nothing is left behind.

usage: python -m distllm.cli.supervise [--dry-run] LAUNCHER ... run.dir=DIR [key=value ...]

Measured: torchrun answers any signal with a traceback and exit code 1, and on SIGUSR1 may die and orphan its
workers; the deepspeed runner dies on SIGTERM. So the launcher gets a session of its own, which no terminal reaches, and
signals go past it, once, to every worker that can save. What workers tell comes through `train/supervision.py`.

Exit codes: 0 done; 2 the user's mistake; 3 stopped by a signal after a clean save; 128 + N ended at once by a second
signal N; 1 anything else.
"""

import functools
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from distllm.cli.main import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER
from distllm.cli.workers import Workers, adopt_orphans, bury_orphans
from distllm.train import supervision
from distllm.train.signals import GRACE_S, SIGNALS, die_with_parent

FAREWELL_S = 5.0
"""How long helpers of a launcher that ended by itself may take to end too."""

_SILENCE_S = "DISTLLM_LAUNCHER_SILENCE_S"
"""Environment variable: how long a launcher whose workers have failed may neither start new ones nor end. torchrun was
seen to wait for ever when the host of its rendezvous could not be reached any more."""

_STOPPED_FILE = "stopped.json"
_OF_A_WORKER = ("RANK", "LOCAL_RANK")
"""What only workers may have in their environment: inherited by the launcher, it would pass for one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the launcher to its end; return the exit code."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    if "--dry-run" in command:
        command.remove("--dry-run")
        print(shlex.join(command))
        return EXIT_DONE
    run_dir = _run_dir(command)
    if run_dir is None:
        _tell(
            "under a launcher run.dir=DIR must be set: it is where the run stops, and where every "
            "later start finds it. Add run.dir=runs/NAME."
        )
        return EXIT_USER
    with tempfile.TemporaryDirectory(prefix="distllm-") as folder:
        return Supervisor(command, run_dir, Path(folder)).run()


class Supervisor:
    """One launcher and everything that it starts."""

    def __init__(self, command: Sequence[str], run_dir: Path, folder: Path) -> None:
        """Prepare; `folder` is where workers leave word."""
        self.command = list(command)
        self.stopped_file = run_dir / _STOPPED_FILE
        self.workers = Workers(folder)
        self._stopped_before = _identity(self.stopped_file)
        # torchrun's nodes wait up to 600 s for each other before they start again; without restarts nothing waits.
        is_restarting = any(w.startswith("--max-restarts=") and w[-2:] != "=0" for w in command)
        self.silence_s = float(os.environ.get(_SILENCE_S) or (660 if is_restarting else 30))
        self._signum: int | None = None
        self._first_s = 0.0
        self._at_once: int | None = None

    def run(self) -> int:
        """Start the launcher, stay with it, clean up after it."""
        adopt_orphans()
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)
        environment = {k: v for k, v in os.environ.items() if k not in _OF_A_WORKER}
        environment[supervision.DIRECTORY] = str(self.workers.folder)
        environment[supervision.PID] = str(os.getpid())
        try:
            launcher = subprocess.Popen(
                self.command,
                env=environment,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, parent_pid=os.getpid()),
            )
        except OSError as error:
            _tell(
                f"cannot start {self.command[0]}: {error.strerror}. Is it installed, and on PATH?"
            )
            return EXIT_FAILED
        code = self._stay_with(launcher)
        if code is not None:
            self._see_off(code)
        self.workers.kill_all(launcher.pid)
        return self._exit_code(code)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._signum is None:
            self._signum, self._first_s = signum, time.monotonic()
        elif time.monotonic() - self._first_s >= GRACE_S:
            self._at_once = signum
        # else: a copy of the first one (a scheduler signals every process of a job)

    def _stay_with(self, launcher: subprocess.Popen) -> int | None:
        """Watch and forward until the launcher has ended; return its exit code, None if we ended it."""
        while self._at_once is None and not self._is_users_mistake():
            self._forward()
            lines = self.workers.watch() + self.workers.end_stuck()
            bury_orphans(launcher.pid)
            code = launcher.poll()
            if code is None or code >= 0:  # else the workers fell with it, and did not fail
                _tell(*lines)
            if code is not None:
                return code
            if self.workers.silent_s() > self.silence_s:
                _tell(
                    f"the launcher did nothing for {self.silence_s:g} s after its workers failed; ended."
                )
                break
        launcher.kill()  # before anything else, or it would start ended workers again
        launcher.wait()
        return None

    def _is_users_mistake(self) -> bool:
        """Tell whether starting again would meet the same mistake."""
        first = self.workers.first_failure()
        return first is not None and first.is_cause and first.code == EXIT_USER

    def _forward(self) -> None:
        if self._signum is not None and self.workers.tell_once(self._signum):
            name = signal.Signals(self._signum).name
            _tell(f"{name}: workers save after this step. Again after 2 s ends all at once.")

    def _see_off(self, code: int) -> None:
        """After the launcher's end: let workers that are saving finish, and helpers of an orderly end go."""
        if self._signum is None and -code in SIGNALS:
            self._signum = -code  # it was meant for the run, and the launcher fell over it
        deadline = time.monotonic() + (0 if code < 0 else FAREWELL_S)
        while self._at_once is None:
            self._forward()
            self.workers.watch()
            is_saving = self._signum is not None and self.workers.is_any_saving()
            if (not is_saving and time.monotonic() >= deadline) or not self.workers.descendants():
                break

    def _exit_code(self, code: int | None) -> int:
        if self._at_once is not None:
            return 128 + self._at_once
        if _identity(self.stopped_file) not in (None, self._stopped_before):
            return EXIT_STOPPED
        failure = self.workers.first_failure()
        if code is not None and code < 0 and (failure is None or not failure.is_told):
            name = signal.Signals(-code).name
            _tell(
                f"the launcher was killed by {name}; nothing of it is left. Start again to resume."
            )
            return EXIT_FAILED
        if failure is not None:
            _tell(f"rank {failure.rank} failed first: {failure.text}")
            return EXIT_USER if failure.code == EXIT_USER else EXIT_FAILED
        if code != EXIT_DONE and self._signum is not None:
            _tell("stopped before there was anything to save.")
        return EXIT_DONE if code == EXIT_DONE else EXIT_FAILED


def _run_dir(command: Sequence[str]) -> Path | None:
    values = [
        word.partition("=")[2].strip("'\"") for word in command if word.startswith("run.dir=")
    ]
    return Path(values[-1]) if values and values[-1] else None


def _identity(path: Path) -> tuple[int, int] | None:
    """Tell one writing of a file from another without trusting any clock."""
    try:
        with path.open("rb") as file:  # opening asks a network file system anew
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _tell(*texts: str) -> None:
    for text in texts:
        print(f"distllm: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

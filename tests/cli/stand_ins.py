"""A launcher and its workers for tests of the supervisor: real processes and signals, without torch.

`launcher` starts workers as torchrun does, each in a session of its own, and starts all again after a failure.
`worker` takes steps of 10 ms, and stops as a training process does: at a step's end, leaving `stopped.json`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from distllm.errors import DataError
from distllm.train.signals import StopFlag, follow_launcher
from distllm.train.supervision import enlist, report_failure  # noqa: F401  (for a test that swaps it in)


def launcher(num_workers: int, max_restarts: int, *arguments: str) -> int:
    """Run workers 0 to N-1; 0 when all end with 0."""
    for attempt in range(max_restarts + 1):
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, "worker", *arguments],
                env={**os.environ, "RANK": str(r), "LOCAL_RANK": str(r), "ATTEMPT": str(attempt)},
                start_new_session=True,
            )
            for r in range(num_workers)
        ]
        while all(w.poll() in (None, 0) for w in workers):
            if all(w.poll() == 0 for w in workers):
                return 0
            time.sleep(0.1)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
    time.sleep(float(os.environ.get("LINGER_S", 0)))
    return 1


def worker() -> int:
    """Train; what goes wrong stands in the environment."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ["ATTEMPT"])
    run_dir = Path(next(a for a in sys.argv if a.startswith("run.dir=")).partition("=")[2])
    follow_launcher()
    fault = os.environ.get("FAULT", "")
    if fault == "mistake":
        raise DataError("data.path=nowhere does not exist.")
    time.sleep(float(os.environ.get("IMPORT_S", 0)))
    with StopFlag() as stop:
        (run_dir / f"ready_{rank}_{attempt}").write_text(str(os.getpid()))
        while not stop.requested:
            time.sleep(0.01)
            if fault == "exception" and rank == 1:
                raise ValueError("the first cause")
            _meet_the_others(run_dir, attempt, rank)
            if (run_dir / "done").exists():
                break
        if stop.requested:
            (run_dir / f"heard_{rank}").write_text(f"{signal.Signals(stop.signum).name}\n")
            _meet_the_others(run_dir, attempt, rank)
            time.sleep(float(os.environ.get("SAVE_S", 0)))
            if rank == 0:
                (run_dir / "stopped.json").write_text("{}")
        (run_dir / f"left_{rank}_{attempt}").touch()
    return 0


def _meet_the_others(run_dir: Path, attempt: int, rank: int) -> None:
    """Fail as a collective does when a peer has died."""
    for path in run_dir.glob(f"ready_*_{attempt}"):
        if path.with_name(path.name.replace("ready", "left")).exists():
            continue
        status = Path(f"/proc/{path.read_text() or os.getpid()}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            raise RuntimeError(f"rank {rank}: connection closed by peer")


if __name__ == "__main__":
    if sys.argv[1] == "launcher":
        sys.exit(launcher(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]))
    try:
        sys.exit(worker())
    except DataError as error:
        report_failure(error, 2, message=str(error))
        sys.exit(2)
    except Exception as error:
        report_failure(error, 1)
        raise

"""Starts the files of `launch/` as a user does, and looks at what runs below them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from distllm.testing.gloo import patient
from distllm.testing.stages import SKILLS, TINY

ROOT = Path(__file__).resolve().parents[1]
SFT = [*TINY, *SKILLS, "stage=sft", "train.log_every_steps=1"]


class Job:
    """One start of a launch script."""

    def __init__(self, script, run_dir, *settings, prefix=(), **environment):
        """Start it. `prefix` is what to run it under; `environment` comes on top of this process's."""
        self.run_dir = run_dir
        self.output = run_dir.with_name(f"{run_dir.name}-{script}-{time.monotonic_ns()}.txt")
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*prefix, str(ROOT / "launch" / script), *settings, f"run.dir='{run_dir}'"],
                env={
                    **os.environ,
                    # This Python, wherever a checkout's .venv is, and the checkout's package.
                    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    **environment,
                },
                cwd=run_dir.parent,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leave nothing behind, whatever a test has found."""
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.kill()
        self.process.wait()

    def text(self):
        """Return everything it has written so far."""
        return self.output.read_text(errors="replace")

    def end(self, timeout_s=600):
        """Wait for its end; return the exit code."""
        try:
            return self.process.wait(patient(timeout_s))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs:\n{self.text()[-4000:]}") from None

    def wait_for(self, condition, timeout_s=600):
        """Wait until `condition` holds while the job runs."""
        deadline = time.monotonic() + patient(timeout_s)
        while not condition():
            assert self.process.poll() is None, self.text()[-4000:]
            assert time.monotonic() < deadline, self.text()[-4000:]
            time.sleep(0.01)

    def wait_for_step(self, step):
        """Wait until metrics.jsonl has a line of that step or a later one."""
        self.wait_for(lambda: max(steps(self.run_dir), default=-1) >= step)

    def below(self):
        """Return every process below the script."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self, rank):
        """Return the process of a rank."""
        for process in self.below():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise AssertionError(f"no rank {rank}:\n{self.text()[-4000:]}")


def steps(run_dir):
    """List the steps that metrics.jsonl has training lines of."""
    return list(losses(run_dir))


def losses(run_dir):
    """Return step -> loss of a run's training lines."""
    path = run_dir / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line being written
            record = json.loads(line)
            if "train/loss" in record:
                assert record["step"] not in found, f"step {record['step']} was logged twice"
                found[record["step"]] = record["train/loss"]
    return found


def are_gone(processes, timeout_s=10):
    """Tell whether all of them end within the time; a zombie has ended."""

    def is_gone(process):
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True

    deadline = time.monotonic() + timeout_s
    while not all(map(is_gone, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return all(map(is_gone, processes))


def kill(process):
    """Kill -9."""
    os.kill(process.pid, signal.SIGKILL)

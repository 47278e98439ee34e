"""Run a function on n real processes that talk by gloo, and get their results: a start costs seconds, so let it do much.

The function must be importable (defined at the top of a module). Results travel as safetensors files and JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distllm.train.signals import die_with_parent

_CHILD = "from distllm.testing.gloo import child; child()"


def patient(limit_s: float) -> float:
    """Return how long a test should wait: `limit_s` times the environment variable DISTLLM_TEST_PATIENCE (1 without it).

    For machines that are slow or busy. Only what a test waits for at most is stretched, never what it asserts.
    """
    return limit_s * float(os.environ.get("DISTLLM_TEST_PATIENCE", 1))


def run_on(
    num_processes: int,
    function: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    timeout_s: float = 240,
    env: Mapping[str, str] | None = None,
    path: Sequence[Path | str] = (),
) -> list[Any]:
    """Call `function` ("module:name") with JSON `arguments` on each rank; return each rank's JSON result.

    The environment is that of torchrun; the function joins the process group itself, by way of an engine's session or
    `distllm.engines.processes`.

    Raises:
        AssertionError: a rank failed or the time is over; the message holds what it wrote to stderr.
    """
    processes = launch(num_processes, function, arguments, env=env, path=path)
    try:
        return collect(processes, timeout_s)
    finally:
        stop(processes)


class Process:
    """One rank under way."""

    def __init__(self, popen: subprocess.Popen[str], folder: Path, rank: int) -> None:
        self.popen, self.rank = popen, rank
        self.result, self.errors = folder / f"result_{rank}.json", folder / f"errors_{rank}.txt"

    @property
    def stderr(self) -> str:
        """What it wrote so far."""
        return self.errors.read_text(encoding="utf-8", errors="replace")


def launch(
    num_processes: int,
    function: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    env: Mapping[str, str] | None = None,
    path: Sequence[Path | str] = (),
) -> list[Process]:
    """Start the ranks and return without waiting."""
    folder = Path(tempfile.mkdtemp(prefix="distllm-gloo-"))
    (folder / "arguments.json").write_text(json.dumps(dict(arguments or {})))
    port = free_port()
    root = Path(__file__).resolve().parents[2]
    found = []
    for rank in range(num_processes):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), *map(str, path)]),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DISTLLM_TEST_CALL": json.dumps([function, str(folder), os.getpid()]),
            **(env or {}),
        }
        with open(folder / f"errors_{rank}.txt", "w", encoding="utf-8") as errors:
            popen = subprocess.Popen(
                [sys.executable, "-c", _CHILD],
                env=environment,
                stdout=errors,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
        found.append(Process(popen, folder, rank))
    return found


def collect(processes: Sequence[Process], timeout_s: float = 240) -> list[Any]:
    """Wait for all ranks; return their results."""
    for process in processes:
        try:
            code = process.popen.wait(patient(timeout_s))
        except subprocess.TimeoutExpired:
            every = "\n".join(f"--- rank {p.rank}\n{p.stderr[-3000:]}" for p in processes)
            raise AssertionError(f"rank {process.rank} hangs\n{every}") from None
        if code != 0:
            every = "\n".join(f"--- rank {p.rank}\n{p.stderr[-3000:]}" for p in processes)
            raise AssertionError(f"rank {process.rank} exited with {code}\n{every}")
    return [json.loads(p.result.read_text()) for p in processes]


def stop(processes: Sequence[Process]) -> None:
    """Kill what is left of the ranks, with everything they started."""
    for process in processes:
        if process.popen.poll() is None:
            os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def child() -> None:
    """Be one rank: call the function that the environment names."""
    name, folder, parent_pid = json.loads(os.environ["DISTLLM_TEST_CALL"])
    die_with_parent(parent_pid=parent_pid)
    module, _, attribute = name.partition(":")
    arguments = json.loads((Path(folder) / "arguments.json").read_text())
    result = getattr(importlib.import_module(module), attribute)(**arguments)
    (Path(folder) / f"result_{os.environ['RANK']}.json").write_text(json.dumps(result))

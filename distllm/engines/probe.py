"""Tries whether processes of this machine can talk to each other: a collective of two, for `distllm doctor`.

Nothing of a run is needed for it. Groups of a real run are joined in `processes.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda.nccl import version as nccl_version

_CHILD = "import sys; from distllm.engines.probe import child; child(*sys.argv[1:])"


def backends() -> dict[str, str]:
    """Return the version of each communication library that this torch was built with; empty where it has none."""
    nccl = nccl_version() if dist.is_nccl_available() else ()
    return {
        "gloo": "built in" if dist.is_gloo_available() else "",
        "nccl": ".".join(map(str, nccl)),
    }


def try_collective(
    backend: str, timeout_s: float = 120, num_processes: int = 2
) -> tuple[bool, str]:
    """Let processes sum a number over `backend`; return whether it came out right, and the time it took or the error.

    Each process of NCCL takes a GPU of its own.
    """
    began_s = time.monotonic()
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    with tempfile.TemporaryDirectory(prefix="distllm-probe-") as folder:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _CHILD, backend, f"{folder}/store", str(rank), str(num_processes), str(timeout_s)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_processes)
        ]  # fmt: skip
        problems = []
        try:
            for child in children:
                left_s = max(1.0, began_s + timeout_s - time.monotonic())
                _, errors = child.communicate(timeout=left_s)
                if child.returncode != 0:
                    last = (errors.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
                    problems.append(last)
        except subprocess.TimeoutExpired:
            problems.append(f"no answer within {timeout_s:g} s")
        finally:
            for child in children:
                child.kill()
                child.communicate()
    took = f"{time.monotonic() - began_s:.1f} s, the start of the processes included"
    return not problems, problems[0] if problems else took


def child(backend: str, store: str, rank: str, num_processes: str, timeout_s: str) -> None:
    """Be one of the processes."""
    size, number = int(num_processes), int(rank)
    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    # A file to meet at: what is tried is the network between the processes, not a free port.
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, size),  # pyright: ignore[reportPrivateImportUsage]
        rank=number,
        world_size=size,
        timeout=timedelta(seconds=float(timeout_s)),
    )
    total = torch.tensor([number + 1.0], device=device)
    dist.all_reduce(total)
    expected = size * (size + 1) / 2
    if total.item() != expected:
        raise RuntimeError(f"the sum over {size} processes was {total.item()}, not {expected}")
    dist.destroy_process_group()

"""The group of processes that run one job: joining it, waiting with a limit that fits the phase, leaving it.

What the processes say to each other is in `collectives.py`, how they are laid out in `mesh.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from distllm.engines import collectives
from distllm.engines.options import EngineOptions
from distllm.errors import EngineError

LONG_PHASES = ("sampling", "reward", "evaluation", "save", "load", "export", "build")
"""Phases in which one process may work for long while the others wait (`engine.long_timeout_s`)."""

_limits_s = {"update": 100.0, "long": 1800.0}
_phase = "start"
_step = 0


def launched() -> bool:
    """True under torchrun and every other launcher that sets torch's variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """Return how many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return this process's number among all."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Return this process's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return how many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


@contextmanager
def processes(options: EngineOptions, device: torch.device) -> Iterator[None]:
    """Be a member of the process group inside the `with`; all ranks take part. A second, inner use does nothing.

    CPU tensors travel by gloo always, CUDA tensors by NCCL: control messages never wait for the GPU's queue.

    Raises:
        EngineError: the others did not appear within `engine.start_timeout_s`.
    """
    if dist.is_initialized() or not (launched() or needs_group(options)):
        yield
        return
    _join(options, device)
    try:
        yield
    except BaseException:
        # The others may be inside a collective: leaving in good order would wait for them.
        raise
    else:
        dist.destroy_process_group()


def needs_group(options: EngineOptions) -> bool:
    """True for engines whose library wants a process group even for one process."""
    from distllm import registry

    return registry.get("engine", options.name).needs_group


def _join(options: EngineOptions, device: torch.device) -> None:
    global _phase
    _limits_s.update(update=options.timeout_s, long=options.long_timeout_s)
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    alone = {} if launched() else {"store": store, "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=options.start_timeout_s),
            device_id=device if on_gpu else None,
            **alone,
        )
        collectives.barrier()
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise EngineError(
            f"rank {rank()} of {world_size()} did not meet the others at {where} within "
            f"engine.start_timeout_s={options.start_timeout_s}: {error}. Look whether all of them were started, "
            "with the same address and number of processes, and whether the network lets them through."
        ) from error
    _phase = "update"
    _set_limit(_limits_s["update"])


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Name what is going on, and wait for other ranks as long as that may take: all groups of this process.

    All ranks enter, and meet at the end of a long phase: who is done first waits with its limit, not with the next one's.
    """
    global _phase
    before, _phase = _phase, name
    _set_limit(_limits_s["long" if name in LONG_PHASES else "update"])
    try:
        yield
        if name in LONG_PHASES and before not in LONG_PHASES:
            collectives.barrier()
    except BaseException as error:
        vars(error).setdefault("phase", current_phase())
        raise
    finally:
        _phase = before
        _set_limit(_limits_s["long" if before in LONG_PHASES else "update"])


def renew_limit() -> None:
    """Give groups that a library has made since the phase began its limit too; call it after building an engine."""
    _set_limit(current_phase()[1])


def note_step(step: int) -> None:
    """Say which step is being made, for messages."""
    global _step
    _step = step


def current_phase() -> tuple[str, float]:
    """Return the name of the phase, with its step once there is one, and its time limit in seconds."""
    name = f"{_phase} of step {_step}" if _step else _phase
    return name, _limits_s["long" if _phase in LONG_PHASES else "update"]


def phase_of(error: BaseException) -> tuple[str, float]:
    """Return the innermost phase that `error` came out of, and its limit; where there is none, the present one's."""
    return vars(error).get("phase") or current_phase()


def lost_another(error: BaseException) -> bool:
    """True when `error` says that another rank is gone or silent, rather than that something went wrong here."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)


_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def _set_limit(seconds: float) -> None:
    if not dist.is_initialized():
        return
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

"""What surrounds every job that owns a run directory: the other processes, the lock, the claim, the log, the way out.

Rank 0 alone holds the lock and writes shared files; each rank has a log of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distllm.config.schema import Config, leaves, to_dict
from distllm.engines import collectives, processes
from distllm.engines.hardware import resolve_device
from distllm.errors import EngineError, LostRankError
from distllm.tracking.console import setup_logging
from distllm.train.files import atomic_write_json
from distllm.train.run_dir import RunDir
from distllm.train.signals import StopFlag

_log = logging.getLogger("distllm")

STOPPED_FILE = "stopped.json"
"""Tells a launcher's supervisor that workers which exited with 0 were stopped by a signal, after a clean save."""


@contextmanager
def session(config: Config) -> Iterator[Path]:
    """Yield the run directory, held and claimed for `config`. All ranks take part; sessions may be nested.

    Raises:
        EngineError: another run holds the directory, or not all machines see it.
        CheckpointError: it belongs to another configuration.
        LostRankError: another rank died or did not answer in time.
    """
    run = RunDir(config.run.dir)
    rank = processes.rank()
    try:
        with (
            processes.processes(config.engine, resolve_device(config.hardware.device)),
            collectives.main_holds(run.lock),
        ):
            collectives.on_main(lambda: _claim(run, config))
            collectives.together(lambda: _check_shared(run))
            setup_logging(run.path, rank)
            yield run.path
    except Exception as error:
        _log.debug("Rank %d ends with an error.", rank, exc_info=True)
        if processes.lost_another(error):
            phase, limit_s = processes.phase_of(error)
            raise LostRankError(
                f"rank {rank} lost another rank in phase {phase} (limit {limit_s:g} s): {error}. Which one failed "
                f"first, and why, is in {run.path / 'logs'}; start again to go on from the last checkpoint."
            ) from error
        raise


def stop_agreed(stop: StopFlag) -> bool:
    """True on every rank once any rank was asked to stop. All ranks take part."""
    return collectives.any_true(stop.requested)


def leave_stopped(folder: Path, step: int) -> None:
    """Record, on rank 0, that a signal stopped the run after a clean save."""
    if processes.rank() == 0:
        atomic_write_json(folder / STOPPED_FILE, {"step": step, "time": time.time()})


def _claim(run: RunDir, config: Config) -> None:
    settings = leaves(config)
    marks = {x.key: "free" if x.free else "same" for x in settings}
    run.claim(to_dict(config), marks, {x.key: x.default for x in settings})
    (run.path / STOPPED_FILE).unlink(missing_ok=True)


def _check_shared(run: RunDir) -> None:
    if not run.config_path.exists():
        raise EngineError(
            f"rank {processes.rank()} does not see {run.config_path}, which rank 0 has written. Set run.dir to a "
            "directory on a file system that all machines share."
        )

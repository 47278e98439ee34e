"""What goes wrong inside a rank, and when: kills in the middle of a step or a save, poisoned numbers, readers that fail.

A fault is `{"rank": R, "at": PLACE, "step": K, "do": WHAT}`; K counts from 1, and for places in a save is the checkpoint's
step. It happens once in the life of the process.
"""

import contextlib
import functools
import json
import os
import signal
import threading
import time
from pathlib import Path

PLACES = (
    "forward",
    "backward",
    "all_reduce",
    "optimizer",
    "loss",
    "gradient",
    "weights",
    "read",
    "record",
    "limits",
)
"""Where a fault may be; `save:PHASE` is a fault point of a checkpoint's writing, `phase:NAME` the entry of a phase."""

now = {"step": 0}
"""The step that is being made."""


def install(faults):
    """Put the faults into this process's copy of the program."""
    if not faults:
        return
    for fault in faults:
        assert fault["at"] in PLACES or fault["at"].startswith(("save:", "call:", "phase:")), fault
    _follow_steps()
    for fault in faults:
        at = fault["at"].partition(":")[0]
        globals()[f"_in_{at}"](fault)


def _is_due(fault):
    if fault.get("done") or now["step"] != fault["step"]:
        return False
    fault["done"] = True
    return True


def _happen(fault):
    what = fault["do"]
    if "mark" in fault:
        Path(fault["mark"]).touch()
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "sleep":
        time.sleep(fault["seconds"])
    elif what == "raise":
        raise OSError(fault.get("errno", 5), fault.get("text", "the disk went away"))
    else:
        raise AssertionError(what)


def _wrap(owner, name, make):
    honest = getattr(owner, name)
    setattr(owner, name, functools.wraps(honest)(make(honest)))


def _follow_steps():
    from distllm.rl.loop import RolloutSource
    from distllm.train.source import SampleSource

    def make(honest):
        def next_step(source, step):
            now["step"] = step + 1
            return honest(source, step)

        return next_step

    for source in (SampleSource, RolloutSource):
        _wrap(source, "next", make)


def _after_building(look):
    """Call `look(engine)` when a trained engine has been built."""
    from distllm.engines.native import NativeEngine

    def make(honest):
        def build(engine, *args, **kwargs):
            honest(engine, *args, **kwargs)
            if engine.optimizer is not None:
                look(engine)

        return build

    _wrap(NativeEngine, "__init__", make)


def _in_forward(fault):
    """Between two blocks: the first has run, the second is still to be gathered."""

    def look(engine):
        def hook(*_):
            if _is_due(fault):
                _happen(fault)

        next(iter(engine.model.blocks())).register_forward_hook(hook)

    _after_building(look)


def _in_backward(fault):
    """When the gradient has come through the last block and not through the first."""

    def look(engine):
        def hook(*_):
            if _is_due(fault):
                _happen(fault)

        list(engine.model.blocks())[-1].register_full_backward_hook(hook)

    _after_building(look)


def _in_optimizer(fault):
    """When the weights have changed and nobody has counted the step."""

    def look(engine):
        def hook(*_):
            if _is_due(fault):
                _happen(fault)

        engine.optimizer.register_step_post_hook(hook)

    _after_building(look)


def _in_all_reduce(fault):
    """Inside a collective of the step that waits for a rank which comes late: give all ranks this fault.

    The one with `do` = `sleep` is late; the one with `kill` or `stop` is hit while it waits.
    """
    from distllm.engines import collectives

    def make(honest):
        def sum_scalars(values, group=None):
            if _is_due(fault):
                if fault["do"] == "sleep":
                    _happen(fault)
                else:
                    threading.Timer(0.3, _happen, [fault]).start()
            return honest(values, group)

        return sum_scalars

    _wrap(collectives, "sum_scalars", make)


def _in_loss(fault):
    """The loss of this rank's first micro-batch is `do`, `nan` or `inf`."""
    from distllm.engines import native

    def make(honest):
        def losses_of(model, objective, batch):
            losses, metrics = honest(model, objective, batch)
            if _is_due(fault):
                losses = {k: v * float(fault["do"]) for k, v in losses.items()}
            return losses, metrics

        return losses_of

    _wrap(native, "losses_of", make)


def _in_gradient(fault):
    """One element of one gradient of this rank is `do`, after the backward and before the norm is taken."""

    def change(engine):
        parameter = next(p for p in engine.model.parameters() if p.grad is not None)
        grad = getattr(parameter.grad, "_local_tensor", parameter.grad)
        grad.view(-1)[0] = float(fault["do"])

    _before_update(fault, change)


def _in_weights(fault):
    """One weight of this rank is `do` after the step: an update went wrong that nobody noticed."""
    from distllm.engines.native import NativeEngine

    def make(honest):
        def update(engine, lr):
            norm = honest(engine, lr)
            if _is_due(fault):
                parameter = next(engine.model.parameters())
                local = getattr(parameter, "_local_tensor", parameter).detach()
                local.view(-1)[0] = float(fault["do"])
            return norm

        return update

    _wrap(NativeEngine, "update", make)


def _before_update(fault, change):
    from distllm.engines.native import NativeEngine

    def make(honest):
        def update(engine, lr):
            if _is_due(fault):
                change(engine)
            return honest(engine, lr)

        return update

    _wrap(NativeEngine, "update", make)


def _in_read(fault):
    """While this rank reads one of its samples."""
    from distllm.data.datasets import ChatDataset

    def make(honest):
        def getitem(dataset, index):
            if _is_due(fault):
                _happen(fault)
            return honest(dataset, index)

        return getitem

    _wrap(ChatDataset, "__getitem__", make)


def _in_save(fault):
    """At a fault point of `train/files.py`, of the save after step K."""
    from distllm.train import checkpoint, files

    phase = fault["at"].partition(":")[2]

    def make(honest):
        def fault_point(name):
            if name == f"checkpoint:{phase}" and _is_due(fault):
                _happen(fault)
            honest(name)

        return fault_point

    for module in (files, checkpoint):
        _wrap(module, "fault_point", make)


def _in_call(fault):
    """In a system call of the save after step K, such as `call:fsync`: it fails with `errno`."""
    name = fault["at"].partition(":")[2]

    def make(honest):
        def call(*args, **kwargs):
            due = "checkpoints" in _path_of(args[0]) and _is_due(fault)
            if due:
                raise OSError(fault["errno"], os.strerror(fault["errno"]))
            return honest(*args, **kwargs)

        return call

    _wrap(os, name, make)


def _in_record(fault):
    """Nothing goes wrong: each fsync and rename is written into the file `log`, before it is made."""
    rank = fault["rank"]
    log = os.open(fault["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(*record):
        os.write(log, json.dumps([rank, *record]).encode() + b"\n")

    def renaming(name):
        def make(honest):
            def rename(source, target, **kwargs):
                files = [str(p) for p in Path(source).rglob("*")] if Path(source).is_dir() else []
                note(name, json.dumps({"path": str(source), "files": files}), str(target))
                return honest(source, target, **kwargs)

            return rename

        return make

    def make_fsync(honest):
        def fsync(fd):
            note("fsync", _path_of(fd), None)
            return honest(fd)

        return fsync

    _wrap(os, "fsync", make_fsync)
    for name in ("rename", "replace"):
        _wrap(os, name, renaming(name))


def _in_phase(fault):
    """When this rank enters a phase that waits for others with a limit of its own."""
    from distllm.engines import processes

    name = fault["at"].partition(":")[2]

    def make(honest):
        def set_limit(seconds):
            honest(seconds)
            if processes._phase == name and _is_due(fault):
                _happen(fault)

        return set_limit

    _wrap(processes, "_set_limit", make)


def _in_limits(fault):
    """Nothing goes wrong: each phase, and the limits that torch has then for all groups, go into the file `log`."""
    import torch
    from torch.distributed import distributed_c10d

    from distllm.engines import collectives, processes

    def note():
        backends = [g._get_backend(torch.device("cpu")) for g in distributed_c10d._world.pg_map]
        limits = [b.options._timeout.total_seconds() for b in backends]
        with open(fault["log"], "a") as log:
            log.write(json.dumps([processes._phase, limits]) + "\n")

    def noting(when):
        def make(honest):
            def call(*args):
                if when == "before":
                    note()
                honest(*args)
                if when == "after":
                    note()

            return call

        return make

    _wrap(collectives, "barrier", noting("before"))  # where the ranks meet at the start
    _wrap(processes, "_set_limit", noting("after"))


def _path_of(what):
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
    return ""

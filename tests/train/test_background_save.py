"""Saving while training goes on: the same files as without, and errors that are not lost."""

import os
import signal
import threading

import pytest
import torch
from test_checkpoint_faults import content, is_whole, run_child

from distllm.errors import CheckpointError
from distllm.train import checkpoint, tensor_files
from distllm.train.checkpoint import Checkpoints
from distllm.train.parts import collect_parts, hand_in


def files_of(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_the_files_are_those_of_a_save_in_the_foreground(tmp_path):
    behind = Checkpoints(tmp_path / "behind", background=True)
    paths = [behind.save(1, content(1), {"step": 1})]
    behind.wait()
    paths.append(Checkpoints(tmp_path / "front").save(1, content(1), {"step": 1}))
    assert files_of(paths[0]) == files_of(paths[1])
    assert is_whole(behind.latest())


def held_writer(monkeypatch):
    """Hold the writing of tensors until the event is set."""
    go = threading.Event()
    honest = tensor_files.write_tensors

    def write(*args, **kwargs):
        assert go.wait(60)
        return honest(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "write_tensors", write)
    return go


def test_it_returns_before_the_files_are_written_and_keeps_the_tensors_as_they_were(
    tmp_path, monkeypatch
):
    go = held_writer(monkeypatch)
    tensors = content(1)
    checkpoints = Checkpoints(tmp_path, background=True)
    path = checkpoints.save(1, tensors, {"step": 1})
    assert not path.exists()
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    go.set()
    checkpoints.wait()
    assert is_whole(checkpoints.latest())


def test_without_a_copy_the_next_step_would_be_in_the_checkpoint(tmp_path, monkeypatch):
    """The bug patched in."""
    honest = tensor_files.share
    monkeypatch.setattr(checkpoint, "share", lambda *args, copy: honest(*args, copy=False))
    go = held_writer(monkeypatch)
    tensors = content(1)
    checkpoints = Checkpoints(tmp_path, background=True)
    checkpoints.save(1, tensors, {"step": 1})
    for group in tensors.values():
        for tensor in group.values():
            tensor.zero_()
    go.set()
    checkpoints.wait()
    assert not is_whole(checkpoints.latest())


def test_the_next_save_waits_for_the_last_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, background=True)
    for step in range(1, 6):
        checkpoints.save(step, content(step), {"step": step})
    checkpoints.wait()
    assert sorted(os.listdir(tmp_path)) == ["step_00000004", "step_00000005"]


def test_an_error_is_raised_by_the_next_save(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, background=True)
    checkpoints.save(1, content(1), {"step": 1})
    checkpoints.wait()

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", refuse)
    checkpoints.save(2, content(2), {"step": 2})
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoints.save(3, content(3), {"step": 3})
    assert is_whole(checkpoints.latest()) and checkpoints.latest().step == 1
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_kill_while_it_is_written_leaves_the_last_one(tmp_path):
    def save_and_die():
        os.environ["DISTLLM_TEST_FAULT"] = "checkpoint:mid_write@4"
        checkpoints = Checkpoints(tmp_path, background=True)
        for step in (1, 2, 3):
            checkpoints.save(step, content(step), {"step": step})
        checkpoints.wait()

    assert run_child(save_and_die) == -signal.SIGKILL
    checkpoints = Checkpoints(tmp_path)
    checkpoints.clean()
    found = checkpoints.latest()
    assert found is not None and is_whole(found)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_parts_of_several_ranks(tmp_path):
    def late():
        hand_in(tmp_path, 1, lambda: {"b": {"bytes": 2}})

    hand_in(tmp_path, 0, lambda: {"a": {"bytes": 1}})
    thread = threading.Timer(0.2, late)
    thread.start()
    assert collect_parts(tmp_path, 2, wait_s=30) == {"a": {"bytes": 1}, "b": {"bytes": 2}}
    assert os.listdir(tmp_path) == []


def test_a_rank_that_fails_or_is_silent_is_named(tmp_path):
    def fail():
        raise CheckpointError("its disk is full")

    with pytest.raises(CheckpointError, match="its disk is full"):
        hand_in(tmp_path, 0, fail)
    with pytest.raises(CheckpointError, match="Rank 0: its disk is full"):
        collect_parts(tmp_path, 1, wait_s=30)
    with pytest.raises(CheckpointError, match="rank 1 did not finish writing"):
        (tmp_path / "part_0.json").unlink()
        hand_in(tmp_path, 0, dict)
        collect_parts(tmp_path, 2, wait_s=0.1)


def test_ranks_divide_the_tensors():
    named = {f"t{i}": torch.full((4,), float(i)) for i in range(6)}
    parts = [tensor_files.share(iter(named.items()), rank, 2) for rank in (0, 1)]
    assert [len(part) for part in parts] == [3, 3]
    assert parts[0].keys() | parts[1].keys() == named.keys()

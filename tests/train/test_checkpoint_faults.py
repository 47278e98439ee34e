"""Checkpoints under kill -9, power cuts, full disks and failing writes. Children are real processes."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distllm.errors import CheckpointError
from distllm.train import checkpoint, files
from distllm.train.checkpoint import Checkpoints
from distllm.train.manifest import verify


def content(step: int, size: int = 20_000) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that are a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    return {stem: {"w": torch.randn(size, generator=generator)} for stem in ("model", "optim")}


def is_whole(found: checkpoint.Loaded, size: int = 20_000) -> bool:
    return found.state == {"step": found.step} and all(
        torch.equal(found.tensors(stem)["w"], tensors["w"])
        for stem, tensors in content(found.step, size).items()
    )


def run_child(body: Callable[[], None]) -> int:
    """Fork, run `body` in the child, return how it ended: exit code, or minus the signal."""
    pid = start_child(body)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_child(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(70)
    return pid


# phase -> the step found afterwards, and what the killed process leaves beside whole checkpoints
PHASES = {
    "before_write": (2, set()),
    "mid_write": (2, {".step_00000003.tmp"}),
    "before_manifest": (2, {".step_00000003.tmp"}),
    "before_rename": (2, {".step_00000003.tmp"}),
    "after_rename": (3, set()),
    "mid_delete": (3, {".step_00000001.trash"}),
}


@pytest.mark.parametrize("phase", PHASES)
def test_killed_at(tmp_path, phase):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        checkpoints.save(step, content(step), {"step": step})

    def save_and_die() -> None:
        os.environ["DISTLLM_TEST_FAULT"] = f"checkpoint:{phase}"
        checkpoints.save(3, content(3), {"step": 3})

    assert run_child(save_and_die) == -signal.SIGKILL
    expected, debris = PHASES[phase]
    assert {name for name in os.listdir(tmp_path) if name.startswith(".")} == debris
    if phase == "mid_write":
        half = tmp_path / ".step_00000003.tmp" / "model.safetensors"
        assert 0 < half.stat().st_size < 80_000
    for path in tmp_path.iterdir():
        if path.name.startswith("step_"):
            verify(path)

    checkpoints.clean()
    found = checkpoints.latest()
    assert found.step == expected and is_whole(found)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    for step in (3, 4):
        checkpoints.save(step, content(step), {"step": step})
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000004"]
    assert is_whole(checkpoints.latest())


def test_killed_at_the_nth_time(tmp_path):
    def save_and_die() -> None:
        os.environ["DISTLLM_TEST_FAULT"] = "checkpoint:before_manifest@3"
        for step in range(1, 9):
            Checkpoints(tmp_path).save(step, content(step), {"step": step})

    assert run_child(save_and_die) == -signal.SIGKILL
    assert Checkpoints(tmp_path).latest().step == 2


def test_killed_while_replacing_the_only_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(3, content(4), {"step": 4})

    def replace_and_die() -> None:
        os.environ["DISTLLM_TEST_FAULT"] = "checkpoint:mid_replace"
        checkpoints.save(3, content(3), {"step": 3})

    assert run_child(replace_and_die) == -signal.SIGKILL
    checkpoints.clean()
    found = checkpoints.latest()
    assert found is not None and found.state == {"step": 4}
    assert os.listdir(tmp_path) == ["step_00000003"]


def test_killed_at_random_moments(tmp_path):
    """Each child goes on from what the killed one left, and checks it first."""
    ready, tell = os.pipe()
    folder = tmp_path / "checkpoints"

    def keep_saving() -> None:
        checkpoints = Checkpoints(folder, keep_last=2)
        checkpoints.clean()
        found = checkpoints.latest()
        step = found.step if found else 0
        if found and not is_whole(found):
            os._exit(71)
        os.write(tell, b"x")
        while True:
            step += 1
            checkpoints.save(step, content(step), {"step": step})

    moments = random.Random(0)
    deadline = time.monotonic() + 60
    reached = rounds = 0
    debris = set()
    while rounds < 30 or (reached < 10 and time.monotonic() < deadline):
        rounds += 1
        pid = start_child(keep_saving)
        assert os.read(ready, 1) == b"x"
        time.sleep(moments.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if folder.exists():
            debris |= {Path(name).suffix for name in os.listdir(folder) if name.startswith(".")}
        found = Checkpoints(folder).latest()
        if found is not None:
            assert is_whole(found) and found.step >= reached
            reached = found.step
    os.close(ready), os.close(tell)
    assert reached >= 10
    assert ".tmp" in debris, "no kill fell into a write: the moments test nothing"


def test_everything_is_durable_before_its_name_is(tmp_path, monkeypatch):
    calls: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}

    def fsync(fd: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
        real["fsync"](fd)

    def renaming(name: str) -> Callable[..., None]:
        def rename(src: Path, dst: Path) -> None:
            calls.append(("rename", f"{src} {dst}"))
            real[name](src, dst)

        return rename

    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, content(1), {"step": 1})
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming("rename"))
    monkeypatch.setattr(os, "replace", renaming("replace"))
    path = checkpoints.save(2, content(2), {"step": 2})

    aside = tmp_path / ".step_00000002.tmp"
    at = calls.index(("rename", f"{aside} {path}"))
    synced_before = [name for kind, name in calls[:at] if kind == "fsync"]
    assert {str(aside / name) for name in os.listdir(path)} | {str(aside)} <= set(synced_before)
    assert synced_before[-2:] == [str(aside / "manifest.json"), str(aside)]
    assert calls[at + 1] == ("fsync", str(tmp_path))
    deleted = ("rename", f"{tmp_path / 'step_00000001'} {tmp_path / '.step_00000001.trash'}")
    assert calls.index(deleted) > at + 1
    assert calls[calls.index(deleted) + 1] == ("fsync", str(tmp_path))


def test_a_new_folder_and_a_replaced_file_are_durable_too(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1]
    )
    Checkpoints(tmp_path / "run" / "checkpoints").save(1, {}, {})
    above = {str(tmp_path), str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")}
    assert above <= set(synced)
    synced.clear()
    files.atomic_write_text(tmp_path / "a.txt", "x")
    assert synced == [str(tmp_path / ".a.txt.tmp"), str(tmp_path)]


@pytest.fixture
def small_disk(tmp_path):
    """A real disk of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"may not mount a tmpfs: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


BIG = 300_000
"""Floats a stem: one checkpoint of 2.4 MB fits on the small disk, two do not."""


@pytest.mark.parametrize("preflight", [True, False])
def test_full_disk(small_disk, monkeypatch, preflight):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    checkpoints.save(1, content(1, BIG), {"step": 1})
    if not preflight:  # another process takes the space between the look and the write
        monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 10**9)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.save(2, content(2, BIG), {"step": 2})
    message = str(caught.value)
    assert str(small_disk / "checkpoints" / "step_00000002") in message
    needed = int(message.split("needs ")[1].split()[0])
    assert 2_400_000 < needed < 2_450_000
    free = int(message.split(" free")[0].split()[-1])
    if preflight:
        assert message.startswith("No room for checkpoint")
        assert free == files.free_bytes(small_disk) < needed
    else:
        assert "No space left on device" in message
    assert os.listdir(small_disk / "checkpoints") == ["step_00000001"]
    monkeypatch.undo()
    assert is_whole(checkpoints.latest(), BIG)
    checkpoints.save(2, content(2, 1000), {"step": 2})
    assert checkpoints.latest().step == 2


def test_needed_bytes_bound_what_is_written(tmp_path):
    many = {f"layer.{i}.weight": torch.zeros(1) for i in range(300)}
    for tensors in ({"one": {"w": torch.zeros(1)}}, {f"s{i}": many for i in range(5)}, content(1)):
        path = Checkpoints(tmp_path).save(1, tensors, {})
        on_disk = sum(p.stat().st_blocks * 512 for p in [path, *path.iterdir()])
        estimate = checkpoint._estimate_bytes(tensors, b"{}")
        entries = sum(len(group) for group in tensors.values())
        assert on_disk <= estimate <= on_disk + 16384 + len(tensors) * 16384 + entries * 128


def test_file_size_limit(tmp_path):
    """A write that the kernel refuses part way, without a full disk."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, content(1), {"step": 1})
    note = tmp_path / "note"

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoints.save(2, content(2), {"step": 2})
        except CheckpointError as error:
            note.write_text(str(error))

    assert run_child(save) == 0
    assert os.strerror(errno.EFBIG) in note.read_text() and "step_00000002" in note.read_text()
    assert sorted(os.listdir(tmp_path)) == ["note", "step_00000001"]
    assert is_whole(checkpoints.latest())


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_failing_device(tmp_path, monkeypatch, call):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, content(1), {"step": 1})
    real = getattr(os, call)
    count = iter(range(100))

    def fail(*args):
        if next(count) == (0 if call == "rename" else 1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=r"step_00000002: Input/output error \(it needs \d+"):
        checkpoints.save(2, content(2), {"step": 2})
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert is_whole(checkpoints.latest())


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step_00000001: (Not a directory|File exists)"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, {}, {})


def test_saving_over_debris(tmp_path):
    """The earlier start was killed in a write, and nobody called `clean`."""
    for suffix in ("tmp", "old", "trash"):
        (tmp_path / f".step_00000001.{suffix}").mkdir()
        (tmp_path / f".step_00000001.{suffix}" / "model.safetensors").write_text("half")
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step, offset in ((1, 5), (1, 0), (2, 0)):  # write, replace, delete
        checkpoints.save(step, content(step + offset), {"step": step})
    assert os.listdir(tmp_path) == ["step_00000002"]
    assert is_whole(checkpoints.latest())


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path).save(1, content(1), {})
    assert os.listdir(tmp_path) == []


def test_atomic_text_is_the_old_or_the_new(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.atomic_write_json(file, {"x": [1, "é"]})
    assert json.loads(file.read_text()) == {"x": [1, "é"]}
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "io")))
    with pytest.raises(OSError):
        files.atomic_write_text(file, "new")
    assert json.loads(file.read_text()) == {"x": [1, "é"]}
    assert os.listdir(tmp_path) == ["a.json"]
    monkeypatch.setattr(os, "replace", real)
    (tmp_path / ".a.json.tmp").write_text("left by a kill")
    files.atomic_write_text(file, "new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]

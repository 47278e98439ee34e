"""One process per run directory, one configuration for its life. The other processes are real ones."""

import contextlib
import enum
import errno
import fcntl
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import yaml

from distllm.errors import CheckpointError, EngineError
from distllm.train import run_dir
from distllm.train.run_dir import RunDir

CONFIG = {
    "run": {"seed": 0, "dir": "here"},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95]},
    "train": {"max_steps": 10},
    "engine": {"name": "single"},
}
FIELDS = {
    "run.seed": "same",
    "run.dir": "free",
    "optim.lr": "same",
    "optim.betas": "same",
    "train.max_steps": "free",
    "engine.name": "free",
}


def changed(key: str, value: object) -> dict:
    config = {group: dict(fields) for group, fields in CONFIG.items()}
    group, name = key.split(".")
    config[group][name] = value
    return config


@contextlib.contextmanager
def another_process(path: Path, then=signal.pause):
    """Hold the lock in a forked child until the block ends."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException), RunDir(path).lock():
            os.write(tell, b"x")
            then()
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(ready), os.close(tell)


def holder(path: Path, **changes: object) -> None:
    """Write a lock file as process `pid` on `host` would have."""
    mine = {"host": socket.gethostname(), "pid": os.getpid()}
    mine["started"] = run_dir._start_time(os.getpid())
    (path / ".lock").write_text(json.dumps({**mine, **changes}))


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_second_start_names_the_first(tmp_path):
    with another_process(tmp_path / "run") as pid:
        for _ in range(2):  # a refused start must not disturb the lock
            with pytest.raises(EngineError) as caught, RunDir(tmp_path / "run").lock():
                pass
            message = str(caught.value)
            assert f"process {pid} on {socket.gethostname()}" in message
            assert str(tmp_path / "run") in message and "run.dir" in message


def test_kill_frees_it_at_once(tmp_path):
    with another_process(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == pid
        with RunDir(tmp_path).lock():
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_release_and_lock_again(tmp_path):
    for _ in range(2):
        with RunDir(tmp_path).lock():
            pass
    assert (tmp_path / ".lock").read_text() == ""
    with another_process(tmp_path):
        pass


def test_same_process_cannot_lock_twice(tmp_path):
    with (
        RunDir(tmp_path).lock(),
        pytest.raises(EngineError, match=f"process {os.getpid()}"),
        RunDir(tmp_path).lock(),
    ):
        pass
    with RunDir(tmp_path).lock():
        pass


def test_a_surviving_child_does_not_hold_it(tmp_path):
    """A worker forked by the trainer lives on after the trainer's kill -9."""
    note = tmp_path / "child"
    folder = tmp_path / "run"

    def fork_and_wait() -> None:
        if os.fork() == 0:
            note.write_text(str(os.getpid()))
        signal.pause()

    with another_process(folder, fork_and_wait) as pid:
        deadline = time.monotonic() + 10
        while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        child = int(note.read_text())
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.kill(child, 0)
            with RunDir(folder).lock():
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_stale_locks(tmp_path):
    holder(tmp_path, pid=dead_pid())
    with RunDir(tmp_path).lock():
        pass
    holder(tmp_path, started=1)  # this pid lives, but is another process than the one that locked
    with RunDir(tmp_path).lock():
        pass
    (tmp_path / ".lock").write_text('{"host": "torn')
    with RunDir(tmp_path).lock():
        pass


def test_another_host_is_not_judged(tmp_path):
    holder(tmp_path, host="elsewhere", pid=4242)
    with pytest.raises(EngineError) as caught, RunDir(tmp_path).lock():
        pass
    assert "process 4242 on elsewhere" in str(caught.value)
    assert f"delete {tmp_path / '.lock'}" in str(caught.value)
    assert json.loads((tmp_path / ".lock").read_text())["host"] == "elsewhere"


def test_a_live_lock_whose_file_was_emptied(tmp_path):
    with another_process(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(EngineError, match="in use by another process"), RunDir(tmp_path).lock():
            pass


def test_disk_without_kernel_locks(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        another_process(tmp_path) as pid,
        pytest.raises(EngineError, match=f"process {pid} on"),
        RunDir(tmp_path).lock(),
    ):
        pass
    with RunDir(tmp_path).lock():  # killed by now
        pass


def test_a_holder_that_is_dead_and_not_waited_for(tmp_path):
    """A zombie, as where the first process of a container waits for nobody."""
    pid = os.fork()
    if pid == 0:
        held = RunDir(tmp_path).lock()
        held.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    holder = json.loads((tmp_path / ".lock").read_text())
    assert holder["pid"] == pid and run_dir._start_time(pid) == holder["started"]
    with RunDir(tmp_path).lock():
        pass
    os.waitpid(pid, 0)


def test_start_time_lies_between_before_and_after():
    """Against the machine's clock, for a process whose name is made to confuse."""
    ready, tell = os.pipe()
    before_s = float(Path("/proc/uptime").read_text().split()[0])
    pid = os.fork()
    if pid == 0:
        Path("/proc/self/comm").write_text("a) 1 (2 b")
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    after_s = float(Path("/proc/uptime").read_text().split()[0])
    started_s = run_dir._start_time(pid) / os.sysconf("SC_CLK_TCK")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert before_s - 0.02 <= started_s <= after_s + 0.02
    assert run_dir._start_time(pid) is None


def test_first_start_writes_later_ones_compare(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock():
        assert run.claim(CONFIG, FIELDS) is True
        before = run.config_path.stat().st_ino
        assert run.claim(CONFIG, FIELDS) is False
        assert run.config_path.stat().st_ino == before
    assert yaml.safe_load(run.config_path.read_text()) == CONFIG
    assert sorted(os.listdir(run.path)) == [".lock", "config.yaml"]


def test_free_fields_are_brought_up_to_date(tmp_path):
    run = RunDir(tmp_path)
    run.claim(CONFIG, FIELDS)
    new = changed("train.max_steps", 20)
    new["engine"] = {"name": "fsdp", "zero_stage": 3}
    fields = {**FIELDS, "engine.zero_stage": "free"}
    assert run.claim(new, fields) is False
    assert yaml.safe_load(run.config_path.read_text()) == new
    run.claim(CONFIG, FIELDS)  # engine.zero_stage is only in the file, but its group is free
    assert yaml.safe_load(run.config_path.read_text()) == CONFIG


def test_all_differences_are_listed(tmp_path):
    run = RunDir(tmp_path)
    run.claim(CONFIG, FIELDS)
    before = run.config_path.read_bytes()
    new = changed("optim.lr", 2e-3)
    new["run"] = {"seed": 1, "dir": "there"}
    del new["optim"]["betas"]
    new["optim"]["eps"] = 1e-8
    with pytest.raises(CheckpointError) as caught:
        run.claim(new, {**FIELDS, "optim.eps": "same"})
    listed = [line.strip() for line in str(caught.value).splitlines()[1:-1]]
    assert listed == [
        "optim.betas: [0.9, 0.95] there, (absent) now",
        "optim.eps: (absent) there, 1e-08 now",
        "optim.lr: 0.001 there, 0.002 now",
        "run.seed: 0 there, 1 now",
    ]
    assert str(tmp_path) in str(caught.value) and "another run.dir" in str(caught.value)
    assert run.config_path.read_bytes() == before


def test_a_setting_that_the_file_is_older_than_is_at_its_default(tmp_path):
    run = RunDir(tmp_path)
    run.claim(CONFIG, FIELDS)
    new, fields = changed("optim.eps", 1e-8), {**FIELDS, "optim.eps": "same"}
    with pytest.raises(CheckpointError, match=r"optim\.eps: \(absent\) there, 1e-08 now"):
        run.claim(new, fields, {"optim.eps": 1e-6})
    assert run.claim(new, fields, {"optim.eps": 1e-8}) is False
    assert yaml.safe_load(run.config_path.read_text()) == new
    with pytest.raises(
        CheckpointError, match=r"optim\.lr"
    ):  # a value in the file counts, whatever the default
        run.claim(changed("optim.lr", 5.0), FIELDS, {"optim.lr": 5.0})


def test_a_setting_dropped_from_a_same_group_conflicts(tmp_path):
    run = RunDir(tmp_path)
    old = {"rl": {"weights": {"a": 1.0, "b": 2.0}}}
    run.claim(old, {"rl.weights.a": "same", "rl.weights.b": "same"})
    with pytest.raises(CheckpointError, match=r"rl\.weights\.b: 2\.0 there, \(absent\) now"):
        run.claim({"rl": {"weights": {"a": 1.0}}}, {"rl.weights.a": "same"})
    with pytest.raises(CheckpointError, match=r"rl\.weights: .* there"):
        run.claim({"rl": {"weights": {"a": 1.0}}}, {"rl.weights": "same"})


@pytest.mark.parametrize(
    ("was", "now"), [(1, True), (1, 1.0), ("1", 1), (None, "null"), ([], {}), (0, False)]
)
def test_types_are_told_apart(tmp_path, was, now):
    run = RunDir(tmp_path)
    run.claim(changed("run.seed", was), FIELDS)
    run.claim(changed("run.seed", was), FIELDS)
    with pytest.raises(CheckpointError, match=r"run\.seed"):
        run.claim(changed("run.seed", now), FIELDS)


class Colour(enum.StrEnum):
    RED = "red"


ODD_VALUES = [1e-5, 1e20, float("inf"), float("nan"), -0.0, (1, 2), {"x": [{"y": None}]}]
ODD_STRINGS = ["1e-5", "on", "2020-01-01", "é: #\n", "", "~", "0x1F", "1_000", Colour.RED]


@pytest.mark.parametrize("value", [*ODD_VALUES, *ODD_STRINGS, Path("a/b")])
def test_values_survive_the_file(tmp_path, value):
    run = RunDir(tmp_path)
    run.claim(changed("run.seed", value), FIELDS)
    assert run.claim(changed("run.seed", value), FIELDS) is False


@pytest.mark.parametrize("entry", ["thesis.tex", ".git", "checkpoints"])
def test_a_foreign_directory_is_left_alone(tmp_path, entry):
    (tmp_path / entry).mkdir()
    with pytest.raises(CheckpointError) as caught, RunDir(tmp_path).lock():
        pass
    with pytest.raises(CheckpointError):
        RunDir(tmp_path).claim(CONFIG, FIELDS)
    message = str(caught.value)
    assert "not empty and not a run directory" in message and entry in message
    assert os.listdir(tmp_path) == [entry]


def test_a_foreign_config_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("model: 3\n")
    with (
        pytest.raises(CheckpointError, match="was not written by distllm"),
        RunDir(tmp_path).lock(),
    ):
        pass
    with pytest.raises(CheckpointError, match="not a run directory"):
        RunDir(tmp_path).claim(CONFIG, FIELDS)
    assert (tmp_path / "config.yaml").read_text() == "model: 3\n"
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="it is a file"), RunDir(tmp_path / "run").lock():
        pass


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EngineError, match=r"file/run cannot be written: (Not a dir|File exists)"),
        RunDir(tmp_path / "file" / "run").lock(),
    ):
        pass

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    with pytest.raises(EngineError, match="cannot be written: No space left"):
        run.claim(CONFIG, FIELDS)
    assert os.listdir(run.path) == []


@pytest.mark.parametrize("damage", ["optim: [", "just text", "a: \x00"])
def test_a_damaged_config_is_not_replaced(tmp_path, damage):
    run = RunDir(tmp_path)
    run.claim(CONFIG, FIELDS)
    header = run.config_path.read_text().splitlines(keepends=True)[0]
    run.config_path.write_text(header + damage)
    with pytest.raises(CheckpointError, match=r"config\.yaml (cannot be read|holds no mapping)"):
        run.claim(CONFIG, FIELDS)
    assert run.config_path.read_text() == header + damage


def test_a_start_killed_before_the_claim_can_be_repeated(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".config.yaml.tmp").write_text("half")
    (tmp_path / "logs").mkdir()
    with RunDir(tmp_path).lock() as run:
        assert run.claim(CONFIG, FIELDS) is True
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml", "logs"]

"""The supervisor with a stand-in launcher: signals, failures, orphans. With torchrun: tests/launch/."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import stand_ins

import distllm
from distllm.testing.gloo import patient
from distllm.train import supervision

ROOT = Path(distllm.__file__).parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")


def start(run_dir, num_workers=2, max_restarts=0, stand_in=stand_ins.__file__, **environment):
    run_dir.mkdir(exist_ok=True)
    launcher = [sys.executable, stand_in, "launcher", str(num_workers), str(max_restarts)]
    return subprocess.Popen(
        [sys.executable, "-m", "distllm.cli.supervise", *launcher, f"run.dir={run_dir}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "7", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, timeout_s=None):
    deadline = time.monotonic() + (timeout_s or patient(30))
    while not condition():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.01)


def ready(run_dir, num_workers=2, attempt=0):
    """Wait until all workers can save; return their process ids in the order of ranks."""
    files = [run_dir / f"ready_{r}_{attempt}" for r in range(num_workers)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    return [int(f.read_text()) for f in files]


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def end(process):
    """Wait for the end; return exit code and stderr."""
    _, err = process.communicate(timeout=patient(60))
    return process.returncode, err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_worker_once_and_gives_3(tmp_path, signum):
    process = start(tmp_path, max_restarts=3, SAVE_S="0.5")
    pids = ready(tmp_path)
    process.send_signal(signum)
    time.sleep(0.1)
    process.send_signal(signum)  # a copy: it must not cut the save short
    code, err = end(process)
    assert code == 3, err
    assert [(tmp_path / f"heard_{r}").read_text() for r in (0, 1)] == [f"{signum.name}\n"] * 2
    assert err.count(f"{signum.name}: saving after this step") == 2  # one of each worker
    assert all(is_gone(pid) for pid in pids)


def test_a_signal_to_the_whole_group_gives_3_too(tmp_path):
    process = start(tmp_path, SAVE_S="0.5")
    processes = psutil.Process(process.pid), *map(psutil.Process, ready(tmp_path))
    for one in processes:  # as a scheduler does that signals every process of a job
        one.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 3, err


def test_an_old_stopped_file_does_not_count(tmp_path):
    (tmp_path / "stopped.json").write_text("{}")
    (tmp_path / "done").touch()
    assert end(start(tmp_path))[0] == 0


def test_workers_that_still_start_are_told_when_they_can_save(tmp_path):
    process = start(tmp_path, IMPORT_S="0.7")
    wait_for(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 3)
    process.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 3, err


def test_a_late_second_signal_ends_all_at_once(tmp_path):
    process = start(tmp_path, max_restarts=3, SAVE_S="60")
    pids = ready(tmp_path)
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: (tmp_path / "heard_0").exists())
    time.sleep(2.1)
    sent_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 128 + signal.SIGTERM, err
    assert time.monotonic() - sent_s < 10  # and not 60
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("victim", ["launcher", "supervisor"])
def test_killing_what_stands_above_leaves_no_orphan(tmp_path, victim):
    process = start(tmp_path)
    pids = ready(tmp_path)
    (launcher,) = psutil.Process(process.pid).children()
    (launcher if victim == "launcher" else process).kill()
    code, err = end(process)
    if victim == "launcher":
        assert code == 1
        assert err.splitlines()[-1] == (
            "distllm: the launcher was killed by SIGKILL; nothing of it is left. Start again to resume."
        )
    wait_for(lambda: all(map(is_gone, [launcher.pid, *pids])), timeout_s=10)


def test_workers_that_follow_nobody_outlive_a_supervisor(tmp_path):
    """So the test above shows something."""
    script = tmp_path / "stand_ins.py"
    script.write_text(
        Path(stand_ins.__file__).read_text().replace("    follow_launcher()\n", "    enlist()\n")
    )
    process = start(tmp_path / "run", stand_in=str(script))
    pids = ready(tmp_path / "run")
    process.kill()
    process.wait()
    time.sleep(0.5)
    try:
        assert not any(map(is_gone, pids))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_the_first_ranks_exception_is_read_last(tmp_path):
    code, err = end(start(tmp_path, FAULT="exception"))
    assert code == 1
    last = err[err.rindex("distllm: rank 1 failed first: ") :]
    assert last.startswith("distllm: rank 1 failed first: Traceback")
    assert last.rstrip().endswith("ValueError: the first cause")


def test_a_killed_rank_is_the_cause_and_not_its_peers(tmp_path):
    process = start(tmp_path, num_workers=3)
    os.kill(ready(tmp_path, 3)[1], signal.SIGKILL)
    code, err = end(process)
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("distllm: rank 1 failed first: ") and "kill -9" in last
    assert "connection closed by peer" in err  # the peers spoke, too


@pytest.mark.slow
def test_a_stopped_rank_does_not_hold_up_the_end(tmp_path):
    process = start(tmp_path)
    victim, other = ready(tmp_path)[1], ready(tmp_path)[0]
    os.kill(victim, signal.SIGSTOP)
    (tmp_path / "ready_1_0").write_text("0")  # so that its peer takes it for dead
    code, err = end(process)
    assert code == 1
    assert err.splitlines()[-1].startswith(
        f"distllm: rank 1 failed first: the process (pid {victim}) is stopped (SIGSTOP"
    )
    assert is_gone(victim) and is_gone(other)


def test_a_restart_is_told_and_forgiven(tmp_path):
    process = start(tmp_path, max_restarts=1)
    victim = ready(tmp_path)[1]
    os.kill(victim, signal.SIGKILL)
    ready(tmp_path, attempt=1)
    (tmp_path / "done").touch()
    code, err = end(process)
    assert code == 0
    assert f"rank 1: the process (pid {victim}) " in err and "kill -9" in err


def test_a_signal_after_a_restart_reaches_the_new_workers(tmp_path):
    process = start(tmp_path, max_restarts=1)
    os.kill(ready(tmp_path)[0], signal.SIGKILL)
    ready(tmp_path, attempt=1)
    process.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 3, err


def test_a_launcher_that_hangs_after_a_failure_is_ended(tmp_path):
    process = start(tmp_path, FAULT="exception", LINGER_S="600", DISTLLM_LAUNCHER_SILENCE_S="1")
    code, err = end(process)
    assert code == 1 and "the launcher did nothing for 1 s after its workers failed" in err
    assert err.rstrip().endswith("ValueError: the first cause")


def test_a_users_mistake_is_not_tried_again(tmp_path):
    code, err = end(start(tmp_path, max_restarts=100, FAULT="mistake"))
    assert code == 2
    assert err.splitlines()[-1].endswith("failed first: data.path=nowhere does not exist.")
    assert "Traceback" not in err


def test_a_launcher_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "distllm.cli.supervise", "no-such-launcher"]
    result = subprocess.run([*command, f"run.dir={tmp_path}"], capture_output=True, text=True)
    assert result.returncode == 1 and "cannot start no-such-launcher" in result.stderr


def test_run_dir_must_be_set():
    command = [sys.executable, "-m", "distllm.cli.supervise", "torchrun", "stage=sft", "run.dir="]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "Add run.dir=" in result.stderr


def test_a_dry_run_prints_the_command():
    command = [sys.executable, "-m", "distllm.cli.supervise", "a launcher", "x=1", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "'a launcher' x=1\n")


def test_torchruns_own_summary_gets_the_message(tmp_path, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.delenv(supervision.DIRECTORY, raising=False)
    from torch.distributed.elastic.multiprocessing.api import ProcessFailure
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    supervision.report_failure(ValueError("no"), 1)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert "traceback : ValueError: no" in str(ChildFailedError("distllm", {0: failure}))

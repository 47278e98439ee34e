"""Signals, and children that die with their parent: real processes, real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distllm.train import signals
from distllm.train.signals import StopFlag, die_with_parent

ROOT = Path(signals.__file__).parents[2]

TRAINER = """
import sys, time
from distllm.train import signals
signals.GRACE_S = float(sys.argv[1])
with signals.StopFlag() as stop:
    print("ready", flush=True)
    steps = 0
    while not stop.requested:
        time.sleep(0.01)
        steps += 1
    end = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < end:
        time.sleep(0.01)  # the rest of the step
    print("saved", flush=True)
    sys.exit(signals.STOPPED_EXIT_CODE)
"""


def start(code: str, *args: object) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_one_signal_saves_and_exits_3(signum):
    process = start(TRAINER, 2, 0)
    process.send_signal(signum)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (3, "saved\n")
    assert signum.name in err


def test_copies_of_the_first_signal_change_nothing():
    process = start(TRAINER, 2, 1)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(signum)
        time.sleep(0.05)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, out) == (3, "saved\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_late_second_signal_stops_at_once(signum):
    process = start(TRAINER, 0.2, 60)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.4)
    began = time.monotonic()
    process.send_signal(signum)
    out, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 2
    assert (process.returncode, out) == (128 + signum, "")
    assert "at once" in err


def test_grace_is_two_seconds_from_the_first():
    assert signals.GRACE_S == 2.0
    process = start(TRAINER, signals.GRACE_S, 60)
    assert process.stderr is not None
    sent_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    while "SIGTERM" not in process.stderr.readline():
        pass
    taken_s = time.monotonic()
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    if time.monotonic() - sent_s < 2:  # else this machine was too busy to tell
        assert process.poll() is None
    time.sleep(max(0, taken_s + 2.1 - time.monotonic()))  # 0.9 s after the second
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.fixture
def earlier():
    """What a handler saw that was there before us."""
    seen = []
    before = {s: signal.signal(s, lambda n, _: seen.append(n)) for s in signals.SIGNALS}
    yield seen
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_earlier_handlers_come_back(earlier):
    with StopFlag() as stop:
        assert not stop.requested and stop.signum is None
    for signum in signals.SIGNALS:
        os.kill(os.getpid(), signum)
    assert earlier == list(signals.SIGNALS)


def test_after_a_stop_they_come_back_when_the_copies_are_over(earlier, monkeypatch):
    monkeypatch.setattr(signals, "GRACE_S", 0.2)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested and stop.signum == signal.SIGUSR1
    for signum in signals.SIGNALS:
        os.kill(os.getpid(), signum)
    assert earlier == []
    time.sleep(0.25)
    for signum in signals.SIGNALS:
        os.kill(os.getpid(), signum)
    assert earlier == list(signals.SIGNALS)


def test_outside_the_main_thread_it_stays_down():
    before = signal.getsignal(signal.SIGTERM)
    result = []

    def body() -> None:
        with StopFlag() as stop:
            result.append((stop.requested, signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert result == [(False, True)]
    assert signal.getsignal(signal.SIGTERM) == before


PARENT = """
import functools, os, signal, subprocess, sys
from distllm.train.signals import die_with_parent
guard = functools.partial(die_with_parent, parent_pid=os.getpid())
for preexec in (guard, None):
    print(subprocess.Popen(["sleep", "60"], preexec_fn=preexec, stdout=subprocess.DEVNULL).pid)
print("ready", flush=True)
signal.pause()
"""

MULTIPROCESSING_PARENT = """
import multiprocessing, signal, sys, time
from distllm.train.signals import die_with_parent

def child(guarded, queue):
    if guarded:
        die_with_parent()
    queue.put(None)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.SimpleQueue()
    for guarded in (True, False):
        process = context.Process(target=child, args=(guarded, queue))
        process.start()
        queue.get()
        print(process.pid)
    print("ready", flush=True)
    signal.pause()
"""


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("way", ["subprocess", "fork", "spawn", "forkserver"])
def test_children_die_with_a_killed_parent(tmp_path, way):
    script = tmp_path / "parent.py"
    script.write_text(PARENT if way == "subprocess" else MULTIPROCESSING_PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(script), way],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    guarded, unguarded = int(parent.stdout.readline()), int(parent.stdout.readline())
    assert parent.stdout.readline() == "ready\n"
    try:
        assert is_alive(guarded) and is_alive(unguarded)
        parent.kill()
        parent.wait()
        deadline = time.monotonic() + 2
        while is_alive(guarded) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(guarded)
        assert is_alive(unguarded), "this one was to survive: the test shows nothing"
    finally:
        os.kill(unguarded, signal.SIGKILL)
        parent.stdout.close()


def test_a_parent_already_gone_ends_the_child():
    pid = os.fork()
    if pid == 0:  # as if the number of the parent had changed meanwhile
        die_with_parent(parent_pid=1 if os.getppid() != 1 else 2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGKILL

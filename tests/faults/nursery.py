"""Ranks that start in a moment: real processes, forked from one that has imported everything already.

Each forked rank runs the program itself (`distllm train ...`) with a launcher's environment, in a session of its own, and
writes to a file of its own. What is to go wrong in it is in `injection.py`. Launchers have no part in this: tests with
torchrun are in `test_launched_faults.py`.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Nursery:
    """The process that forks ranks, seen from the test."""

    def __init__(self, folder, warm_up):
        """Start it; `warm_up` is what its first child runs, so that all later ones find its imports."""
        self.folder, self.count = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        with open(folder / "nursery.txt", "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(warm_up)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                start_new_session=True,
            )
        if self.process.stdout.readline() != "ready\n":
            raise AssertionError((folder / "nursery.txt").read_text())

    def start(self, run_dir, *settings, world=2, faults=(), verb="train", **environment):
        """Start the ranks of one job; `world=0` starts one process without a launcher."""
        from distllm.testing.gloo import free_port

        self.count += 1
        ranks, port = [], free_port()
        for rank in range(max(world, 1)):
            launched = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
                "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            output = self.folder / f"job_{self.count}_rank_{rank}.txt"
            job = {
                "words": [verb, *settings, f"run.dir='{run_dir}'"],
                "environment": {
                    k: str(v) for k, v in {**(launched if world else {}), **environment}.items()
                },
                "faults": [f for f in faults if f.get("rank", 0) == rank],
                "output": str(output),
            }
            ranks.append(Rank(self, rank, self.ask({"fork": job}), output))
        return Job(ranks)

    def ask(self, question):
        """Put a question to the process."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "nursery.txt").read_text()
        return json.loads(answer)

    def close(self):
        """End it, and with it every rank that is left."""
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@dataclass
class Rank:
    """One process of a job."""

    nursery: Nursery
    rank: int
    pid: int
    output: Path
    ended: tuple | None = None
    """Exit code (minus the signal), and when it was seen to have ended."""

    @property
    def text(self):
        """What it has written."""
        return self.output.read_text(errors="replace")

    def poll(self):
        """Return the exit code, None while it runs."""
        if self.ended is None:
            code = self.nursery.ask({"poll": self.pid})
            self.ended = None if code is None else (code, time.monotonic())
        return None if self.ended is None else self.ended[0]

    def send(self, signum):
        """Send a signal."""
        os.kill(self.pid, signum)


class Job:
    """The ranks of one start of the program."""

    def __init__(self, ranks):
        self.ranks = ranks

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leave nothing behind."""
        for rank in self.ranks:
            if rank.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
        self.end(60)

    def text(self):
        """Show what every rank wrote."""
        return "\n".join(f"--- rank {r.rank}\n{r.text[-3000:]}" for r in self.ranks)

    def wait_for(self, condition, timeout_s=240):
        """Wait until `condition` holds, with the ranks running or not."""
        from distllm.testing.gloo import patient

        deadline = time.monotonic() + patient(timeout_s)
        while not condition():
            assert time.monotonic() < deadline, f"it never came\n{self.text()}"
            time.sleep(0.02)

    def end(self, timeout_s=240):
        """Wait for the end of all; return their exit codes."""
        self.wait_for(lambda: all(r.poll() is not None for r in self.ranks), timeout_s)
        return [r.ended[0] for r in self.ranks]


def serve():
    """Fork what is asked for on stdin, until it closes."""
    pipe, sys.stdout = sys.stdout, sys.stderr
    for name in _learn_imports(json.loads(sys.argv[1])):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    print("ready", file=pipe, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "fork" in question:
            answer = _fork(question["fork"])
        else:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=pipe, flush=True)


def _fork(job):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.update(job["environment"])
        to = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for fd in (1, 2):
            os.dup2(to, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        from injection import install

        from distllm.cli.main import main

        install(job["faults"])
        code = main(job["words"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _learn_imports(words):
    """Run once in a child; return what it had imported in the end."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            from distllm.cli.main import main

            code = main(words)
            with os.fdopen(theirs, "w") as file:
                json.dump([m for m in sys.modules if m != "__main__"], file)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as file:
        text = file.read()
    if os.waitpid(pid, 0)[1]:
        sys.exit("the first run failed")
    return json.loads(text)


if __name__ == "__main__":
    serve()

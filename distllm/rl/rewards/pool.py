"""Reward functions in processes of their own, each response under a time limit.

A function that raises loses one response; one that hangs or dies loses one response and its process, and another process
takes over. Signals are no use for this: they reach no C code and only the main thread. The processes' side is `worker.py`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distllm.engines import collectives
from distllm.engines.hardware import available_cores
from distllm.errors import ConfigError
from distllm.rl.rewards.base import RewardContext
from distllm.train.signals import die_with_parent
from distllm.types import Prompt, Rollout

START_TIMEOUT_S = 120.0
"""For a worker to import the function's module."""
MAX_WORKERS = 8


class _Worker:
    """One process and the pipe to it."""

    def __init__(
        self, function: str, bound: Mapping[str, Any], imports: Sequence[str], log: Path | None
    ) -> None:
        paths = os.pathsep.join([os.getcwd(), *(p for p in sys.path if p)])
        environment = {**os.environ, "PYTHONPATH": paths, "DISTLLM_REWARD_PARENT": str(os.getpid())}
        errors: Any = open(log, "ab") if log else subprocess.DEVNULL  # noqa: SIM115 (closed below)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "distllm.rl.rewards.worker"),
                *(function, json.dumps(dict(bound)), *imports),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # a Ctrl-C is for us, not for it
            preexec_fn=functools.partial(die_with_parent, parent_pid=os.getpid()),
        )
        if log:
            errors.close()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        os.set_blocking(self.stdout.fileno(), False)
        self.ready = False
        self.job: int | None = None
        """The response it works on."""
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self._buffer = b""

    def send(self, job: int, line: bytes, timeout_s: float) -> None:
        """Hand over a job. A process that is gone shows when its answer is read."""
        self.job, self.deadline = job, time.monotonic() + timeout_s
        try:
            self.stdin.write(line)
            self.stdin.flush()
        except OSError:
            pass

    def read(self) -> list[dict[str, Any]] | None:
        """Return the complete answers that have come; None when the process is gone."""
        try:
            data = self.stdout.read()
        except OSError:
            data = b""
        if data == b"":
            return None
        *lines, self._buffer = (self._buffer + (data or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


class PooledReward:
    """A Python function as a reward. Every rank runs its share of the responses."""

    def __init__(
        self,
        function: str,
        context: RewardContext,
        *,
        attempts: int = 1,
        imports: Sequence[str] = (),
        **bound: Any,
    ) -> None:
        """Start one process and have it import the function.

        Args:
            function: `module:function`.
            context: of the run.
            attempts: how often the function tries by itself; each may take `reward_timeout_s`.
            imports: modules that a process imports before it takes responses.
            bound: further arguments of the function, the same for every response.

        Raises:
            ConfigError: the function cannot be imported.
        """
        options = context.options
        self.function, self.bound, self.imports = function, bound, imports
        self.name = context.function or function
        self.log = context.log
        self.timeout_s = options.reward_timeout_s * attempts
        self.num_workers = options.reward_workers or min(MAX_WORKERS, available_cores())
        self.workers: list[_Worker] = []
        self.problems: dict[int, str] = {}
        self.needs: list[str] = []
        """Parameters that the function cannot be called without."""
        collectives.together(self._start_first)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse a function with a parameter that no prompt of the data has a column for."""
        in_trl_form = "completions" in self.needs
        have = (
            ["prompts", "completions"]
            if in_trl_form
            else ["prompt", "messages", "response", "task"]
        )
        have += ["answer"] if any(p.answer is not None for p in prompts) else []
        have += sorted({column for p in prompts for column in p.extra} - {*have})
        lacking = [name for name in self.needs if name not in have]
        if lacking:
            raise ConfigError(
                f"stage.reward={self.name} needs {', '.join(lacking)}, which the data does not have. There is "
                f"{', '.join(have)}. Map a column with data.columns={{{lacking[0]}:COLUMN}}, or change the function."
            )

    def score(
        self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], texts: Sequence[str]
    ) -> list[float]:
        """Score each of `texts`; `rollouts` are not read."""
        rank, size = collectives.rank(), collectives.world_size()
        mine = list(range(rank, len(texts), size))
        lines = [_line(prompts[i], texts[i]) for i in mine]
        values, problems = self._run(lines)
        shares = collectives.gather_json([values, {str(k): v for k, v in problems.items()}])
        scores = [math.nan] * len(texts)
        self.problems = {}
        for other, (found, failed) in enumerate(shares):
            scores[other::size] = found
            self.problems |= {other + int(k) * size: v for k, v in failed.items()}
        return scores

    def close(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _start_first(self) -> None:
        worker = self._start()
        selector = selectors.DefaultSelector()
        selector.register(worker.stdout, selectors.EVENT_READ)
        message: dict[str, Any] = {}
        while not message and selector.select(max(0.0, worker.deadline - time.monotonic())):
            answers = worker.read()
            if answers is None:
                message = {"error": "its process ended while importing it"}
            elif answers:
                message = answers[0]
        if "ready" in message:
            worker.ready, self.needs = True, message["needs"]
            return
        self.close()
        why = message.get("error", f"importing it took more than {START_TIMEOUT_S:.0f} s")
        raise ConfigError(
            f"stage.reward={self.name} cannot be used: {why}. Give MODULE:FUNCTION, with the module importable "
            "from the working directory or installed."
        )

    def _start(self) -> _Worker:
        worker = _Worker(self.function, self.bound, self.imports, self.log)
        self.workers.append(worker)
        return worker

    def _run(self, lines: Sequence[bytes]) -> tuple[list[float], dict[int, str]]:
        """Run all jobs; return their values (NaN where there is none) and what went wrong."""
        values, problems = [math.nan] * len(lines), {}
        waiting = list(range(len(lines)))[::-1]
        num_open = len(lines)

        def fail(worker: _Worker, why: str) -> None:
            nonlocal num_open
            if worker.job is not None:
                problems[worker.job] = why
                num_open -= 1
            worker.kill()
            self.workers.remove(worker)

        while num_open:
            busy = sum(w.job is not None for w in self.workers)
            while len(self.workers) < min(self.num_workers, busy + len(waiting)):
                self._start()
            for worker in self.workers:
                if worker.ready and worker.job is None and waiting:
                    job = waiting.pop()
                    worker.send(job, lines[job], self.timeout_s)
            open_workers = [w for w in self.workers if w.job is not None or not w.ready]
            with selectors.DefaultSelector() as selector:
                for worker in open_workers:
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
                wait_s = min(w.deadline for w in open_workers) - time.monotonic()
                events = selector.select(max(0.0, wait_s))
            for key, _ in events:
                worker = key.data
                answers = worker.read()
                if answers is None:
                    fail(worker, "the reward function's process died")
                    continue
                for message in answers:
                    if "ready" in message:
                        worker.ready = True
                    elif worker.job is not None:
                        if "error" in message:
                            problems[worker.job] = message["error"]
                        elif not math.isfinite(message["value"]):
                            problems[worker.job] = f"the reward is {message['value']}"
                        else:
                            values[worker.job] = message["value"]
                        worker.job, num_open = None, num_open - 1
            now = time.monotonic()
            for worker in [w for w in open_workers if w in self.workers and now >= w.deadline]:
                if worker.job is not None or not worker.ready:
                    fail(worker, f"took more than {self.timeout_s:g} s")
        return values, problems


def _line(prompt: Prompt, text: str) -> bytes:
    sample = {
        "prompt": prompt.messages[-1]["content"],
        "messages": prompt.messages,
        "response": text,
        "answer": prompt.answer,
        "task": prompt.task,
        "extra": prompt.extra,
        "is_text": prompt.is_text,
    }
    return json.dumps(sample, default=str).encode() + b"\n"

"""From kill -9 of one of two ranks to the end of the next step, under launch/torchrun.sh: imports and loading included.

    python benchmarks/restart_cpu.py                     ddp, fsdp and deepspeed, 5 kills each
    python benchmarks/restart_cpu.py --engines fsdp      one of them
    python benchmarks/restart_cpu.py --quick             one kill each

The `peer` of the JSON line is the goal. Start it on a machine with nothing else to do: the load before each engine is
written down, and a busy machine multiplies the times.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import headline, machine

from distllm.testing.gloo import patient
from distllm.testing.stages import SKILLS, TINY

ROOT = Path(__file__).resolve().parents[1]
GOALS_S = {"ddp": 5.0, "fsdp": 5.0, "deepspeed": 10.0}
SETTINGS = [
    *TINY,
    *SKILLS,
    "stage=sft",
    "train.micro_batch_size=4",
    "train.max_steps=1000000",
    "train.log_every_steps=1",
    "train.save_every_steps=5",
    "tracking=jsonl",
]


class Run:
    """One start of the launch script."""

    def __init__(self, folder: Path, engine: str, num_kills: int) -> None:
        self.run_dir, self.output = folder / "run", folder / "output.txt"
        bin_dir = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([bin_dir, os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": "2",
            "MAX_RESTARTS": str(num_kills),
        }
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [
                    str(ROOT / "launch/torchrun.sh"),
                    *SETTINGS,
                    f"engine={engine}",
                    f"run.dir='{self.run_dir}'",
                ],
                env=environment,
                stdout=output,
                stderr=output,
            )

    def text(self) -> str:
        """Return what it has written."""
        return self.output.read_text(errors="replace")

    def steps(self) -> set[int]:
        """Return the steps that are logged."""
        path = self.run_dir / "metrics.jsonl"
        found = set()
        for line in path.read_text().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that is being written
                row = json.loads(line)
                found |= {row["step"]} if "train/loss" in row else set()
        return found

    def wait_for(self, condition: Any, limit_s: float = 600) -> float:
        """Wait until it holds; return the time then."""
        deadline = time.monotonic() + patient(limit_s)
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"It ended, or hangs:\n{self.text()[-4000:]}")
            time.sleep(0.005)
        return time.monotonic()

    def worker(self, rank: int) -> psutil.Process | None:
        """Return the process of a rank, if it is there."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(rank) and process.status() != "zombie":
                    return process
        return None

    def kill_and_time(self, number: int) -> dict[str, float]:
        """Kill rank 1; return the seconds from then to each mark."""
        victim = self.worker(1)
        assert victim is not None
        start = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)

        def is_replaced() -> bool:
            worker = self.worker(1)
            return worker is not None and worker.pid != victim.pid

        replaced = self.wait_for(is_replaced)
        going = self.wait_for(lambda: self.text().count("Going on from step") == number)
        resumed_from = int(re.findall(r"Going on from step (\d+)", self.text())[-1])
        stepped = self.wait_for(lambda: resumed_from + 1 in self.steps())
        marks = {"new process": replaced, "loaded": going, "next step": stepped}
        return {name: at - start for name, at in marks.items()}

    def stop(self) -> None:
        """End it in good order."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(patient(300))


def measure(engine: str, num_kills: int) -> dict[str, Any]:
    """Kill a rank a few times; return the times of each."""
    with tempfile.TemporaryDirectory() as folder:
        load = os.getloadavg()[0]
        run = Run(Path(folder), engine, num_kills)
        try:
            run.wait_for(lambda: max(run.steps(), default=0) >= 6)
            times = []
            for number in range(1, num_kills + 1):
                times.append(run.kill_and_time(number))
                before = max(run.steps())
                run.wait_for(lambda before=before: max(run.steps()) >= before + 6)
        finally:
            run.stop()
    return {"times_s": times, "load_before": load, "goal_s": GOALS_S[engine]}


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--engines", nargs="*", default=list(GOALS_S), choices=list(GOALS_S))
    parser.add_argument("--quick", action="store_true", help="one kill each")
    arguments = parser.parse_args()
    kills = 1 if arguments.quick else arguments.kills
    cells = {}
    for engine in arguments.engines:
        cells[engine] = found = measure(engine, kills)
        marks = {
            mark: statistics.median(t[mark] for t in found["times_s"])
            for mark in found["times_s"][0]
        }
        shown = ", ".join(f"{mark} after {seconds:.2f} s" for mark, seconds in marks.items())
        print(
            f"{engine:10s} {shown} (goal {found['goal_s']:g} s, load {found['load_before']:.1f})",
            flush=True,
        )
        found["median_s"] = marks
    worst = min(cells, key=lambda e: cells[e]["goal_s"] / cells[e]["median_s"]["next step"])
    ours, goal = cells[worst]["median_s"]["next step"], cells[worst]["goal_s"]
    line = headline(
        name="restart_cpu",
        ours=ours,
        peer=goal,
        ratio=goal / ours,
        unit=f"s from kill -9 of a rank to the next step, {worst}, against the goal",
        runs=kills,
        hardware=machine(1),
        packages=("deepspeed",),
        cells=cells,
    )
    print(json.dumps(line))


if __name__ == "__main__":
    main()

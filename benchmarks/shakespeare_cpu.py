"""A step of nanoGPT's CPU configuration, in CPU seconds: distllm against a plain nanoGPT-style loop.

The shape and batch of `experiment=shakespeare_char` (4 layers, d 128, context 64, batch 12), which nanoGPT trains for 2,000
steps. CPU seconds of one thread instead of seconds on the clock, so that a busy machine disturbs it less; each side runs in
a process of its own, the plain loop with its library's defaults, and sides take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIDES = ("ours", "plain")
BATCH, WARM_UP = 12, 10


def measure(side: str, steps: int) -> float:
    """Return the CPU seconds of one step of `side`."""
    import torch
    from pretrain_sides import SIDES as builders

    from distllm.arch.decoder import DecoderOptions
    from distllm.config.compose import compose
    from distllm.engines.hardware import tune_cpu
    from distllm.engines.options import HardwareOptions

    shape = compose(["experiment=shakespeare_char"]).arch
    assert isinstance(shape, DecoderOptions)
    if side == "ours":
        tune_cpu(HardwareOptions(threads=1))
    torch.set_num_threads(1)
    built = builders[side](shape, BATCH, "fp32", False)
    built.run(WARM_UP)
    start = time.process_time()
    built.run(steps)
    return (time.process_time() - start) / (steps + 1)  # `run` adds an untimed step


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="timed steps a round")
    parser.add_argument("--quick", action="store_true", help="one round of one step")
    parser.add_argument("--side", choices=SIDES, help="measure this one, once, here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = arguments.steps = 1
    if arguments.side:
        print(measure(arguments.side, arguments.steps))
        return
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            command = [sys.executable, __file__, f"--steps={arguments.steps}", f"--side={side}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            found[side].append(float(done.stdout.split()[-1]))
            print(f"{side:6s} {found[side][-1] * 1000:8.1f} CPU ms a step", flush=True)
    from harness import headline, machine

    ours, plain = (statistics.median(found[side]) for side in SIDES)
    line = headline(
        name="shakespeare_cpu",
        ours=ours,
        peer=plain,
        ratio=plain / ours,
        unit="CPU s a step, fp32, one thread, against the nanoGPT-style loop as users run it",
        runs=arguments.rounds,
        hardware=machine(1),
        packages=(),
        seconds=found,
    )
    print(json.dumps(line))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

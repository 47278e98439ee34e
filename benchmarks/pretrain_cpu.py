"""Training tokens per second on a CPU: distllm against transformers' Trainer and against a plain nanoGPT-style loop.

Same model for all (6 layers, d_model 384, d_ff 1,024, vocabulary 8,192, tied; batch 8 x 256), same start weights (checked
by the first loss), same dtype, gradient clipping and AdamW everywhere. Ours runs what `distllm train` runs: packed rows
with document isolation, the engine, the optimizer step.

Two more models, eager, against the Trainer alone (`pretrain_families.py`): `bert`, 15% of 8 x 256 tokens hidden, and `t5`,
8 x 256 tokens read and 64 written per row; feed-forward 1,536 wide, the rest as above.

Cells: eager and compiled, bf16 (autocast) and fp32; and each peer twice:
- *as users run it*: glibc's allocator and the library's default settings;
- *with our settings*: our allocator thresholds, thread settings and fused AdamW, and the fastest of the settings tried.

How it is kept fair: allocator thresholds hold for a whole process and cannot be taken back, so there are two worker
processes, one stock and one tuned; each holds its sides at the same time, and all sides take turns in interleaved rounds,
in an order that rotates, while everything else sleeps. A round is one untimed and a few timed steps; its value is
their mean. Reported: the median over rounds, with the slowest and fastest round. The ceiling is the step's bare matrix products of the
linear layers, timed in the same rounds.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

for key, value in {"HF_HUB_OFFLINE": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}.items():
    os.environ.setdefault(key, value)

OUR_ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}
"""What the command line sets before torch is loaded."""

CELLS = [(mode, precision) for mode in ("eager", "compiled") for precision in ("bf16", "fp32")]
CELLS += [(family, precision) for family in ("bert", "t5") for precision in ("bf16", "fp32")]
PEERS = {"trainer": "transformers Trainer", "plain": "nanoGPT-style loop"}
SETTINGS = {
    "trainer": [{}, {"attention": "eager"}, {"optim": "adamw_torch"}],
    "plain": [{"fused": True}, {"foreach": True}],
}
"""Tried under our allocator; the fastest one stands for the peer with our settings. The first is taken in compiled cells."""


class Worker:
    """A process that builds and runs sides."""

    def __init__(self, tuned: bool, threads: int, quick: bool) -> None:
        from pretrain_sides import serve

        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        before = dict(os.environ)
        os.environ.update(OUR_ENVIRONMENT if tuned else {})
        process = context.Process(target=serve, args=(other, tuned, threads, quick), daemon=True)
        process.start()
        os.environ.clear()
        os.environ.update(before)

    def ask(self, **order: Any) -> Any:
        """Send an order and wait for its result."""
        self.connection.send(order)
        result = self.connection.recv()
        if isinstance(result, Exception):
            raise result
        return result


class Entry:
    """One side in one worker under one setting."""

    def __init__(self, worker: Worker, side: str, label: str, arguments: dict[str, Any]) -> None:
        self.worker, self.label, self.key = worker, label, f"{side} {arguments}"
        self.seconds: list[float] = []
        self.loss = worker.ask(do="build", side=side, key=self.key, arguments=arguments)

    def round(self, steps: int) -> None:
        """Add one round."""
        self.seconds.append(statistics.mean(self.worker.ask(do="run", key=self.key, steps=steps)))


def interleave(entries: list[Entry], rounds: int, steps: int) -> None:
    """Run all entries in turn, `rounds` times, each time starting with another one."""
    for number in range(rounds):
        at = number % len(entries)
        for entry in [*entries[at:], *entries[:at]]:
            entry.round(steps)


def measure(
    mode: str, precision: str, workers: dict[str, Worker], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure one cell: tokens per second of every side, and the settings tried."""
    if mode in ("bert", "t5"):
        return measure_family(mode, precision, workers, arguments)
    common = {"batch": arguments.batch, "precision": precision, "compiled": mode == "compiled"}
    tried: dict[str, list[dict[str, Any]]] = {}
    chosen = {side: settings[0] for side, settings in SETTINGS.items()}
    if mode == "eager":
        for side, settings in SETTINGS.items():
            candidates = [
                Entry(workers["tuned"], side, side, common | setting) for setting in settings
            ]
            interleave(candidates, min(2, arguments.rounds), arguments.steps)
            speeds = [arguments.tokens / min(c.seconds) for c in candidates]
            tried[side] = [
                {"setting": s, "tokens_per_s": round(v)}
                for s, v in zip(settings, speeds, strict=True)
            ]
            chosen[side] = settings[speeds.index(max(speeds))]
            workers["tuned"].ask(do="drop")
    entries = {
        "ours": Entry(workers["tuned"], "ours", "distllm", common),
        **{
            f"{side}, {how}": Entry(
                workers[worker],
                side,
                f"{words}, {how}",
                common | (chosen[side] if worker == "tuned" else {}),
            )
            for side, words in PEERS.items()
            for how, worker in (("as users run it", "stock"), ("with our settings", "tuned"))
        },
        "ceiling": Entry(workers["tuned"], "products", "bare matrix products", common),
    }
    losses = [e.loss for e in entries.values() if e.loss is not None]
    if max(losses) - min(losses) > 0.02:
        raise RuntimeError(f"the sides do not train the same model: first losses {losses}")
    interleave(list(entries.values()), arguments.rounds, arguments.steps)
    for worker in workers.values():
        worker.ask(do="drop")
    return {
        "tokens_per_s": {
            name: [round(arguments.tokens / s, 1) for s in e.seconds] for name, e in entries.items()
        },
        "labels": {name: e.label for name, e in entries.items()},
        "chosen": chosen,
        "tried": tried,
    }


def measure_family(
    family: str, precision: str, workers: dict[str, Worker], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure a cell of another family against the Trainer."""
    common = {"family": family, "batch": arguments.batch, "precision": precision}
    settings = SETTINGS["trainer"]
    candidates = [
        Entry(workers["tuned"], "family trainer", "", common | setting) for setting in settings
    ]
    interleave(candidates, min(2, arguments.rounds), arguments.steps)
    fastest = [min(c.seconds) for c in candidates]
    chosen = settings[fastest.index(min(fastest))]
    workers["tuned"].ask(do="drop")
    peer, words = "family trainer", PEERS["trainer"]
    entries = {
        "ours": Entry(workers["tuned"], "family ours", "distllm", common),
        "trainer, as users run it": Entry(
            workers["stock"], peer, f"{words}, as users run it", common
        ),
        "trainer, with our settings": Entry(
            workers["tuned"], peer, f"{words}, with our settings", common | chosen
        ),
        "ceiling": Entry(workers["tuned"], "family products", "bare matrix products", common),
    }
    losses = [e.loss for e in entries.values() if e.loss is not None]
    if max(losses) - min(losses) > 0.02:
        raise RuntimeError(f"the sides do not train the same model: first losses {losses}")
    interleave(list(entries.values()), arguments.rounds, arguments.steps)
    for worker in workers.values():
        worker.ask(do="drop")
    tokens = arguments.tokens * (5 if family == "t5" else 4) // 4
    return {
        "tokens_per_s": {
            name: [round(tokens / s, 1) for s in e.seconds] for name, e in entries.items()
        },
        "labels": {name: e.label for name, e in entries.items()},
        "chosen": {"trainer": chosen},
        "tried": {
            "trainer": [
                {"setting": s, "tokens_per_s": round(tokens / v)}
                for s, v in zip(settings, fastest, strict=True)
            ]
        },
    }


def show(mode: str, precision: str, cell: dict[str, Any]) -> None:
    """Print one cell."""
    medians = {name: statistics.median(v) for name, v in cell["tokens_per_s"].items()}
    cell["ratio"] = {n: round(medians["ours"] / m, 3) for n, m in medians.items() if n != "ours"}
    cell["ceiling_ratio"] = {n: round(medians["ceiling"] / m, 3) for n, m in medians.items()}
    print(f"\n{mode}, {precision}: tokens per second, median (slowest to fastest round)")
    for name, values in cell["tokens_per_s"].items():
        line = f"  {cell['labels'][name]:40s} {medians[name]:8,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        if name not in ("ours", "ceiling"):
            line += f"   ours is {cell['ratio'][name]:.2f}x (ceiling {cell['ceiling_ratio'][name]:.2f}x)"
        print(line)
    for side, settings in cell["tried"].items():
        words = ", ".join(f"{t['setting'] or 'defaults'} {t['tokens_per_s']:,}" for t in settings)
        print(f"  tried for {PEERS[side]}: {words}", flush=True)


def taken_by_others(seconds: float = 2.0) -> float:
    """Return the share of the CPU that is busy while nothing of ours runs; NaN where the kernel does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return float("nan")
    samples = []
    for pause in (seconds, 0.0):
        times = [int(x) for x in stat.read_text().split("\n", 1)[0].split()[1:9]]
        samples.append((sum(times), times[3] + times[4]))
        time.sleep(pause)
    (total, idle), (later_total, later_idle) = samples
    return 1 - (later_idle - idle) / max(1, later_total - total)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round")
    parser.add_argument("--threads", type=int, default=0, help="0: as each side chooses")
    parser.add_argument(
        "--cells", nargs="*", default=[], help="such as eager-bf16, t5-fp32; all without it"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, eager")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = arguments.steps = 1
        arguments.cells = arguments.cells or ["eager-bf16", "eager-fp32", "bert-bf16", "t5-bf16"]
    return arguments


def main() -> None:
    """Measure and print; the last line is JSON."""
    arguments = parse()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from harness import headline, machine
    from pretrain_sides import shape_of

    shape = shape_of(arguments.quick)
    arguments.batch = 2 if arguments.quick else 8
    arguments.tokens = arguments.batch * shape.max_seq_len
    wanted = [c for c in CELLS if not arguments.cells or "-".join(c) in arguments.cells]
    if not (shutil.which("g++") or shutil.which("clang++")):
        print("No C++ compiler here: the compiled cells are left out.")
        wanted = [c for c in wanted if c[0] != "compiled"]
    workers = {
        how: Worker(how == "tuned", arguments.threads, arguments.quick)
        for how in ("stock", "tuned")
    }
    threads = {how: worker.ask(do="threads") for how, worker in workers.items()}
    others = taken_by_others()
    print(f"threads: {threads}; {arguments.rounds} rounds of {arguments.steps} timed steps")
    if others > 0.1:
        print(
            f"Other programs take {others:.0%} of the CPU. Two spinning threads collapse beside a busy neighbour, "
            "the stock side most of all: these ratios mean little. Repeat on an idle machine."
        )
    cells = {}
    for mode, precision in wanted:
        cell = measure(mode, precision, workers, arguments)
        show(mode, precision, cell)
        cells[f"{mode}-{precision}"] = cell
    name, cell = next(iter(cells.items()))
    ours, peer = (
        statistics.median(cell["tokens_per_s"][side])
        for side in ("ours", "trainer, as users run it")
    )
    line = headline(
        name="pretrain_cpu",
        ours=ours,
        peer=peer,
        ratio=ours / peer,
        unit=f"tokens/s, {name}, against the transformers Trainer as users run it",
        runs=arguments.rounds,
        hardware=machine(threads["tuned"]) | {"cpu_taken_by_others": round(others, 3)},
        packages=("transformers", "accelerate"),
        cells=cells,
        settings_tried=SETTINGS,
    )
    print(json.dumps(line))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()

"""Seconds per RL step on one NVIDIA GPU: the cells of `grpo_cpu.py` on a GPU, against TRL with its transformers backend.

Without a GPU it says so and measures nothing. Never run on a GPU so far: its figures are "not measured".
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import headline, machine


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps per round and side")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No NVIDIA GPU here: nothing is measured.")
        hardware = machine(torch.get_num_threads())
        line = {
            "name": "rl_gpu",
            "ours": None,
            "peer": None,
            "ratio": None,
            "unit": "s/step",
            "runs": 0,
            "hardware": hardware,
            "versions": {"torch": torch.__version__},
            "note": "not measured",
        }
        print(json.dumps(line))
        return
    rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    cells = measure_all(rounds, steps)
    best = cells["natural bf16"]
    line = headline(
        name="rl_gpu",
        ours=statistics.median(best["ours_s"]),
        peer=statistics.median(best["peer_s"]),
        ratio=best["ratio"],
        unit="s/step, bf16, natural lengths, against trl GRPOTrainer",
        runs=len(best["ours_s"]),
        hardware=machine(0),
        packages=("trl", "transformers"),
        cells=cells,
    )
    print(json.dumps(line))


def measure_all(rounds: int, steps: int) -> dict[str, Any]:
    """Measure every cell of the CPU benchmark with both sides on the GPU."""
    from grpo_cpu import measure
    from rl_sides import SHAPE, show, teach_ends

    from distllm.arch.decoder import Decoder
    from distllm.arch.io import save_model
    from distllm.data.chat import end_ids
    from distllm.data.options import DataOptions
    from distllm.data.source import open_source
    from distllm.data.tokenizer import train_tokenizer

    cells = {}
    with tempfile.TemporaryDirectory() as temporary:
        texts = [d.text for d in open_source(DataOptions(name="stdlib"), 0).documents("train")]
        tokenizer = train_tokenizer(texts, SHAPE.vocab_size)
        folders, model = {}, Decoder(SHAPE)
        for lengths in ("full", "natural"):
            if lengths == "natural":
                teach_ends(model, tokenizer.eos_token_id)
            folders[lengths] = Path(temporary) / lengths
            save_model(model, tokenizer, folders[lengths], end_ids=end_ids(tokenizer))
        for lengths, precision in itertools.product(("natural", "full"), ("bf16", "fp32")):
            name = f"{lengths} {precision}"
            cells[name] = measure(
                folders[lengths], tokenizer, precision, 0, rounds, steps, device="cuda"
            )
            show(name, cells[name])
    return cells


if __name__ == "__main__":
    main()

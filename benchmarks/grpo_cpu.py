"""Seconds per GRPO step: distllm against TRL's GRPOTrainer, same model, prompts, reward and dtype, on a CPU.

Model: 4 layers, d_model 256, 4 heads with 2 key/value heads, d_ff 704, vocabulary 4,096. A step samples 32 responses
(4 prompts x 8) of at most 64 tokens, scores them with one function, and makes one AdamW update. Two sets of weights:
*full*: random ones, which hardly ever sample an end token, so that both sides do the same work; *natural*: the same
after a few seconds on random rows in which one token in 24 is an end, so that responses end as they do in practice, some
early and some at the limit. The lengths of both sides are printed.

Both run in one process, one after another in interleaved rounds, with the same number of threads and the same allocator
thresholds (which help the peer too). The peer runs without gradient checkpointing (its default costs time), without a KL
term and with fused AdamW (its defaults). `--tune` times other settings of the peer and writes them into the JSON; without
it `tried` is empty, and nothing says that a faster setting does not exist.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRL_EXPERIMENTAL_SILENCE"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import headline, machine
from rl_sides import (
    GROUP,
    MAX_NEW_TOKENS,
    RESPONSES,
    SHAPE,
    EReward,
    Stepping,
    ceiling,
    describe,
    reward,
    sampling_of,
    show,
    teach_ends,
)

from distllm.arch.decoder import Decoder
from distllm.arch.io import load_model, save_model
from distllm.data.chat import end_ids
from distllm.data.datasets import PromptDataset
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import train_tokenizer
from distllm.engines.base import build_engine
from distllm.engines.hardware import tune_cpu
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.optim.constant import Constant
from distllm.optim.options import AdamWOptions, ScheduleOptions
from distllm.rl.algorithms.grpo import GRPO, GRPOOptions
from distllm.rl.loop import Learning, RolloutSource
from distllm.train.options import TrainOptions


class Ours(Stepping):
    """distllm's GRPO through the same engine, source and step as `distllm train stage=grpo`."""

    def __init__(
        self, folder: Path, tokenizer: Any, precision: str, threads: int, device: str = "cpu"
    ) -> None:
        source = open_source(DataOptions(name="skills", num_prompts=256), 0)
        prompts = PromptDataset(source.prompts("train"), tokenizer, 128)
        model, _ = load_model(folder)
        engine = build_engine(
            "policy",
            model,
            options=EngineOptions(),
            hardware=HardwareOptions(device=device, threads=threads),
            precision=precision,
            optim=AdamWOptions(lr=1e-6),
        )
        algorithm = GRPO(
            GRPOOptions(num_samples=GROUP),
            join=model.join,
            pad_id=tokenizer.pad_token_id,
            temperature=1.0,
            batch_size=RESPONSES,
            max_response_tokens=MAX_NEW_TOKENS,
            on_policy=True,
        )
        train = TrainOptions(global_batch_size=RESPONSES, micro_batch_size=RESPONSES)
        rollouts = RolloutSource(
            prompts,
            {"policy": engine},
            algorithm,
            EReward(),
            sampling_of(tokenizer),
            Learning(
                lr={"policy": 1e-6}, schedule=Constant(ScheduleOptions(), 10**6), options=train
            ),
            0,
        )
        super().__init__(rollouts)


class Peer:
    """TRL's GRPOTrainer."""

    def __init__(self, folder: Path, tokenizer: Any, precision: str, **settings: Any) -> None:
        from datasets import Dataset
        from transformers import AutoModelForCausalLM
        from trl import GRPOConfig, GRPOTrainer

        self.folder, self.tokenizer = folder, tokenizer
        source = open_source(DataOptions(name="skills", num_prompts=256), 0)
        self.prompts = Dataset.from_list([{"prompt": p.messages} for p in source.prompts("train")])
        self.settings = {
            "gradient_checkpointing": False,
            "bf16": precision == "bf16",
            **settings,
        }
        self.dtype = self.settings.pop("weights", torch.float32)
        self.device = self.settings.pop("device", "cpu")
        self.lengths: list[float] = []
        self.phases: dict[str, list[float]] = {}
        spent = {"sample": 0.0, "reward": 0.0}
        self._spent = spent

        class Timed(GRPOTrainer):
            """The trainer with a clock around sampling and rewards; what is left of a step is scoring and update."""

            def _generate(self, *args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                found = super()._generate(*args, **kwargs)
                spent["sample"] += time.perf_counter() - start
                return found

            def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
                start = time.perf_counter()
                found = super()._calculate_rewards(*args, **kwargs)
                spent["reward"] += time.perf_counter() - start
                return found

        self._classes = AutoModelForCausalLM, GRPOConfig, Timed

    def run(self, steps: int, warm_up: int = 1) -> list[float]:
        """Train anew for `warm_up + steps` steps; return the seconds of the last `steps`."""
        from transformers import TrainerCallback

        auto, config_class, trainer_class = self._classes
        ends: list[float] = []
        spent, phases = self._spent, self.phases

        class Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(time.perf_counter())
                if len(ends) > warm_up:
                    rest = ends[-1] - ends[-2] - sum(spent.values())
                    for key, value in (*spent.items(), ("update", rest)):
                        phases.setdefault(key, []).append(value)
                spent.update(dict.fromkeys(spent, 0.0))

        def score(completions: Any, completion_ids: Any, **kwargs: Any) -> list[float]:
            self.lengths.append(statistics.mean(map(len, completion_ids)))
            return reward([c[0]["content"] for c in completions])

        with tempfile.TemporaryDirectory() as output:
            config = config_class(
                output_dir=output,
                max_steps=steps + warm_up,
                per_device_train_batch_size=RESPONSES,
                num_generations=GROUP,
                max_completion_length=MAX_NEW_TOKENS,
                learning_rate=1e-6,
                temperature=1.0,
                use_cpu=self.device == "cpu",
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                dataloader_num_workers=0,
                **self.settings,
            )
            model = auto.from_pretrained(self.folder, dtype=self.dtype)
            trainer = trainer_class(
                model=model,
                reward_funcs=score,
                args=config,
                train_dataset=self.prompts,
                processing_class=self.tokenizer,
                callbacks=[Clock()],
            )
            trainer.train()
        return [b - a for a, b in itertools.pairwise(ends)][-steps:]


def tune(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Time the peer under each setting that could make it faster."""
    tried = [
        ("defaults", {"gradient_checkpointing": True}),
        ("no gradient checkpointing", {}),
        ("static cache", {"cache_implementation": "static"}),
        ("bf16 weights", {"weights": torch.bfloat16}),
    ]
    found = []
    for label, settings in tried:
        try:
            seconds = Peer(folder, tokenizer, "bf16", **settings).run(3)
        except Exception as error:  # a setting the peer refuses is a result too
            found.append({"setting": label, "error": str(error)[:200]})
            continue
        found.append({"setting": label, "seconds": round(statistics.median(seconds), 4)})
        print(f"  peer, {label}: {describe(seconds)}", flush=True)
    return found


def measure(
    folder: Path,
    tokenizer: Any,
    precision: str,
    threads: int,
    rounds: int,
    steps: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure one cell in interleaved rounds."""
    ours = Ours(folder, tokenizer, precision, threads, device)
    peer = Peer(folder, tokenizer, precision, device=device)
    ours.run(2)
    ours.phases.clear()
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        mine += ours.run(steps)
        theirs += peer.run(steps)
    length = statistics.mean(ours.lengths)
    return {
        "ours_s": mine,
        "peer_s": theirs,
        "ratio": statistics.median(theirs) / statistics.median(mine),
        "ceiling_s": ceiling(precision, length, device),
        "response_tokens": {"ours": length, "peer": statistics.mean(peer.lengths)},
        "phases_s": {
            side: {k.removeprefix("time/"): statistics.median(v) for k, v in phases.items()}
            for side, phases in (("ours", ours.phases), ("peer", peer.phases))
        },
    }


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps per round and side")
    parser.add_argument("--tune", action="store_true", help="time the peer's settings first")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    arguments = parser.parse_args()
    rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    hardware = HardwareOptions(device="cpu")
    threads = tune_cpu(hardware)
    with tempfile.TemporaryDirectory() as temporary:
        texts = [d.text for d in open_source(DataOptions(name="stdlib"), 0).documents("train")]
        tokenizer = train_tokenizer(texts, SHAPE.vocab_size)
        folders, model = {}, Decoder(SHAPE)
        for lengths in ("full", "natural"):
            if lengths == "natural":
                teach_ends(model, tokenizer.eos_token_id, 5 if arguments.quick else 60)
            folders[lengths] = Path(temporary) / lengths
            save_model(model, tokenizer, folders[lengths], end_ids=end_ids(tokenizer))
        tried = tune(folders["full"], tokenizer) if arguments.tune else []

        cells: dict[str, dict[str, Any]] = {}
        for lengths, precision in itertools.product(("natural", "full"), ("bf16", "fp32")):
            name = f"{lengths} {precision}"
            cells[name] = measure(folders[lengths], tokenizer, precision, threads, rounds, steps)
            show(name, cells[name])

    best = cells["natural bf16"]
    print(
        json.dumps(
            headline(
                name="grpo_cpu",
                ours=statistics.median(best["ours_s"]),
                peer=statistics.median(best["peer_s"]),
                ratio=best["ratio"],
                unit="s/step, bf16, natural lengths, against trl GRPOTrainer",
                runs=len(best["ours_s"]),
                hardware=machine(threads),
                packages=("trl", "transformers"),
                cells=cells,
                peer_settings={"gradient_checkpointing": False, "beta": 0.0, "tried": tried},
            )
        )
    )


if __name__ == "__main__":
    main()

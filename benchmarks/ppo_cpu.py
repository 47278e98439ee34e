"""Seconds per PPO step: distllm against the last PPOTrainer that TRL has released (1.12.0), on a CPU.

TRL took its PPO out after 1.12.0. That version runs beside the current transformers without its own pins:

    pip install --no-deps --target DIR trl==1.12.0
    python benchmarks/ppo_cpu.py --peer DIR          # or TRL_PPO_DIR=DIR

Model: as in `grpo_cpu.py` (4 layers, d_model 256, 4 heads with 2 key/value heads, d_ff 704, vocabulary 4,096), four times:
policy, value model, reference, and a reward model of the same shape. A step samples a response of at most 64 tokens to
each of 32 prompts, scores it with the reward model, the reference and the value model, and makes two updates of policy
and value model from all 32. Equal on both sides: prompts, weights of the policy and the reward model, temperature 1, KL 0.05
in the reward, clips of 0.2, gamma 1, lambda 0.95, learning rate. *Full* and *natural* lengths as in `grpo_cpu.py`.

TRL's PPO does not autocast, so in the bf16 cells its four models hold bf16 weights (less work than ours, whose trained
weights are fp32 under autocast). Both run in one process in interleaved rounds, with the same threads and the same
allocator thresholds (which help the peer too).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
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
    MAX_NEW_TOKENS,
    RESPONSES,
    SHAPE,
    Stepping,
    ceiling,
    describe,
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
from distllm.rl.algorithms.ppo import PPO, PPOOptions
from distllm.rl.loop import Learning, RolloutSource
from distllm.rl.rewards.model import RewardModel
from distllm.train.options import TrainOptions

EPOCHS, KL, LR = 2, 0.05, 1e-6
NUM_PROMPTS = 256


def prompts_of(tokenizer: Any) -> PromptDataset:
    """Return the prompts that both sides answer."""
    source = open_source(DataOptions(name="skills", num_prompts=NUM_PROMPTS), 0)
    return PromptDataset(source.prompts("train"), tokenizer, 128)


class Ours(Stepping):
    """distllm's PPO through the same engines, source and step as `distllm train stage=ppo`."""

    def __init__(self, folders: dict[str, Path], tokenizer: Any, precision: str) -> None:
        def engine(role: str, model: Any, trained: bool) -> Any:
            return build_engine(
                role,
                model,
                options=EngineOptions(),
                hardware=HardwareOptions(device="cpu"),
                precision=precision,
                optim=AdamWOptions(lr=LR) if trained else None,
            )

        model, _ = load_model(folders["policy"])
        pad_id = tokenizer.pad_token_id
        engines = {
            "policy": engine("policy", model, True),
            "reference": engine("reference", load_model(folders["policy"])[0], False),
            "value": engine("value", load_model(folders["policy"], head="value")[0], True),
            "reward": engine("reward", load_model(folders["reward"])[0], False),
        }
        algorithm = PPO(
            PPOOptions(num_epochs=EPOCHS, kl_coef=KL),
            join=model.join,
            pad_id=pad_id,
            temperature=1.0,
            batch_size=RESPONSES,
            max_response_tokens=MAX_NEW_TOKENS,
            on_policy=False,
        )
        train = TrainOptions(global_batch_size=RESPONSES, micro_batch_size=RESPONSES)
        source = RolloutSource(
            prompts_of(tokenizer),
            engines,
            algorithm,
            RewardModel(engines["reward"], join=model.join, pad_id=pad_id, batch_size=RESPONSES),
            sampling_of(tokenizer),
            Learning(
                lr={"policy": LR, "value": LR},
                schedule=Constant(ScheduleOptions(), 10**6),
                options=train,
            ),
            0,
        )
        super().__init__(source)


class Peer:
    """TRL's PPOTrainer."""

    def __init__(self, folders: dict[str, Path], tokenizer: Any, precision: str) -> None:
        from datasets import Dataset

        self.folders, self.tokenizer = folders, tokenizer
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        prompts = prompts_of(tokenizer)
        self.prompts = Dataset.from_list(
            [{"input_ids": prompts[i].prompt_ids} for i in range(len(prompts))]
        )
        self.lengths: list[float] = []
        self.phases: dict[str, list[float]] = {}

    def run(self, steps: int, warm_up: int = 1) -> list[float]:
        """Train anew for `warm_up + steps` steps; return the seconds of the last `steps`."""
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            TrainerCallback,
        )
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        ends, spent, lengths = [], {"sample": 0.0}, []
        pad_id, stop_id = self.tokenizer.pad_token_id, end_ids(self.tokenizer)[0]

        class Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append((time.perf_counter(), spent["sample"]))
                spent["sample"] = 0.0

        generate = ppo_trainer.batch_generation

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = generate(*args, **kwargs)
            spent["sample"] += time.perf_counter() - start
            responses = found[0][:, args[1].shape[1] :]
            stops = (responses == stop_id) | (responses == pad_id)
            first = torch.where(stops.any(1), stops.int().argmax(1) + 1, responses.shape[1])
            lengths.append(first.double().mean().item())
            return found

        def judge(folder: Path, **kwargs: Any) -> Any:
            auto = AutoModelForSequenceClassification
            return auto.from_pretrained(folder, num_labels=1, dtype=self.dtype, **kwargs)

        with tempfile.TemporaryDirectory() as output:
            config = PPOConfig(
                output_dir=output,
                total_episodes=RESPONSES * (steps + warm_up),
                per_device_train_batch_size=RESPONSES,
                gradient_accumulation_steps=1,
                num_mini_batches=1,
                num_ppo_epochs=EPOCHS,
                response_length=MAX_NEW_TOKENS,
                stop_token_id=stop_id,
                temperature=1.0,
                kl_coef=KL,
                learning_rate=LR,
                num_sample_generations=0,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            )
            policy, reference = (
                AutoModelForCausalLM.from_pretrained(self.folders["policy"], dtype=self.dtype)
                for _ in range(2)
            )
            trainer = PPOTrainer(
                args=config,
                processing_class=self.tokenizer,
                model=policy,
                ref_model=reference,
                reward_model=judge(self.folders["reward"]),
                value_model=judge(self.folders["policy"]),
                train_dataset=self.prompts,
                eval_dataset=self.prompts.select(range(1)),
                callbacks=[Clock()],
            )
            ppo_trainer.batch_generation = timed
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # its own report
                    trainer.train()
            finally:
                ppo_trainer.batch_generation = generate
        self.lengths += lengths[-steps:]
        seconds = [b[0] - a[0] for a, b in itertools.pairwise(ends)][-steps:]
        for whole, (_, sampling) in zip(seconds, ends[-steps:], strict=True):
            self.phases.setdefault("sample", []).append(sampling)
            self.phases.setdefault("score and update", []).append(whole - sampling)
        return seconds


def measure(
    folders: dict[str, Path],
    tokenizer: Any,
    precision: str,
    rounds: int,
    steps: int,
    has_peer: bool,
) -> dict[str, Any]:
    """Measure one cell in interleaved rounds."""
    ours = Ours(folders, tokenizer, precision)
    peer = Peer(folders, tokenizer, precision) if has_peer else None
    ours.run(1)
    ours.phases.clear()
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        mine += ours.run(steps)
        theirs += peer.run(steps) if peer else []
    length = statistics.mean(ours.lengths)
    sides: list[tuple[str, Any]] = [("ours", ours), *([("peer", peer)] if peer else [])]
    return {
        "ours_s": mine,
        "peer_s": theirs,
        "ratio": statistics.median(theirs) / statistics.median(mine) if theirs else None,
        # Policy and reference also read once, value and reward model too; these two have no output matrix.
        "ceiling_s": ceiling(precision, length, updates=EPOCHS + 2 / 3, bare=3 * EPOCHS + 2),
        "response_tokens": {side: statistics.mean(s.lengths) for side, s in sides},
        "phases_s": {
            side: {k.removeprefix("time/"): statistics.median(v) for k, v in s.phases.items()}
            for side, s in sides
        },
    }


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps per round and side")
    parser.add_argument("--peer", help="directory that trl 1.12.0 was installed to")
    parser.add_argument("--quick", action="store_true", help="one short round: shows that it runs")
    arguments = parser.parse_args()
    rounds, steps = (1, 1) if arguments.quick else (arguments.rounds, arguments.steps)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if folder := arguments.peer or os.environ.get("TRL_PPO_DIR"):
        sys.path.insert(0, folder)
    has_peer = importlib.util.find_spec("trl") is not None
    has_peer = has_peer and importlib.util.find_spec("trl.experimental.ppo") is not None
    if not has_peer:
        print("No trl with a PPOTrainer here (see --help): ours is timed alone.")

    threads = tune_cpu(HardwareOptions(device="cpu"))
    cells: dict[str, dict[str, Any]] = {}
    lengths_of = ("natural",) if arguments.quick else ("natural", "full")
    with tempfile.TemporaryDirectory() as temporary:
        texts = [d.text for d in open_source(DataOptions(name="stdlib"), 0).documents("train")]
        tokenizer = train_tokenizer(texts, SHAPE.vocab_size)
        tokenizer.padding_side = "left"
        reward = Path(temporary) / "reward"
        save_model(Decoder(SHAPE, head="last", seed=1), tokenizer, reward)
        for lengths in lengths_of:
            model = Decoder(SHAPE)
            if lengths == "natural":
                teach_ends(model, end_ids(tokenizer)[0], 5 if arguments.quick else 60)
            folders = {"policy": Path(temporary) / lengths, "reward": reward}
            save_model(model, tokenizer, folders["policy"], end_ids=end_ids(tokenizer))
            for precision in ("fp32",) if arguments.quick else ("bf16", "fp32"):
                name = f"{lengths} {precision}"
                cells[name] = measure(folders, tokenizer, precision, rounds, steps, has_peer)
                if has_peer:
                    show(name, cells[name])
                else:
                    print(f"{name}\n  distllm  {describe(cells[name]['ours_s'])}")
    first, best = next(iter(cells.items()))
    peer = statistics.median(best["peer_s"]) if has_peer else None
    line = headline(
        name="ppo_cpu",
        ours=statistics.median(best["ours_s"]),
        peer=peer or 0.0,
        ratio=best["ratio"] or 0.0,
        unit=f"s/step, {first} lengths, against trl PPOTrainer",
        runs=len(best["ours_s"]),
        hardware=machine(threads),
        packages=("transformers",),
        cells=cells,
    )
    if has_peer:
        import trl

        line["versions"]["trl"] = trl.__version__
    else:
        line |= {"peer": None, "ratio": None}
    print(json.dumps(line))


if __name__ == "__main__":
    main()

"""Training tokens per second of SFT on a CPU: distllm against TRL's SFTTrainer with packing.

Model: 6 layers, d_model 384, d_ff 1,024, vocabulary 8,192, tied. Data: 48 dialogues of 16 to 512 tokens cut from Python's
documentation, of which the assistant's tokens alone are learned. Both sides get the same token ids and labels, start from
the same weights, and use AdamW without decay, one learning rate, clipping at 1 and no gradient checkpointing (TRL's
default costs time). A round is one epoch: every dialogue once. Tokens are those of the dialogues, padding not counted.

Ours is what `distllm train stage=sft` runs: the sampler, packing, the engine, the optimizer step. TRL packs its rows of 512
once for the run (`bfd`); how many of them go through the model at a time is tried out, and the fastest setting is the
peer. *Wrapped* packing, which lets dialogues see each other, and padded rows are timed beside it.

Both run in one process, one after another in interleaved rounds, with the same threads and the same allocator thresholds
(which help the peer too). An untimed epoch comes first; transformers' own model says what loss each side's weights have
before and after it, in fp32 on padded rows. The ceiling is the bare matrix products of the linear layers, the output
matrix at the labels alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
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

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from harness import headline, machine

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.hf.llama import FAMILY
from distllm.data.datasets import ChatDataset, ChatExample
from distllm.data.options import DataOptions
from distllm.data.source import open_source
from distllm.data.tokenizer import train_tokenizer
from distllm.engines.base import build_engine
from distllm.engines.hardware import tune_cpu
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.layers.products import product_dtype
from distllm.objectives.sft import SFT, SFTOptions
from distllm.optim.constant import Constant
from distllm.optim.options import AdamWOptions, ScheduleOptions
from distllm.train.micro_batches import filling
from distllm.train.options import TrainOptions
from distllm.train.source import SampleSource
from distllm.train.step import optimizer_step
from distllm.types import IGNORE_INDEX, Dialogue

LR = 3e-4
ROW = 512
SHAPE = DecoderOptions(
    vocab_size=8192, d_model=384, n_layers=6, n_heads=6, n_kv_heads=6, d_ff=1024, max_seq_len=ROW
)
SMALL = DecoderOptions(
    vocab_size=1024, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=64, max_seq_len=ROW
)


def dialogues(count: int, vocab_size: int) -> tuple[list[ChatExample], Any]:
    """Return `count` dialogues of uneven lengths (median 120 tokens, one in three with a second turn), and the tokenizer."""
    source = open_source(DataOptions(name="stdlib"), 0)
    texts = [d.text for d in source.documents("train")]
    tokenizer = train_tokenizer(texts, vocab_size)
    words, at = " ".join(texts).split(" "), 0
    rng = np.random.default_rng(0)
    records = []
    for index in range(4 * count):
        length, messages = round(float(np.exp(rng.normal(math.log(60), 0.9)))), []
        for role in ("user", "assistant", "user", "assistant")[: 4 if index % 3 == 0 else 2]:
            part = max(2, length // (3 if role == "user" else 2))
            messages.append({"role": role, "content": " ".join(words[at : at + part])})
            at = (at + part) % (len(words) - 4000)
        records.append(Dialogue(messages=messages))
    warnings.simplefilter("ignore")
    data = ChatDataset(records, tokenizer, ROW, DataOptions(on_long="skip", on_bad_line="skip"))
    kept = [data[i] for i in range(len(data)) if len(data[i].input_ids) >= 16][:count]
    return [ChatExample(e.input_ids, e.mask, i) for i, e in enumerate(kept)], tokenizer


def labels_of(example: ChatExample) -> list[int]:
    """Return the ids that are learned, IGNORE_INDEX elsewhere, not shifted."""
    return [
        t if on else IGNORE_INDEX for t, on in zip(example.input_ids, example.mask, strict=True)
    ]


def hf_model(shape: DecoderOptions, state: dict[str, Any] | None = None) -> Any:
    """Return transformers' model with `state`, or with our initial weights."""
    import transformers

    config, tensors = FAMILY.to_hf(shape, state or Decoder(shape).state_dict(), "lm")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    return model


def loss_of(model: Any, examples: list[ChatExample]) -> float:
    """Return transformers' mean loss over the learned tokens, in fp32, a dialogue at a time."""
    total = count = 0
    model = model.eval()
    for example in examples[:64]:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(labels_of(example)[1:])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
        count += int((labels != IGNORE_INDEX).sum())
    return total / count


class Ours:
    """distllm's SFT through the same engine, source and step as `distllm train stage=sft`."""

    def __init__(
        self, shape: DecoderOptions, examples: list[ChatExample], precision: str, per_step: int, pack: bool = True
    ) -> None:  # fmt: skip
        self.shape = shape
        self.engine = build_engine(
            "model",
            Decoder(shape),
            options=EngineOptions(),
            hardware=HardwareOptions(device="cpu"),
            precision=precision,
            optim=AdamWOptions(lr=LR, beta2=0.999, weight_decay=0.0),
        )
        train = TrainOptions(global_batch_size=per_step, micro_batch_size=per_step)
        schedule = Constant(ScheduleOptions(), 10**6)
        objective = SFT(SFTOptions(pack=pack), pad_id=0, longest_row=ROW)
        self.source = SampleSource(examples, self.engine, objective, schedule, LR, train, 0)
        self.steps, self.step, self.fill = len(examples) // per_step, 0, [0, 0]

    def epoch(self) -> float:
        """Train on every dialogue once; return the seconds."""
        start = time.perf_counter()
        for _ in range(self.steps):
            (work,), _ = self.source.next(self.step)
            optimizer_step(work.engine, work.objective, work.micro_batches, work.lr)
            self.step += 1
            for batch in work.micro_batches:
                places, filled, _, _ = filling(batch)
                self.fill = [self.fill[0] + places, self.fill[1] + filled]
        return time.perf_counter() - start

    def loss(self, examples: list[ChatExample]) -> float:
        """Let transformers judge the weights."""
        return loss_of(hf_model(self.shape, self.engine.model.state_dict()), examples)


class Peer:
    """TRL's SFTTrainer."""

    def __init__(
        self, shape: DecoderOptions, examples: list[ChatExample], tokenizer: Any, precision: str, **settings: Any
    ) -> None:  # fmt: skip
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        ends = self.ends = {"begin": 0.0, "end": 0.0}

        class Clock(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                ends["begin"] = time.perf_counter()

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                ends["end"] = time.perf_counter()

        rows = [{"input_ids": e.input_ids, "labels": labels_of(e)} for e in examples]
        self.folder = tempfile.TemporaryDirectory()
        config = SFTConfig(
            output_dir=self.folder.name,
            num_train_epochs=1,
            max_length=ROW,
            learning_rate=LR,
            lr_scheduler_type="constant",
            bf16=precision == "bf16",
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        )
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of the packing
            self.trainer = SFTTrainer(
                model=hf_model(shape),
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        self.rows = len(self.trainer.train_dataset)

    def epoch(self) -> float:
        """Train on every dialogue once; return the seconds."""
        with contextlib.redirect_stdout(io.StringIO()):  # its own report
            self.trainer.train()
        return self.ends["end"] - self.ends["begin"]

    def loss(self, examples: list[ChatExample]) -> float:
        """Judge the weights."""
        return loss_of(self.trainer.model, examples)


def settings_of(rows_per_step: int, per_step: int) -> dict[str, dict[str, Any]]:
    """Return what the peer is tried with; the first ones keep dialogues apart."""
    found: dict[str, dict[str, Any]] = {}
    for size in (1, 2, rows_per_step):
        found[f"bfd, {size} at a time"] = {
            "packing": True,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": rows_per_step // size,
        }
    found["wrapped"] = {
        "packing": True,
        "packing_strategy": "wrapped",
        "per_device_train_batch_size": rows_per_step,
    }
    found["padded"] = {"per_device_train_batch_size": per_step}
    return found


def measure(
    shape: DecoderOptions, examples: list[ChatExample], tokenizer: Any, precision: str, rounds: int
) -> dict[str, Any]:
    """Measure one cell in interleaved rounds."""
    tokens = sum(len(e.input_ids) for e in examples)
    rows_per_step = 8
    steps = math.ceil(tokens / ROW / rows_per_step)
    per_step = next(n for n in range(len(examples) // steps, 0, -1) if len(examples) % n == 0)
    ours = {
        name: Ours(shape, examples, precision, per_step, pack)
        for name, pack in (("packed", True), ("padded", False))
    }
    peers = {
        name: Peer(shape, examples, tokenizer, precision, **settings)
        for name, settings in settings_of(rows_per_step, per_step).items()
    }
    sides = {f"ours, {k}": v for k, v in ours.items()} | {f"trl, {k}": v for k, v in peers.items()}
    before = {name: side.loss(examples) for name, side in sides.items()}
    assert max(before.values()) - min(before.values()) < 1e-4, f"unequal weights: {before}"
    for side in sides.values():
        side.epoch()
    after = {name: side.loss(examples) for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for number in range(rounds):
        at = number % len(order)
        for name in [*order[at:], *order[:at]]:
            seconds[name].append(sides[name].epoch())
    speeds = {name: tokens / statistics.median(s) for name, s in seconds.items()}
    isolated = [name for name in speeds if name.startswith("trl, bfd")]
    best = max(isolated, key=lambda name: speeds[name])
    places, filled = ours["packed"].fill
    return {
        "tokens_per_s": speeds,
        "epochs_s": seconds,
        "peer": best,
        "ratio": speeds["ours, packed"] / speeds[best],
        "ceiling": tokens / products(shape, examples, precision),
        "loss": {"before": before, "after one epoch": after},
        "dialogues": len(examples),
        "tokens": tokens,
        "dialogues_per_step": per_step,
        "steps": {"ours": len(examples) // per_step, "peer": math.ceil(peers["bfd, 1 at a time"].rows / rows_per_step)},
        "filled": {"ours": filled / places, "peer": tokens / (ROW * peers["bfd, 1 at a time"].rows)},
    }  # fmt: skip


def products(shape: DecoderOptions, examples: list[ChatExample], precision: str) -> float:
    """Return the seconds that the bare matrix products of an epoch take: one forward, two backwards."""
    dtype = product_dtype(torch.bfloat16 if precision == "bf16" else torch.float32, "cpu")
    d, rows = shape.d_model, 4096
    layer = [(d, d)] * 4 + [(d, shape.d_ff)] * 2 + [(shape.d_ff, d)]
    tokens = sum(len(e.input_ids) for e in examples)
    learned = sum(sum(e.mask) for e in examples)

    def once(shapes: list[tuple[int, int]]) -> float:
        cases = [
            [torch.randn(s, dtype=dtype) for s in ((rows, i), (o, i), (rows, o))] for i, o in shapes
        ]
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            for x, weight, grad in cases:
                F.linear(x, weight)
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)
            runs.append(time.perf_counter() - start)
        return min(runs) / rows

    return tokens * once(layer * shape.n_layers) + learned * once([(d, shape.vocab_size)])


def show(name: str, cell: dict[str, Any]) -> None:
    """Print one cell."""
    after = cell["loss"]["after one epoch"]
    print(f"{name}: {cell['dialogues']} dialogues, {cell['tokens']} tokens an epoch")
    for side, speed in cell["tokens_per_s"].items():
        slow, fast = (cell["tokens"] / f(cell["epochs_s"][side]) for f in (max, min))
        print(
            f"  {side:22s} {speed:8.0f} tokens/s ({slow:.0f} to {fast:.0f}), "
            f"loss {cell['loss']['before'][side]:.3f} -> {after[side]:.3f}"
        )
    print(
        f"  ratio {cell['ratio']:.2f} against {cell['peer']}; rows filled {cell['filled']['ours']:.2f} and "
        f"{cell['filled']['peer']:.2f}; the bare matrix products reach {cell['ceiling']:.0f} tokens/s",
        flush=True,
    )


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", nargs="*", default=["bf16", "fp32"])
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it runs")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if arguments.quick:
        arguments.cells = arguments.cells[-1:]
    rounds, count, shape = (1, 12, SMALL) if arguments.quick else (arguments.rounds, 48, SHAPE)
    threads = tune_cpu(HardwareOptions(device="cpu"))
    examples, tokenizer = dialogues(count, shape.vocab_size)
    cells = {}
    for precision in arguments.cells:
        cells[precision] = measure(shape, examples, tokenizer, precision, rounds)
        show(precision, cells[precision])
    first = cells[arguments.cells[0]]
    print(
        json.dumps(
            headline(
                name="sft_cpu",
                ours=first["tokens_per_s"]["ours, packed"],
                peer=first["tokens_per_s"][first["peer"]],
                ratio=first["ratio"],
                unit=f"tokens/s, {arguments.cells[0]}, against trl SFTTrainer with packing ({first['peer']})",
                runs=rounds,
                hardware=machine(threads),
                packages=("trl", "transformers"),
                cells=cells,
            )
        )
    )


if __name__ == "__main__":
    main()

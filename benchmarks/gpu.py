"""Training on one NVIDIA GPU: tokens/s, utilisation and peak memory of published models, and of peers that are installed.

Each model runs in a process of its own, through the engine and the optimizer step that `distllm train` uses: bf16, compiled
blocks, the attention kernel that `hardware.attention=auto` picks, and the least activation checkpointing that fits. Rows
are full and hold one document each; the first steps (compilation) are not timed.

Reported per model: tokens/s, model FLOPs utilisation in both published conventions against the datasheet's dense bf16 rate,
the share of what large bf16 products reach on this very GPU, and peak memory. transformers' Trainer trains the same shape
in the same run where transformers is installed and has the architecture. torchtitan trains from files of its own, so its
command is for the reader: it is named when it is installed, and not measured.

Exit codes: 0 measured; 3 there is no NVIDIA GPU here, nothing was measured; 1 a model failed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import sys
import time
from queue import Empty
from typing import Any

from harness import headline, machine

MODELS: dict[str, dict[str, Any]] = {
    "gpt2_124m": {"seq_len": 1024, "batch": 32},
    "gpt2_350m": {"seq_len": 1024, "batch": 16},
    "llama3_1b": {"seq_len": 2048, "batch": 8},
    "llama3_1b_8k": {"arch": "llama3_1b", "seq_len": 8192, "batch": 2},
    "llama3_3b": {"seq_len": 2048, "batch": 4},
    "bert_large": {"seq_len": 512, "batch": 32},
    "t5_large": {"seq_len": 512, "batch": 16},
}
"""Row -> preset (its own name, if none is given), tokens in a row, rows in a micro-batch."""
TARGETS = {"gpt2_124m": 0.45, "gpt2_350m": 0.45, "llama3_1b": 0.55, "llama3_3b": 0.55}
"""Model FLOPs utilisation that is aimed at on one H100 or H200."""
LEFT_OUT = {
    "llama3_8b": "needs optimizer states in bf16 to fit one GPU of 80 GB, which optim=adamw does not keep yet"
}
CHECKPOINTING = ("none", "selective", "full")
"""Tried in this order; the first that fits is measured."""
NO_GPU = 3


def batch_of(options: Any, case: dict[str, Any], seed: int) -> Any:
    """Draw full rows of random tokens; a masked model has a label on 15% of them."""
    import torch

    from distllm.types import IGNORE_INDEX, Batch

    generator = torch.Generator().manual_seed(seed)
    shape = case["batch"], case["seq_len"]
    ids = torch.randint(10, options.vocab_size, shape, generator=generator)
    if options.name == "encoder_decoder":
        target = ids[:, : case["seq_len"] // 4]
        return Batch(input_ids=ids, decoder_input_ids=target, labels=target.clone())
    labels = ids.clone()
    if options.name == "encoder":
        labels[torch.rand(shape, generator=generator) > 0.15] = IGNORE_INDEX
    return Batch(input_ids=ids, labels=labels)


def timed(step: Any, warm_up: int, steps: int) -> float:
    """Return the mean seconds of a step; the device is waited for once, at the end."""
    import torch

    for _ in range(warm_up):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def ours(row: str, case: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Measure one model, with as little recomputation as fits."""
    import torch

    from distllm import registry
    from distllm.config.compose import compose
    from distllm.config.flops import model_flops
    from distllm.config.footprint import build_meta
    from distllm.engines.base import build_engine
    from distllm.engines.peak import measured_peak, peak_flops_per_s
    from distllm.objectives.clm import CLM
    from distllm.objectives.options import PretrainOptions
    from distllm.train.step import optimizer_step

    for kind in CHECKPOINTING:
        config = compose(
            [f"arch={case.get('arch', row)}", "hardware.device=cuda", "train.precision=bf16",
             f"train.seq_len={case['seq_len']}", "engine.compile=true",
             f"engine.activation_checkpointing={kind}", "run.dir=unused"]
        )  # fmt: skip
        model: Any = registry.get("arch", config.arch.name)(config.arch)
        engine: Any = build_engine(
            "model", model, options=config.engine, hardware=config.hardware, precision="bf16", optim=config.optim
        )  # fmt: skip
        objective = CLM(PretrainOptions(), pad_id=0)
        batch = batch_of(config.arch, case, seed=0)
        try:
            seconds = timed(
                lambda e=engine, o=objective, b=batch: optimizer_step(e, o, [b], lr=1e-4),
                given.warm_up,
                given.steps,
            )
            break
        except torch.cuda.OutOfMemoryError:
            engine.close()
            del engine, model
            gc.collect()
            torch.cuda.empty_cache()
    else:
        raise RuntimeError(f"{row} does not fit this GPU, even with activation_checkpointing=full")
    costs = model_flops(build_meta(config.arch))
    tokens = batch.input_ids.numel()
    source, peak = peak_flops_per_s(config.hardware, engine.device, engine.dtype, {})
    reached = measured_peak(engine.device, engine.dtype, {})[1]
    full, half = (costs(batch, causal_half=c) / seconds for c in (False, True))
    return {
        "model": row,
        "tokens_per_s": tokens / seconds,
        "mfu": full / peak,
        "mfu_causal": half / peak,
        "measured_peak_share": full / reached,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "activation_checkpointing": kind,
        "attention": None if engine.attention is None else engine.attention.name,
        "yardstick": source,
    }


def trainers(row: str, case: dict[str, Any], given: argparse.Namespace) -> dict[str, Any] | None:
    """Measure transformers' class of the same shape under its Trainer; None = it has none."""
    import tempfile

    import torch
    import transformers

    from distllm import registry
    from distllm.arch.io import save_model
    from distllm.config.compose import compose

    config = compose([f"arch={case.get('arch', row)}", "run.dir=unused"])
    batch = batch_of(config.arch, case, seed=0)
    kind = {"encoder": "AutoModelForMaskedLM", "encoder_decoder": "AutoModelForSeq2SeqLM"}
    cls = getattr(transformers, kind.get(config.arch.name, "AutoModelForCausalLM"))
    with tempfile.TemporaryDirectory() as folder:
        save_model(registry.get("arch", config.arch.name)(config.arch), None, folder)
        model = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        rows = [
            {"input_ids": i, "labels": x}
            for i, x in zip(batch.input_ids, batch.labels, strict=True)
        ] * (given.warm_up + given.steps)
        times: list[float] = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                torch.cuda.synchronize()
                times.append(time.perf_counter())

        settings = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=case["batch"], max_steps=given.warm_up + given.steps,
            bf16=True, torch_compile=True, optim="adamw_torch_fused", report_to=[], save_strategy="no",
            logging_strategy="no", dataloader_num_workers=0, remove_unused_columns=False,
        )  # fmt: skip
        transformers.Trainer(model, settings, train_dataset=rows, callbacks=[Clock()]).train()
    seconds = (times[-1] - times[given.warm_up - 1]) / given.steps
    return {"model": row, "tokens_per_s": batch.input_ids.numel() / seconds}


SIDES = {"ours": ours, "trainer": trainers}


def serve(side: str, row: str, case: dict[str, Any], given: Any, queue: Any) -> None:
    """Measure in a process of its own, whose memory ends with it."""
    try:
        queue.put(SIDES[side](row, case, given))
    except Exception as error:  # told to the parent, which goes on with the next model
        queue.put({"model": row, "error": f"{type(error).__name__}: {error}"})


def apart(side: str, row: str, case: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Run `serve` and return what it found."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    process = context.Process(target=serve, args=(side, row, case, given, queue))
    process.start()
    try:
        return queue.get(timeout=given.limit_s)
    except Empty:
        return {"model": row, "error": f"no answer within {given.limit_s} s"}
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--limit-s", type=int, default=900, help="for one model of one side")
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()

    import torch

    if not torch.cuda.is_available() or torch.version.cuda is None:
        print("No NVIDIA GPU here: nothing was measured. Run this on a machine that has one.")
        print(
            json.dumps(
                {"name": "gpu", "measured": False, "hardware": machine(torch.get_num_threads())}
            )
        )
        return NO_GPU
    for row, why in LEFT_OUT.items():
        print(f"{row}: not measured: {why}.")
    if importlib.util.find_spec("torchtitan"):
        print(
            "torchtitan is installed: not measured, it starts from its own files (torchtitan.train)."
        )
    peers = not given.no_peers and importlib.util.find_spec("transformers") is not None
    found, other = [], {}
    for row in given.models:
        result = apart("ours", row, MODELS[row], given)
        found.append(result)
        print(json.dumps(result), flush=True)
        if peers and "error" not in result:
            other[row] = apart("trainer", row, MODELS[row], given)
            print("transformers Trainer:", json.dumps(other[row]), flush=True)
        if "error" not in result and row in TARGETS:
            print(f"  aim on one H100 or H200: {TARGETS[row]:.0%}; here {result['mfu']:.1%}")
    done = [r for r in found if "error" not in r]
    if done:
        first = done[0]
        peer = other.get(first["model"], {}).get("tokens_per_s", 0.0)
        ratio = first["tokens_per_s"] / peer if peer else 0.0
        hardware = machine(torch.get_num_threads())
        print(json.dumps(headline(
            name="gpu", ours=first["tokens_per_s"], peer=peer, ratio=ratio, unit="tokens/s", runs=given.steps,
            hardware=hardware, packages=["transformers"] if peers else [], rows=found, trainer=other,
        )))  # fmt: skip
    return 0 if len(done) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())

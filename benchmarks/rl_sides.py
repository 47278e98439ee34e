"""What the benchmarks of reinforcement learning share: the model, its weights, the reward, the ceiling, the table."""

from __future__ import annotations

import statistics
import time
from typing import Any, ClassVar

import torch

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.data.chat import end_ids
from distllm.data.packing import PackedRow
from distllm.engines.base import build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.generation.options import GenerationOptions
from distllm.layers.products import product_dtype
from distllm.objectives.clm import CLM
from distllm.objectives.options import PretrainOptions
from distllm.optim.options import AdamWOptions
from distllm.rl.loop import RolloutSource, Sampling
from distllm.train.step import optimizer_step

NUM_PROMPTS, GROUP, MAX_NEW_TOKENS = 4, 8, 64
RESPONSES = NUM_PROMPTS * GROUP
END_EVERY = 24
"""Mean length of what the model of the natural cells has seen between two ends."""
SHAPE = DecoderOptions(
    vocab_size=4096, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=704, max_seq_len=256
)


def reward(texts: list[str]) -> list[float]:
    """Score a text by its share of the letter e: cheap, and spread out."""
    return [text.count("e") / max(1, len(text)) for text in texts]


def teach_ends(model: Decoder, end: int, steps: int = 60) -> None:
    """Train `model` on random tokens of which one in `END_EVERY` is `end`."""
    engine = build_engine(
        "policy",
        model,
        options=EngineOptions(),
        hardware=HardwareOptions(device="cpu"),
        precision="fp32",
        optim=AdamWOptions(),
    )
    objective = CLM(PretrainOptions(), pad_id=0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(0, SHAPE.vocab_size, (16, 97), generator=generator)
        rows[torch.rand(rows.shape, generator=generator) < 1 / END_EVERY] = end
        packed = [PackedRow(r[:-1], r[1:], torch.ones_like(r[1:]), i) for i, r in enumerate(rows)]
        rate = 2e-3 * min(1.0, (steps - step) / 20)
        optimizer_step(engine, objective, [objective.collate(packed)], rate)
    engine.close()


def sampling_of(tokenizer: Any) -> Sampling:
    """Return how ours samples: at temperature 1, up to the same length as the peer."""
    return Sampling(
        options=GenerationOptions(max_new_tokens=MAX_NEW_TOKENS),
        end_ids=end_ids(tokenizer),
        pad_id=tokenizer.pad_token_id,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
    )


class Stepping:
    """Our side once it is built: takes steps as the training loop does, and keeps the time of each phase."""

    def __init__(self, source: RolloutSource) -> None:
        self.source, self.step = source, 0
        self.lengths: list[float] = []
        self.phases: dict[str, list[float]] = {}

    def run(self, steps: int) -> list[float]:
        """Run `steps` steps, each of one batch of responses and its updates; return the seconds of each."""
        seconds = []
        for _ in range(steps):
            start, spent = time.perf_counter(), {}
            for _ in range(self.source.updates_per_rollout):
                handed = self.source.next(self.step)
                assert handed is not None
                work, metrics = handed
                for part in work:
                    optimizer_step(part.engine, part.objective, part.micro_batches, part.lr)
                self.step += 1
                if "rl/response_length" in metrics:
                    self.lengths.append(metrics["rl/response_length"])
                    spent = {k: v for k, v in metrics.items() if k.startswith("time/")}
            seconds.append(time.perf_counter() - start)
            spent["time/update_s"] = seconds[-1] - sum(spent.values())
            for key, value in spent.items():
                self.phases.setdefault(key, []).append(value)
        return seconds


class EReward:
    """`reward` in distllm's form."""

    problems: ClassVar[dict[int, str]] = {}

    def score(self, prompts: Any, rollouts: Any, texts: list[str]) -> list[float]:
        """Score each text."""
        return reward(texts)

    def close(self) -> None:
        """Nothing to give back."""


def ceiling(
    precision: str, length: float, device: str = "cpu", updates: float = 1, bare: float = 0
) -> float:
    """Return the seconds that the step's bare matrix products take: decoding, one forward, two backwards.

    Decoding counts `RESPONSES` rows for `length` tokens each, as if rows that ended were replaced at no cost. `updates` counts passes of forward and backward
    over all tokens, `bare` single products of models without an output matrix.
    """
    dtype = product_dtype(torch.bfloat16 if precision == "bf16" else torch.float32, device)
    d, kv = SHAPE.d_model, SHAPE.d_model // 2
    layer = [(d, d), (d, kv), (d, kv), (d, d), (d, SHAPE.d_ff), (d, SHAPE.d_ff), (SHAPE.d_ff, d)]
    weights = [torch.randn(o, i, dtype=dtype, device=device) for i, o in layer * SHAPE.n_layers]
    weights.append(torch.randn(SHAPE.vocab_size, d, dtype=dtype, device=device))

    def products(rows: int, factor: float, weights: list[torch.Tensor] = weights) -> float:
        inputs = {
            w.shape[1]: torch.randn(rows, w.shape[1], dtype=dtype, device=device) for w in weights
        }
        runs = []
        for _ in range(5):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if device != "cpu":
                torch.cuda.synchronize()
            runs.append(time.perf_counter() - start)
        return factor * statistics.median(runs)

    rows = int(RESPONSES * (length + 20))
    without = products(rows, bare, weights[:-1]) if bare else 0.0
    return length * products(RESPONSES, 1) + products(rows, 3 * updates) + without


def describe(seconds: list[float]) -> str:
    """Word a list of timings."""
    return (
        f"median {statistics.median(seconds):.3f} s a step, "
        f"{min(seconds):.3f} to {max(seconds):.3f} (n {len(seconds)})"
    )


def show(name: str, cell: dict[str, Any]) -> None:
    """Print one cell."""
    print(name)
    for side, label in (("ours", "distllm"), ("peer", "TRL")):
        print(
            f"  {label:8s} {describe(cell[f'{side}_s'])}, {cell['response_tokens'][side]:.1f} tokens a response"
        )
        phases = cell["phases_s"][side].items()
        print("           " + ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in phases))
    most = statistics.median(cell["peer_s"]) / cell["ceiling_s"]
    print(
        f"  ratio    {cell['ratio']:.2f}; the bare matrix products take {cell['ceiling_s']:.3f} s, "
        f"so at most {most:.2f}",
        flush=True,
    )

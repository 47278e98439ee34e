"""Sampled tokens per second on a CPU: distllm's batched generation against `transformers.generate`, same weights and dtype.

Shapes: `small`, a decoder of 6 layers, d_model 384, vocabulary 8,192, 32 prompts of 32 tokens; `gpt2`, GPT-2 124M with random
weights, 8 prompts; `t5`, 6 + 6 layers, d_model 384, 32 sources. Both sides sample at temperature 1 from all tokens, at most 64 tokens
a response. *natural*: each response ends at a set of end tokens that random weights hit once in 24 tokens, so rows end
at different times; *full*: nothing ends a response, so both sides do the same work.

The peer is timed with its dynamic and its static cache, and the faster one stands for it; weights are in the dtype of the
cell on its side. Warm-up is not counted. The ceiling is the bare matrix products of the tokens that were sampled, at the
full batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from harness import headline, machine
from pretrain_families import TINY, options_of

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.arch.encoder_decoder import EncoderDecoder
from distllm.arch.hf import gpt2, llama, t5
from distllm.engines.base import build_engine
from distllm.engines.hardware import tune_cpu
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.generation.generate import generate
from distllm.generation.options import GenerationOptions
from distllm.layers.products import product_dtype

PROMPT, NEW, END_EVERY = 32, 64, 24
CACHES = ("dynamic", "static")
DTYPES = ("bf16", "fp32")
GPT2: dict[str, Any] = {
    "vocab_size": 50257, "d_model": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 12, "d_ff": 3072,
    "max_seq_len": 1024, "norm": "layer", "position": "learned", "gated": False, "activation": "gelu_tanh",
    "qkv_bias": True, "out_bias": True, "ff_bias": True, "family": "gpt2",
}  # fmt: skip
SMALL = {
    "vocab_size": 8192,
    "d_model": 384,
    "n_layers": 6,
    "n_heads": 6,
    "n_kv_heads": 6,
    "d_ff": 1024,
}
SHAPES = {"small": 32, "gpt2": 8, "t5": 32}
"""Name -> rows sampled together."""


def build(shape: str, quick: bool) -> tuple[Any, Any]:
    """Build the same model twice: ours, and transformers'."""
    import transformers

    if shape == "t5":
        model: Any = EncoderDecoder(options_of("t5", quick))
        config, tensors = t5.FAMILY.to_hf(model.options, model.state_dict(), "lm")
        peer = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    elif shape == "gpt2":
        sizes = GPT2 | (TINY if quick else {})
        model = Decoder(DecoderOptions(**sizes))
        config, tensors = gpt2.FAMILY.to_hf(model.options, model.state_dict(), "lm")
        peer = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    else:
        model = Decoder(DecoderOptions(**(TINY if quick else SMALL), max_seq_len=256))
        config, tensors = llama.FAMILY.to_hf(model.options, model.state_dict(), "lm")
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    unknown = peer.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"transformers has no place for {unknown}")
    peer.tie_weights()
    return model, peer.eval()


class Side:
    """What both sides have: prompts, ends, and a count of what was sampled."""

    def __init__(self, vocab_size: int, rows: int, natural: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(5, vocab_size, (rows, PROMPT), generator=generator)
        spread = torch.randperm(vocab_size, generator=generator)
        ends = spread[: vocab_size // END_EVERY] if natural else spread[:0]
        self.ends = ends[ends > 0].tolist()
        self.tokens: list[int] = []
        """Sampled in each call."""


class Ours(Side):
    """distllm, through the engine that RL samples with."""

    def __init__(self, model: Any, precision: str, rows: int, natural: bool) -> None:
        super().__init__(model.options.vocab_size, rows, natural)
        self.engine = build_engine(
            "policy",
            model,
            options=EngineOptions(),
            hardware=HardwareOptions(device="cpu"),
            precision=precision,
            optim=None,
        )
        self.calls = 0

    def run(self, new: int) -> float:
        """Sample one batch; return seconds."""
        start = time.perf_counter()
        with self.engine.sampling() as model:
            rollouts = generate(
                model,
                self.prompts.tolist(),
                GenerationOptions(max_new_tokens=new),
                end_ids=self.ends,
                pad_id=0,
                seed=self.calls,
            )
        seconds = time.perf_counter() - start
        self.calls += 1
        self.tokens.append(sum(len(r.response_ids) for r in rollouts))
        return seconds


class Peer(Side):
    """transformers.generate."""

    def __init__(self, model: Any, precision: str, rows: int, natural: bool, cache: str) -> None:
        super().__init__(model.config.vocab_size, rows, natural)
        self.model = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.cache = cache

    def run(self, new: int) -> float:
        """Sample one batch; return seconds."""
        start = time.perf_counter()
        with torch.no_grad():
            out = self.model.generate(
                input_ids=self.prompts,
                attention_mask=torch.ones_like(self.prompts),
                max_new_tokens=new,
                do_sample=True,
                top_k=0,
                eos_token_id=self.ends or -1,
                pad_token_id=0,
                cache_implementation=self.cache if self.cache == "static" else None,
            )
        seconds = time.perf_counter() - start
        skip = 1 if self.model.config.is_encoder_decoder else PROMPT
        sampled = out[:, skip:]
        ended = torch.isin(sampled, torch.tensor(self.ends or [-1]))
        first = torch.where(ended.any(1), ended.int().argmax(1) + 1, sampled.shape[1])
        self.tokens.append(int(first.sum()))
        return seconds


def ceiling(model: Any, precision: str, rows: int) -> float:
    """Return tokens per second of the matrix products of one decoding step, nothing else."""
    dtype = product_dtype(torch.bfloat16 if precision == "bf16" else torch.float32, "cpu")
    parts = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("encoder")]
    shapes = [
        tuple(p.shape) for p in parts if p.shape[0] != getattr(model.options, "max_seq_len", 0)
    ]
    weights = [torch.randn(*s, dtype=dtype) for s in shapes]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=dtype) for w in weights}
    runs = []
    for _ in range(6):
        start = time.perf_counter()
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)
        runs.append(time.perf_counter() - start)
    return rows / statistics.median(runs[1:])


def measure(shape: str, precision: str, natural: bool, rounds: int, quick: bool) -> dict[str, Any]:
    """Measure one cell in interleaved rounds."""
    rows, new = (2, 8) if quick else (SHAPES[shape], NEW)
    model, twin = build(shape, quick)
    sides: dict[str, Any] = {"ours": Ours(model, precision, rows, natural)}
    tried: dict[str, Any] = {}
    for cache in CACHES:
        side = Peer(twin, precision, rows, natural, cache)
        try:
            side.run(new)  # warm-up
        except Exception as error:  # a cache that the peer's model refuses is a result too
            tried[cache] = str(error)[:200]
            continue
        side.tokens.clear()
        sides[cache] = side
    sides["ours"].run(new)
    sides["ours"].tokens.clear()
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = sides[name].run(new)
            rates[name].append(sides[name].tokens[-1] / seconds)
    tried |= {cache: statistics.median(rates[cache]) for cache in CACHES if cache in rates}
    fastest = max((c for c in CACHES if c in rates), key=lambda c: statistics.median(rates[c]))
    ours, peer = statistics.median(rates["ours"]), statistics.median(rates[fastest])
    most = ceiling(model, precision, rows)
    return {
        "ours_tokens_per_s": rates["ours"],
        "peer_tokens_per_s": rates[fastest],
        "peer_cache": fastest,
        "tried": tried,
        "tokens_per_response": {
            name: statistics.mean(sides[key].tokens) / rows
            for name, key in (("ours", "ours"), ("peer", fastest))
        },
        "ratio": ours / peer,
        "ceiling_tokens_per_s": most,
        "ceiling_ratio": most / peer,
    }


def show(name: str, cell: dict[str, Any]) -> None:
    """Print one cell."""
    print(name)
    for side, label in (("ours", "distllm"), ("peer", f"transformers, {cell['peer_cache']} cache")):
        rates = cell[f"{side}_tokens_per_s"]
        print(
            f"  {label:28s} {statistics.median(rates):9,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f}), "
            f"{cell['tokens_per_response'][side]:.1f} tokens a response"
        )
    print(
        f"  ratio {cell['ratio']:.2f}; bare matrix products at the full batch {cell['ceiling_tokens_per_s']:,.0f} "
        f"tokens/s, ratio {cell['ceiling_ratio']:.2f}",
        flush=True,
    )


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    threads = tune_cpu(HardwareOptions(device="cpu"))
    cells = {}
    for shape, precision, natural in itertools.product(
        arguments.shapes, arguments.dtypes, (True, False)
    ):
        name = f"{shape} {precision} {'natural' if natural else 'full'}"
        cells[name] = measure(shape, precision, natural, rounds, arguments.quick)
        show(name, cells[name])
    name, best = next(iter(cells.items()))
    line = headline(
        name="generate_cpu",
        ours=statistics.median(best["ours_tokens_per_s"]),
        peer=statistics.median(best["peer_tokens_per_s"]),
        ratio=best["ratio"],
        unit=f"tokens/s, {name}, against transformers.generate",
        runs=rounds,
        hardware=machine(threads),
        packages=("transformers",),
        cells=cells,
    )
    print(json.dumps(line))


if __name__ == "__main__":
    main()

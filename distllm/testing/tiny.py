"""Tiny models and batches for tests, with nothing random left to chance."""

from __future__ import annotations

from typing import Any

import numpy as np

from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.data.datasets import ChatExample, PairExample
from distllm.engines.base import Engine, build_engine
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.optim.options import AdamWOptions

PAD_ID = 0
VOCAB_SIZE = 37


def tiny_decoder(head: str = "lm", seed: int = 0, **changes: Any) -> Decoder:
    """Build a decoder of about 10 thousand parameters."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 32,
        "max_seq_len": 64,
        "init_std": 0.2,
    }
    return Decoder(DecoderOptions(**(shape | changes)), head=head, seed=seed)


def single_engine(model: Any, role: str = "model", trained: bool = True, **optim: Any) -> Engine:
    """Put `model` under the single engine, in the dtype of its weights."""
    return build_engine(
        role,
        model,
        options=EngineOptions(),
        hardware=HardwareOptions(device="cpu", threads=1),
        precision="fp32",
        optim=AdamWOptions(**optim) if trained else None,
    )


def chat_examples(count: int, seed: int = 0) -> list[ChatExample]:
    """Draw dialogues of uneven lengths; the second half of each is the assistant's."""
    rng = np.random.default_rng(seed)
    examples = []
    for index in range(count):
        length = int(rng.integers(3, 20))
        ids = rng.integers(1, VOCAB_SIZE, length).tolist()
        examples.append(ChatExample(ids, [i >= length // 2 for i in range(length)], index))
    return examples


def pair_examples(count: int, seed: int = 0) -> list[PairExample]:
    """Draw preference pairs of uneven lengths."""
    rng = np.random.default_rng(seed)

    def ids() -> list[int]:
        return rng.integers(1, VOCAB_SIZE, int(rng.integers(2, 9))).tolist()

    return [PairExample(ids(), ids(), ids(), "sampled", index) for index in range(count)]

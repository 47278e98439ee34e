"""Training runs that others have published: what was run, on what, and what they measured. Data only.

Sources, as read in public repositories:
- torchtitan: `benchmarks/llama3_h100_202412_torchtitan.md`, `asyncTP_llama3_h100_2025-06_torchtitan.md`,
  `llama3-8b_h200_202506_trainy-whitefiber.md`
- llm-foundry: `scripts/train/benchmarking/README.md`, table "H100 80GB BF16"
- Megatron-LM: the table of its README (model FLOPs count attention in full); Megatron-Bridge: `docs/performance-summary.md`, 25.11
- Llama 3: Grattafiori et al. 2024, arXiv 2407.21783, table 4

What a source does not say is inferred, and `note` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LLAMA = {"vocab_size": 128256, "n_kv_heads": 8, "tie_embeddings": False}
MPT = {"vocab_size": 50368, "gated": False, "tie_embeddings": True}
GPT = {"vocab_size": 131072, "gated": False, "tie_embeddings": False}


def _square(d_model: int, n_layers: int, n_heads: int, base: dict[str, Any]) -> dict[str, Any]:
    """A model whose heads all have keys of their own and whose feed-forward is four times as wide as the stream."""
    return base | {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads,
                   "n_kv_heads": n_heads, "d_ff": 4 * d_model}  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "Llama 3 8B": LLAMA | {"d_model": 4096, "n_layers": 32, "n_heads": 32, "d_ff": 14336},
    "Llama 3 70B": LLAMA | {"d_model": 8192, "n_layers": 80, "n_heads": 64, "d_ff": 28672},
    "Llama 3 405B": LLAMA | {"d_model": 16384, "n_layers": 126, "n_heads": 128, "d_ff": 53248},
    "MPT 760M": _square(1536, 24, 12, MPT),
    "MPT 1B": _square(2048, 24, 16, MPT),
    "MPT 3B": _square(2560, 32, 20, MPT),
    "MPT 7B": _square(4096, 32, 32, MPT),
    "MPT 13B": _square(5120, 40, 40, MPT),
    "MPT 30B": _square(7168, 48, 56, MPT),
    "MPT 70B": _square(8192, 80, 64, MPT),
    "GPT 1.7B": _square(2048, 24, 16, GPT),
    "GPT 7.1B": _square(4096, 30, 32, GPT),
    "GPT 16B": _square(6144, 32, 48, GPT),
}
PUBLISHED_PARAMETERS = {
    "Llama 3 8B": 8.03e9, "Llama 3 70B": 70.6e9, "Llama 3 405B": 405e9,
    "MPT 760M": 760470528, "MPT 1B": 1315950592, "MPT 3B": 2651837440, "MPT 7B": 6658859008,
    "MPT 13B": 12853954560, "MPT 30B": 29975214080, "MPT 70B": 64862437376,
    "GPT 1.7B": 1.7e9, "GPT 7.1B": 7.1e9, "GPT 16B": 16e9,
}  # fmt: skip
"""MPT's at 2,048 tokens, with its table of learned positions, which the shapes above leave out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One published run."""

    source: str
    model: str
    gpus: int
    seq: int
    micro: int
    """Sequences per micro-batch and data-parallel rank."""
    accum: int = 1
    hardware: str = "H100"
    """Key of `HARDWARE`."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Fields of `Layout`; the rest of the GPUs shard weights (stage 3) unless it says otherwise."""
    checkpointing: str = "none"
    compiled: bool = False
    """Elementwise work is fused, by a compiler or by hand."""
    fp8: bool = False
    tokens_per_s: float | None = None
    """Per GPU."""
    mfu: float | None = None
    """Where no rate is published: share of 989 TFLOP/s, full attention counted."""
    memory_gib: float | None = None
    logit_bytes: float = 0.0
    """Bytes per logit at the loss where all logits exist at once."""
    calibrates: bool = False
    note: str = ""


HARDWARE: dict[str, dict[str, Any]] = {
    "H100": {},
    "H100 96GB 500W": {"memory_gib": 95.0, "memory_gb_per_s": 2400.0, "gpu": "H100 96GB 500 W",
                       "peak_bf16_tflops": 989 * (500 / 700) ** (1 / 3),
                       "peak_fp8_tflops": 1979 * (500 / 700) ** (1 / 3)},
    "H200": {"memory_gib": 139.0, "memory_gb_per_s": 4800.0, "gpu": "H200 SXM"},
}  # fmt: skip
"""What differs from the preset of 8 H100. The authors do not know the peak of a GPU held to 500 of its 700 W; power
grows with the cube of the clock (clock times voltage squared), so the clock is taken to fall with its cube root."""


def _titan(gpus: int, compiled: bool, fp8: bool, rate: float, gib: float, **more: Any) -> Run:
    return Run(source="torchtitan", model="Llama 3 8B", gpus=gpus, seq=8192, micro=2,
               hardware="H100 96GB 500W", checkpointing="selective", compiled=compiled, fp8=fp8,
               tokens_per_s=rate, memory_gib=gib, logit_bytes=12.0, **more)  # fmt: skip


def _titan70(fp8: bool, hides: bool, rate: float, gib: float | None, **more: Any) -> Run:
    return Run(source="torchtitan", model="Llama 3 70B", gpus=256, seq=8192, micro=16,
               hardware="H100 96GB 500W", layout={"tp": 8, "overlaps_tp": hides},
               checkpointing="full", compiled=True, fp8=fp8, tokens_per_s=rate, memory_gib=gib,
               logit_bytes=12.0, **more)  # fmt: skip


def _titan405(chunks: int, rate: float, gib: float) -> Run:
    return Run(source="torchtitan", model="Llama 3 405B", gpus=512, seq=8192, micro=4, accum=8,
               hardware="H100 96GB 500W", checkpointing="full", compiled=True, fp8=True,
               layout={"tp": 8, "pp": 8, "pp_chunks": chunks, "overlaps_tp": True,
                       "reshard": False},
               tokens_per_s=rate, memory_gib=gib, logit_bytes=12.0,
               note="inferred: as many micro-batches as pipeline stages; gathered weights kept")  # fmt: skip


def _foundry(size: str, seq: int, gpus: int, micro: int, accum: int, full: bool, rate: float,
             **more: Any) -> Run:  # fmt: skip
    return Run(source="llm-foundry", model=f"MPT {size}", gpus=gpus, seq=seq, micro=micro,
               accum=accum, checkpointing="full" if full else "none", tokens_per_s=rate,
               **more)  # fmt: skip


def _megatron(size: str, gpus: int, tp: int, mfu: float) -> Run:
    return Run(source="Megatron-LM", model=f"GPT {size}", gpus=gpus, seq=4096, micro=2, accum=4,
               layout={"tp": tp, "zero_stage": 1, "overlaps_tp": True}, compiled=True, mfu=mfu,
               note="inferred: shape (from the size), micro-batch, accumulation")  # fmt: skip


RUNS = [
    _titan(8, False, False, 5762, 82.4),
    _titan(8, True, False, 6667, 77.0, calibrates=True),
    _titan(8, True, True, 8532, 76.8, calibrates=True),
    _titan(128, False, False, 5605, 67.0),
    _titan(128, True, False, 6514, 62.0),
    _titan(128, True, True, 8380, 61.8),
    _titan70(False, False, 597, None, calibrates=True),
    _titan70(False, True, 652, None),
    _titan70(True, False, 829, 71.9),
    _titan70(True, True, 876, 67.6),
    _titan405(1, 100, 82.5),
    _titan405(2, 128, 72.7),
    Run(source="torchtitan", model="Llama 3 8B", gpus=32, seq=8192, micro=2, hardware="H200",
        checkpointing="selective", compiled=True, fp8=True, tokens_per_s=10938,
        memory_gib=47.96, logit_bytes=4.0),
    Run(source="torchtitan", model="Llama 3 8B", gpus=64, seq=8192, micro=2, hardware="H200",
        checkpointing="selective", compiled=True, fp8=True, tokens_per_s=10753,
        memory_gib=46.97, logit_bytes=4.0),
    _foundry("760M", 2048, 8, 24, 2, False, 63147),
    _foundry("760M", 1024, 8, 48, 2, False, 78581),
    _foundry("1B", 2048, 8, 14, 1, False, 45455),
    _foundry("1B", 8192, 8, 3, 4, False, 29157),
    _foundry("1B", 2048, 64, 20, 1, False, 44402),
    _foundry("3B", 1024, 8, 20, 6, False, 27046),
    _foundry("3B", 4096, 8, 5, 6, False, 20964),
    _foundry("3B", 2048, 64, 6, 3, False, 22525),
    _foundry("7B", 2048, 8, 6, 1, False, 10643, calibrates=True),
    _foundry("7B", 8192, 8, 8, 2, True, 6935),
    _foundry("7B", 32768, 8, 2, 2, True, 3318, calibrates=True),
    _foundry("7B", 65536, 8, 1, 2, True, 1956),
    _foundry("13B", 2048, 8, 2, 1, False, 4792),
    _foundry("13B", 4096, 8, 10, 3, True, 4717),
    _foundry("30B", 2048, 16, 10, 3, True, 2263),
    _foundry("30B", 4096, 8, 1, 21, True, 1802),
    _foundry("70B", 2048, 32, 2, 16, True, 882),
    _foundry("70B", 2048, 64, 8, 4, True, 1039),
    _megatron("1.7B", 48, 1, 0.41),
    _megatron("7.1B", 96, 2, 0.47),
    _megatron("16B", 192, 4, 0.49),
    Run(source="Megatron-Bridge", model="Llama 3 8B", gpus=8, seq=8192, micro=1, accum=16,
        compiled=True, fp8=True, tokens_per_s=14451),
    Run(source="Megatron-Bridge", model="Llama 3 70B", gpus=64, seq=8192, micro=1, accum=64,
        layout={"tp": 4, "pp": 8, "pp_chunks": 5, "zero_stage": 1, "overlaps_tp": True},
        compiled=True, fp8=True, tokens_per_s=1602),
    Run(source="Llama 3 paper", model="Llama 3 405B", gpus=8192, seq=8192, micro=1, accum=32,
        layout={"tp": 8, "pp": 16, "pp_chunks": 8, "zero_stage": 2, "overlaps_tp": True},
        compiled=True, mfu=0.43, note="inferred: one block per chunk, micro-batches of one"),
    Run(source="Llama 3 paper", model="Llama 3 405B", gpus=16384, seq=8192, micro=1, accum=16,
        layout={"tp": 8, "pp": 16, "pp_chunks": 8, "zero_stage": 2, "overlaps_tp": True},
        compiled=True, mfu=0.41, note="inferred: one block per chunk, micro-batches of one"),
]  # fmt: skip

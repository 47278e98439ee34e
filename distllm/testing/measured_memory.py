"""Peak bytes of real training steps, by engine and on any number of gloo processes. Knows no formula."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from distllm import registry
from distllm.arch.adapter import AdapterOptions, attach
from distllm.arch.decoder import Decoder, DecoderOptions
from distllm.engines.base import build_engine
from distllm.engines.mesh import MeshOptions
from distllm.engines.options import BatchSizes, HardwareOptions
from distllm.engines.processes import processes, rank
from distllm.layers import products
from distllm.objectives.clm import CLM
from distllm.objectives.options import PretrainOptions
from distllm.optim.options import AdamWOptions
from distllm.testing.storages import StorageTracker, measure_steps
from distllm.types import Batch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration to measure; plain values, so that it travels as JSON."""

    shape: dict[str, Any]
    """Fields of DecoderOptions."""
    batch: int = 4
    """Sequences per micro-batch and process."""
    seq: int = 128
    precision: str = "fp32"
    checkpointing: str = "none"
    accum: int = 1
    """Micro-batches per step."""
    engine: str = "single"
    world_size: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    """Further fields of the engine's options."""
    adapter_rank: int = 0
    """0 trains every weight."""
    base_bits: int = 32
    mesh: dict[str, int] = field(default_factory=dict)
    """Fields of MeshOptions."""

    def adapter(self) -> AdapterOptions | None:
        """Return the adapter's options, if there is one."""
        if not self.adapter_rank:
            return None
        return AdapterOptions(name="lora", rank=self.adapter_rank, base_bits=self.base_bits)

    def options(self) -> Any:
        """Return the engine's options."""
        more = dict(self.settings)
        if self.mesh:
            more["mesh"] = MeshOptions(**self.mesh)
        return registry.get("engine", self.engine).Options(
            activation_checkpointing=self.checkpointing, **more
        )


@contextmanager
def _narrow_products() -> Iterator[None]:
    """Multiply bf16 as it is, as the hardware that is planned for does; a CPU without it holds wider numbers in passing."""
    before = products.HAS_FAST_BF16
    products.HAS_FAST_BF16 = True
    try:
        yield
    finally:
        products.HAS_FAST_BF16 = before


@_narrow_products()
def track(case: Case) -> StorageTracker:
    """Train two steps of `case` in this process, which is a member of the group already, and count."""
    options = DecoderOptions(**case.shape)
    model = Decoder(options)
    adapter = case.adapter()
    if adapter is not None:
        attach(model, adapter, seed=0)
    engine = build_engine(
        "model",
        model,
        options=case.options(),
        hardware=HardwareOptions(device="cpu", threads=1),
        precision=case.precision,
        optim=AdamWOptions(),
        batch=BatchSizes(case.batch * case.accum * case.world_size, case.batch),
    )
    ids = torch.arange(case.batch * case.seq).view(case.batch, case.seq) % options.vocab_size
    batches = [
        Batch(input_ids=ids.clone(), labels=ids.clone(), segment_ids=torch.ones_like(ids))
        for _ in range(case.accum)
    ]
    tracker = measure_steps(engine, CLM(PretrainOptions(), pad_id=0), batches)
    engine.close()
    return tracker


def peaks_on_ranks(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Measure `cases` one after the other; `distllm.testing.gloo.run_on` calls this on each rank."""
    found = []
    first = Case(**cases[0])
    with processes(first.options(), torch.device("cpu")):
        for fields in cases:
            tracker = track(Case(**fields))
            found.append(tracker.peaks | {"rank": rank()})
    return found

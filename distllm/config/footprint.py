"""What a model costs: parameters per part, bytes held for the backward pass by any architecture.

Everything is read off the real model class, built without memory (meta or fake tensors), so that it holds for any
architecture and follows its code. Floating-point operations are in `flops.py`; which models a stage needs in `plan.py`.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from distllm import registry


def build_meta(options: Any, head: str = "lm") -> Any:
    """Build a model of the right shapes and no memory."""
    with torch.device("meta"):
        return registry.get("arch", options.name)(options, head=head)


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Count parameters per part: embedding, the parts of the blocks summed over blocks, norms, head."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        words = name.split(".")
        part = words[2] if words[1].isdigit() else words[0]
        counts["norms" if part.endswith("norm") else part] += parameter.numel()
    return dict(counts)


def weight_bytes(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Count the bytes of all parameters in `dtype`."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def saved_bytes(options: Any, batch: int, seq_len: int, dtype: torch.dtype, *, packed: bool) -> int:
    """Count the bytes that the stack (head excluded) holds between forward and backward of one micro-batch.

    The forward is traced with fake tensors: no memory is taken and nothing is computed.

    Args:
        options: the architecture.
        batch: sequences per micro-batch.
        seq_len: tokens per sequence.
        dtype: of the heavy arithmetic; the copies of fp32 weights that autocast makes are part of the count.
        packed: rows hold several documents, so attention has an explicit mask.
    """
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model: Any = registry.get("arch", options.name)(options)
        ids = torch.zeros(batch, seq_len, dtype=torch.int64)
        segments = torch.ones_like(ids) if packed else None
        with (
            saved_tensors_hooks(hold, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            output = model(ids, segment_ids=segments, compute_logits=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        size = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
        del output
    return size


def cache_bytes(model: Any, batch: int, seq_len: int, dtype: torch.dtype) -> int:
    """Count the bytes of the key/value cache for sampling `batch` rows of up to `seq_len` tokens."""
    cache = model.new_cache(batch, seq_len, dtype, "meta")
    return cache.data.numel() * cache.data.itemsize

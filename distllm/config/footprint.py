"""What a model costs: parameters per part, bytes held for the backward pass by any architecture.

Everything is read off the real model class, built without memory (meta or fake tensors), so that it holds for any
architecture and follows its code. Floating-point operations are in `flops.py`; which models a stage needs in `plan.py`.
"""

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
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

    The forward is traced with fake tensors: no memory is taken and nothing is computed. Stacks of one and of two blocks
    are traced, and every further block is taken to hold what the second one adds.

    Args:
        options: the architecture.
        batch: sequences per micro-batch.
        seq_len: tokens per sequence; of source and target each where there are two.
        dtype: of the heavy arithmetic; the copies of fp32 weights that autocast makes are part of the count.
        packed: rows hold several documents, so attention has an explicit mask. An architecture that looks at values to
            lay packed rows out cannot be traced with them; its rows are taken as plain ones.
    """
    depth = {f.name for f in fields(options)} & {"n_layers", "n_decoder_layers"}
    shallow = [replace(options, **dict.fromkeys(depth, n)) for n in (1, 2)]
    try:
        one, two = (_traced_bytes(o, batch, seq_len, dtype, packed) for o in shallow)
    except (ValueError, DynamicOutputShapeException):
        one, two = (_traced_bytes(o, batch, seq_len, dtype, False) for o in shallow)
    return one + (options.n_layers - 1) * (two - one)


def _traced_bytes(options: Any, batch: int, seq_len: int, dtype: torch.dtype, packed: bool) -> int:
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model: Any = registry.get("arch", options.name)(options)
        ids = torch.zeros(batch, seq_len, dtype=torch.int64)
        inputs = {"input_ids": ids}
        if packed:
            inputs["segment_ids"] = torch.ones_like(ids)
        if hasattr(options, "decoder_start_id"):
            inputs |= {f"decoder_{name}": value for name, value in inputs.items()}
        with (
            saved_tensors_hooks(hold, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        ):
            output = model(**inputs, compute_logits=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        size = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
        del output
    return size


def cache_bytes(model: Any, batch: int, seq_len: int, dtype: torch.dtype) -> int:
    """Count the bytes of the key/value cache for sampling `batch` rows of up to `seq_len` tokens."""
    cache = model.new_cache(batch, seq_len, dtype, "meta")
    return cache.data.numel() * cache.data.itemsize

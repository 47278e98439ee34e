"""What a model costs: parameters per part, floating-point operations per token, bytes held for the backward pass.

Everything is read off the real model class, built without memory (meta or fake tensors), so that it holds for any
architecture and follows its code. Which models a stage needs is in `plan.py`.
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


def matmul_parameters(model: nn.Module) -> int:
    """Count the weights that every token is multiplied with.

    Embeddings are looked up, not multiplied; an output matrix is, even where it is the embedding's (tied).
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    projection = getattr(model.head, "projection", None)
    count = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in looked_up)
    if projection is not None and id(projection) in looked_up:
        count += projection.numel()
    return count


def flops_per_token(model: Any, seq_len: int, *, causal_half: bool) -> int:
    """Count the floating-point operations of one training token: forward plus a backward of twice that.

    A multiplication with its addition counts as 2. Per layer attention costs 4 x seq_len x n_heads x d_head forward
    when every token is counted as seeing the whole row, as PaLM (arXiv 2204.02311, appendix B) and most reports
    do; half of it when only the visible keys are counted, as fused kernels compute.
    """
    options = model.options
    width = options.n_heads * model.d_head
    attention = 4 * options.n_layers * seq_len * width // (2 if causal_half else 1)
    return 3 * (2 * matmul_parameters(model) + attention)


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

"""Weights in the dtype of the computation for the length of one call.

Under autocast every matrix product casts its fp32 weight again: for a rollout of 64 tokens, 64 times.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def lowered(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the model's fp32 matrices in `dtype` inside the `with`; outside they are what they were.

    The copies are made at the start and dropped at the end, so no later call can see stale ones. The
    fp32 tensors themselves are kept, not converted back: not a bit of them changes. Vectors (norms)
    stay in fp32, because autocast would leave them so. Nothing may train inside.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p.dtype == torch.float32]
    originals = [p.data for p in matrices] if dtype != torch.float32 else []
    try:
        for parameter, original in zip(matrices, originals, strict=False):
            parameter.data = original.to(dtype)
        yield
    finally:
        for parameter, original in zip(matrices, originals, strict=False):
            parameter.data = original

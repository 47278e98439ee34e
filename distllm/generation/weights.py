"""Weights in the dtype of the computation for the length of one call.

Autocast casts a frozen fp32 weight again for every product: for a rollout of 64 tokens, 64 times.
(It caches casts of trainable ones until the outermost autocast ends: a source of stale copies.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def lowered(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the model's fp32 matrices in `dtype` inside the `with`; outside they are what they were.

    The arithmetic is autocast's: products run in `dtype`; vectors (norms) and what an embedding
    looks up stay in fp32, so that the sampler does not drift from the training pass.

    The copies are made at the start and dropped at the end, so no later call can see stale ones.
    The fp32 tensors themselves are kept, not converted back: not a bit of them changes. Nothing may
    train inside.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2 and p.dtype == torch.float32]
    originals = [(p, p.data) for p in matrices] if dtype != torch.float32 else []
    by_parameter = {id(parameter): data for parameter, data in originals}
    hooks = [
        module.register_forward_hook(_look_up_in(by_parameter[id(module.weight)]))
        for module in model.modules()
        if isinstance(module, nn.Embedding) and id(module.weight) in by_parameter
    ]
    try:
        for parameter, data in originals:
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in originals:
            parameter.data = data
        for hook in hooks:
            hook.remove()


def _look_up_in(table: Tensor):
    """Return a forward hook that answers an embedding from `table` instead of its own weight."""

    def answer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.embedding(args[0], table)

    return answer

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

    The copies are made at the start and dropped at the end, so no later call can see stale ones. They stand in the
    parameters' places: the parameters themselves are left alone, for a change of `.data`'s dtype takes from a parameter
    the gradient hooks that data-parallel wrappers have put on it. Nothing may train inside.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.ndim >= 2 and parameter.dtype == torch.float32 and dtype != torch.float32
    ]
    copies: dict[int, nn.Parameter] = {}  # a tied parameter has one copy
    hooks = []
    try:
        for module, name, parameter in places:
            if id(parameter) not in copies:
                cast = parameter.detach().to(dtype)
                copies[id(parameter)] = nn.Parameter(cast, requires_grad=False)
            module._parameters[name] = copies[id(parameter)]
            if isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_hook(_look_up_in(parameter)))
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
        for hook in hooks:
            hook.remove()


def _look_up_in(table: Tensor):
    """Return a forward hook that answers an embedding from `table` instead of its own weight."""

    def answer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.embedding(args[0], table)

    return answer

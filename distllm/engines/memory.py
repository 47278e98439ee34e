"""What each block of a model may be given: recomputation in the backward pass, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from distllm.engines.options import EngineOptions
from distllm.errors import ConfigError


def prepare_blocks(model: Any, options: EngineOptions) -> None:
    """Checkpoint and compile the blocks of `model` as `options` asks.

    Raises:
        ConfigError: the kind of checkpointing is unknown.
    """
    if options.activation_checkpointing not in ("none", "full"):
        raise ConfigError(
            f"engine.activation_checkpointing={options.activation_checkpointing} is unknown. "
            "Known: none, full."
        )
    for block in model.blocks():
        if options.activation_checkpointing == "full":
            block.forward = _recomputed(block.forward)
        if options.compile:
            block.compile()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run

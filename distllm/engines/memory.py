"""What each block of a model may be given: recomputation in the backward pass, compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from distllm.engines.options import EngineOptions
from distllm.errors import ConfigError

CHECKPOINTING = ("none", "full", "selective")

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results are worth their memory: all products with weights, and attention kernels."""


def prepare_blocks(model: Any, options: EngineOptions) -> None:
    """Checkpoint and compile the blocks of `model` as `options` asks.

    Raises:
        ConfigError: the kind of checkpointing is unknown.
    """
    kind = options.activation_checkpointing
    if kind not in CHECKPOINTING:
        raise ConfigError(
            f"engine.activation_checkpointing={kind} is unknown. Known: {', '.join(CHECKPOINTING)}."
        )
    for block in model.blocks():
        # The forward alone: hooks that a wrapper puts on the block stay outside of the compiled part. What is kept of a
        # block is the compiler's to see; of a block that is computed again as a whole, nothing is, and hooks inside of it
        # (tensor parallel) may do what a compiled recomputation must not.
        if options.compile and kind != "selective":
            block.forward = torch.compile(block.forward)
        if kind != "none":
            block.forward = _recomputed(block.forward, selective=kind == "selective")
        if options.compile and kind == "selective":
            block.forward = torch.compile(block.forward)


def _recomputed(forward: Callable[..., Any], selective: bool) -> Callable[..., Any]:
    extra: dict[str, Any] = {}
    if selective:
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, _choose)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **extra, **kwargs)

    return run


def _choose(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if operation in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE

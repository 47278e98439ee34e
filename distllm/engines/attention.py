"""Which kernels a model gets when an engine takes it: of attention, and of the vocabulary loss.

What there is to choose: `layers/attention_kernels.py`, `layers/liger_loss.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from distllm.arch.options import attention_need
from distllm.engines.hardware import resolve_device, resolve_precision
from distllm.engines.options import HardwareOptions
from distllm.errors import ConfigError
from distllm.layers.attention_kernels import AUTO, Choice, choose
from distllm.layers.liger_loss import check_loss_kernel


def choose_attention(
    options: Any, hardware: HardwareOptions, precision: str, trains: bool
) -> Choice | None:
    """Choose for a model of this shape; None = it has no attention that a kernel of ours could serve.

    Raises:
        ConfigError: `hardware.attention` is unknown or cannot serve the model here.
    """
    device = resolve_device(hardware.device)
    dtype = resolve_precision(precision, device)
    need = attention_need(options, device, dtype, trains)
    if need is not None:
        return choose(hardware.attention, need)
    if hardware.attention != AUTO:
        name = getattr(options, "name", "")
        raise ConfigError(
            f"hardware.attention={hardware.attention} cannot serve arch={name}: "
            + ("its attention is transformers' own" if name == "auto" else "it has no attention")
            + ". What can: auto. Set hardware.attention=auto."
        )
    return None


def set_attention(
    model: torch.nn.Module, hardware: HardwareOptions, precision: str, trains: bool
) -> Choice | None:
    """Choose, and tell every stack of blocks in the model."""
    choice = choose_attention(getattr(model, "options", None), hardware, precision, trains)
    for module in model.modules():
        if choice is not None and hasattr(module, "attention_kernel"):
            module.attention_kernel = choice.name  # type: ignore[assignment]
    return choice


def set_loss_kernel(model: torch.nn.Module, hardware: HardwareOptions, is_split: bool) -> None:
    """Tell the head of a language model which kernel to take; `is_split`: tensor parallel cuts its matrix.

    Raises:
        ConfigError: `hardware.loss` is unknown or cannot serve the model here.
    """
    head: Any = getattr(model, "head", None)
    if hasattr(head, "loss_kernel"):
        device = resolve_device(hardware.device)
        check_loss_kernel(hardware.loss, device, is_plain=head.is_plain, is_split=is_split)
        head.loss_kernel = hardware.loss

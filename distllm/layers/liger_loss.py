"""Liger's Triton kernel for the vocabulary loss, where a GPU and the package are. Our own: `cross_entropy.py`.

Not yet run: no GPU has been at hand. The test that holds it to ours is marked `gpu`.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from distllm.errors import ConfigError

CHUNKED, LIGER = "chunked", "liger"


def check_loss_kernel(name: str, device: torch.device, *, is_plain: bool, is_split: bool) -> None:
    """Refuse a loss kernel that cannot serve.

    Args:
        name: of the kernel, `hardware.loss`.
        device: that the model runs on.
        is_plain: whether the logits are one matrix product, without a bias or a soft-cap behind it.
        is_split: whether the output matrix lies in parts on several processes.

    Raises:
        ConfigError: there is none of that name, or it cannot serve here; the message says why.
    """
    if name == CHUNKED:
        return
    if name != LIGER:
        raise ConfigError(f"hardware.loss={name} is unknown. Known: {CHUNKED}, {LIGER}.")
    reason = None
    if device.type != "cuda":
        reason = f"it runs on a GPU alone, and the device is {device.type}"
    elif importlib.util.find_spec("liger_kernel") is None:
        reason = (
            "the package liger-kernel is not installed (pip install liger-kernel, 0.8 or newer)"
        )
    elif not is_plain:
        reason = "this model has a bias or a soft-cap behind its output matrix, or no output matrix of ours"
    elif is_split:
        reason = "engine.mesh.tp_size cuts the output matrix into parts"
    if reason is not None:
        raise ConfigError(
            f"hardware.loss=liger (Liger's Triton kernel) cannot serve here: {reason}. Set hardware.loss=chunked."
        )


def liger_cross_entropy_z(
    hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Answer `linear_cross_entropy_z` by Liger's kernel, with the gradient of `weight` summed in float32.

    Args:
        hidden: [tokens, d_model], at least one token.
        weight: [vocab, d_model].
        labels: [tokens] int64.
        dtype: to compute in.
        z_loss: weight of the squared log normalisers.
    """
    functional = importlib.import_module("liger_kernel.transformers.functional")
    found = functional.liger_fused_linear_cross_entropy(
        hidden.to(dtype), weight.to(dtype), labels, lse_square_scale=z_loss, reduction="sum",
        return_z_loss=bool(z_loss), accum_dtype=torch.float32,
    )  # fmt: skip
    if not z_loss:
        return found.float(), found.new_zeros((), dtype=torch.float32)
    return found.loss.float(), found.z_loss.detach().float() / z_loss

"""Frozen linear layers held in 4 bits, through `bitsandbytes`: put in their place, computed with, given back.

NF4: blocks of 64 weights are divided by their largest, and each is rounded to one of 16 quantiles of a normal distribution;
the divisors are held in 8 bits. A product gives the weights back for its own length, in the forward and again in the
backward, so that one layer at a time is whole.

Reference: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from distllm.layers.products import Linear, linear

BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""The code, its block's divisor, and that divisor's own."""


class Linear4bit(nn.Linear):
    """A linear layer without gradient of its own, whose weight is codes of 4 bits."""

    def __init__(self, layer: nn.Linear) -> None:
        """Take over the weight of `layer`, which is rounded, and its bias, which is not."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        codes, self.scales = _library().quantize_4bit(
            layer.weight.data, quant_type="nf4", compress_statistics=True
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight.num_weights = layer.weight.numel()  # type: ignore[attr-defined]
        self.bias = layer.bias

    def given_back(self) -> Tensor:
        """Return the weight as it computes, [out, in] in the dtype that it came in."""
        if self.scales.absmax.device != self.weight.device:
            self.scales.to(self.weight.device)
        return _library().dequantize_4bit(self.weight.data, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., in]."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        out = _Product.apply(x, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.given_back().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return linear(grad, ctx.layer.given_back().to(grad.dtype).t()), None


def hold_in_4bit(model: Any) -> None:
    """Put every linear layer in the blocks of `model` into 4 bits, in place."""
    for block in model.blocks():
        homes = [(home, name) for home in block.modules() for name, child in home.named_children() if type(child) in (nn.Linear, Linear)]  # fmt: skip
        for home, name in homes:
            setattr(home, name, Linear4bit(getattr(home, name)))


def weights_given_back(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights that are held in 4 bits, on the CPU, by their names in `model`."""
    held = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return {f"{name}.weight": layer.given_back().cpu() for name, layer in held.items()}


def _library() -> Any:
    return importlib.import_module("bitsandbytes.functional")
